// The element-wise parts of Muon, each one pass over memory; its matrix products are GEMMs elsewhere.
#include "common.h"

// momentum = beta * momentum + grad; update = grad + beta * momentum (Nesterov).
template <class T>
static void nesterov(const float* grad, float* momentum, T* update, int64_t n, float beta, int threads) {
    parallel_rows((n + W - 1) / W, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin * W; i < end * W; i += W) {
            const int64_t left = n - i;
            const vf g = load_up_to(grad + i, left), m = load_up_to(momentum + i, left) * beta + g;
            store_up_to(momentum + i, m, left);
            store_up_to(update + i, g + m * beta, left);
        }
    });
}

// weight = keep * weight - rate * update
template <class T>
static void decayed_add(float* weight, const T* update, int64_t n, float keep, float rate, int threads) {
    parallel_rows((n + W - 1) / W, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin * W; i < end * W; i += W) {
            const int64_t left = n - i;
            store_up_to(weight + i, load_up_to(weight + i, left) * keep - load_up_to(update + i, left) * rate, left);
        }
    });
}

// out = x / (Frobenius norm + 1e-7) for each of `batch` matrices of n numbers.
template <class T> static void normalise(const T* x, T* out, int64_t batch, int64_t n, int threads) {
    parallel_rows(batch, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; b++) {
            vf squares{};
            for (int64_t i = 0; i < n; i += W) {
                const vf v = load_up_to(x + b * n + i, n - i);
                squares += v * v;
            }
            const float scale = 1 / (std::sqrt(sum(squares)) + 1e-7f);
            for (int64_t i = 0; i < n; i += W)
                store_up_to(out + b * n + i, load_up_to(x + b * n + i, n - i) * scale, n - i);
        }
    });
}

// square becomes a I + b gram + c square, for `batch` matrices of size x size.
template <class T>
static void polynomial(const T* gram, T* square, int64_t batch, int64_t size, float a, float b, float c, int threads) {
    parallel_rows(batch * size, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T* g = gram + r * size;
            T* s = square + r * size;
            const int64_t d = r % size;
            const float diagonal = a + b * to_float(g[d]) + c * to_float(s[d]);
            for (int64_t i = 0; i < size; i += W)
                store_up_to(s + i, load_up_to(g + i, size - i) * b + load_up_to(s + i, size - i) * c, size - i);
            s[d] = from_float<T>(diagonal);
        }
    });
}

EXPORT void shenhong_nesterov(int dtype, const float* grad, float* momentum, void* update, int64_t n, float beta,
                              int threads) {
    if (dtype == BF16)
        nesterov(grad, momentum, (bf16*)update, n, beta, threads);
    else
        nesterov(grad, momentum, (float*)update, n, beta, threads);
}
EXPORT void shenhong_decayed_add(int dtype, float* weight, const void* update, int64_t n, float keep, float rate,
                                 int threads) {
    if (dtype == BF16)
        decayed_add(weight, (const bf16*)update, n, keep, rate, threads);
    else
        decayed_add(weight, (const float*)update, n, keep, rate, threads);
}
EXPORT void shenhong_normalise(int dtype, const void* x, void* out, int64_t batch, int64_t n, int threads) {
    if (dtype == BF16)
        normalise((const bf16*)x, (bf16*)out, batch, n, threads);
    else
        normalise((const float*)x, (float*)out, batch, n, threads);
}
EXPORT void shenhong_polynomial(int dtype, const void* gram, void* square, int64_t batch, int64_t size, float a,
                                float b, float c, int threads) {
    if (dtype == BF16)
        polynomial((const bf16*)gram, (bf16*)square, batch, size, a, b, c, threads);
    else
        polynomial((const float*)gram, (float*)square, batch, size, a, b, c, threads);
}
