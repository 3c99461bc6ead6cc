// RMSNorm and SwiGLU: one pass over memory each way.
#include "common.h"

template <class T>
static void rms_forward(const T* x, int64_t stride, const float* weight, T* y, float* rstd, int64_t rows, int64_t dim,
                        float eps, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            const T* in = x + n * stride;
            T* out = y + n * dim;
            vf squares{};
            for (int64_t i = 0; i < dim; i += W) {
                vf v = load_up_to(in + i, dim - i);
                squares += v * v;
            }
            const float r = 1.f / std::sqrt(sum(squares) / dim + eps);
            rstd[n] = r;
            for (int64_t i = 0; i < dim; i += W)
                store_up_to(out + i, load_up_to(in + i, dim - i) * r * load_up_to(weight + i, dim - i), dim - i);
        }
    });
}

// With g = dy * weight: dx = rstd * (g - x * rstd^2 * mean(g x)); dweight = sum over rows of dy * x * rstd.
// `partial` [threads, dim] is zeroed by the caller, who also adds its rows.
template <class T>
static void rms_backward(const T* x, int64_t stride, const float* weight, const float* rstd, const T* dy, T* dx,
                         float* partial, int64_t rows, int64_t dim, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int thread) {
        float* dweight = partial + thread * dim;
        for (int64_t n = begin; n < end; n++) {
            const T *in = x + n * stride, *up = dy + n * dim;
            const float r = rstd[n];
            vf dots{};
            for (int64_t i = 0; i < dim; i += W) {
                const int64_t left = dim - i;
                vf xv = load_up_to(in + i, left), g = load_up_to(up + i, left);
                dots += xv * g * load_up_to(weight + i, left);
                store_up_to(dweight + i, load_up_to(dweight + i, left) + g * xv * r, left);
            }
            const float c = sum(dots) / dim * r * r;
            for (int64_t i = 0; i < dim; i += W) {
                const int64_t left = dim - i;
                vf g = load_up_to(up + i, left) * load_up_to(weight + i, left);
                store_up_to(dx + n * dim + i, (g - load_up_to(in + i, left) * c) * r, left);
            }
        }
    });
}

template <class T>
static void swiglu_forward(const T* gate_up, int64_t stride, T* y, int64_t rows, int64_t width, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            const T *gate = gate_up + n * stride, *up = gate + width;
            for (int64_t i = 0; i < width; i += W) {
                vf g = load_up_to(gate + i, width - i);
                store_up_to(y + n * width + i, g * sigmoid(g) * load_up_to(up + i, width - i), width - i);
            }
        }
    });
}

template <class T>
static void swiglu_backward(const T* gate_up, int64_t stride, const T* dy, T* dgate_up, int64_t rows, int64_t width,
                            int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            const T *gate = gate_up + n * stride, *up = gate + width;
            T *dgate = dgate_up + n * 2 * width, *dup = dgate + width;
            for (int64_t i = 0; i < width; i += W) {
                const int64_t left = width - i;
                vf g = load_up_to(gate + i, left), u = load_up_to(up + i, left),
                   d = load_up_to(dy + n * width + i, left);
                vf s = sigmoid(g), silu = g * s;
                store_up_to(dup + i, d * silu, left);
                store_up_to(dgate + i, d * u * (s + silu * (1.f - s)), left);
            }
        }
    });
}

EXPORT void shenhong_rms_forward(int dtype, const void* x, int64_t stride, const float* weight, void* y, float* rstd,
                                 int64_t rows, int64_t dim, float eps, int threads) {
    if (dtype == BF16)
        rms_forward((const bf16*)x, stride, weight, (bf16*)y, rstd, rows, dim, eps, threads);
    else
        rms_forward((const float*)x, stride, weight, (float*)y, rstd, rows, dim, eps, threads);
}
EXPORT void shenhong_rms_backward(int dtype, const void* x, int64_t stride, const float* weight, const float* rstd,
                                  const void* dy, void* dx, float* partial, int64_t rows, int64_t dim, int threads) {
    if (dtype == BF16)
        rms_backward((const bf16*)x, stride, weight, rstd, (const bf16*)dy, (bf16*)dx, partial, rows, dim, threads);
    else
        rms_backward((const float*)x, stride, weight, rstd, (const float*)dy, (float*)dx, partial, rows, dim, threads);
}
EXPORT void shenhong_swiglu_forward(int dtype, const void* gate_up, int64_t stride, void* y, int64_t rows,
                                    int64_t width, int threads) {
    if (dtype == BF16)
        swiglu_forward((const bf16*)gate_up, stride, (bf16*)y, rows, width, threads);
    else
        swiglu_forward((const float*)gate_up, stride, (float*)y, rows, width, threads);
}
EXPORT void shenhong_swiglu_backward(int dtype, const void* gate_up, int64_t stride, const void* dy, void* dgate_up,
                                     int64_t rows, int64_t width, int threads) {
    if (dtype == BF16)
        swiglu_backward((const bf16*)gate_up, stride, (const bf16*)dy, (bf16*)dgate_up, rows, width, threads);
    else
        swiglu_backward((const float*)gate_up, stride, (const float*)dy, (float*)dgate_up, rows, width, threads);
}
