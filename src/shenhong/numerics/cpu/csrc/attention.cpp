// Causal multi-head attention inside each document, forward and backward.
//
// One task is one head of one document. Its queries, keys and values are unpacked to float (RoPE applied on the way)
// into scratch that stays in L2; blocks of queries then meet all keys up to their diagonal, so the softmax needs no
// running maximum and the causal half is mostly skipped. All products are one micro-kernel, C += A B with A read by
// broadcast at any strides: a transposed left factor is free. Backward recomputes the probabilities from the saved
// log-sum-exp (FlashAttention-2, algorithm 2). Every output row is written by one task: deterministic.
#include "attention.h"

#include "common.h"

// Dims: L document length (padded Lp), d = plain + rope (padded dp), v value dims (padded vp); Q query block rows.
constexpr int NR = W == 16 ? 4 : 2, MR = 6, Q = 24;

static inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

template <int M, int N, bool ADD>
static inline void tile(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                        int64_t ldc) {
    vf acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m][n] = ADD ? load(c + m * ldc + n * W) : vf{};
    for (int64_t k = 0; k < K; k++) {
        vf row[N];
        for (int n = 0; n < N; n++) row[n] = load(b + k * ldb + n * W);
        for (int m = 0; m < M; m++) {
            const vf left = splat(a[m * am + k * ak]);
            for (int n = 0; n < N; n++) acc[m][n] += left * row[n];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * ldc + n * W, acc[m][n]);
}

template <int N, bool ADD>
static void panel(int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                  int64_t ldc) {
    int64_t m = 0;
    for (; m + MR <= M; m += MR) tile<MR, N, ADD>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc);
    a += m * am, c += m * ldc;
    switch (M - m) {
        case 1: tile<1, N, ADD>(K, a, am, ak, b, ldb, c, ldc); break;
        case 2: tile<2, N, ADD>(K, a, am, ak, b, ldb, c, ldc); break;
        case 3: tile<3, N, ADD>(K, a, am, ak, b, ldb, c, ldc); break;
        case 4: tile<4, N, ADD>(K, a, am, ak, b, ldb, c, ldc); break;
        case 5: tile<5, N, ADD>(K, a, am, ak, b, ldb, c, ldc); break;
    }
}

// C [M, N] (+)= A [M, K] B [K, N]; A's element (m, k) is a[m * am + k * ak]; N is a multiple of W.
template <bool ADD>
static void product(int64_t M, int64_t N, int64_t K, const float* a, int64_t am, int64_t ak, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
    int64_t n = 0;
    for (; n + NR * W <= N; n += NR * W) panel<NR, ADD>(M, K, a, am, ak, b + n, ldb, c + n, ldc);
    switch ((N - n) / W) {
        case 1: panel<1, ADD>(M, K, a, am, ak, b + n, ldb, c + n, ldc); break;
        case 2: panel<2, ADD>(M, K, a, am, ak, b + n, ldb, c + n, ldc); break;
        case 3: panel<3, ADD>(M, K, a, am, ak, b + n, ldb, c + n, ldc); break;
    }
}

// Pairs (2i, 2i+1) of x turned by the angle of `position`; direction -1 undoes it.
static inline void apply_rope(float* x, const Attention& t, int64_t position, float direction) {
    const int64_t half = t.rope / 2;
    const float *c = t.cosine + position * half, *s = t.sine + position * half;
    for (int64_t i = 0; i < half; i++) {
        const float even = x[2 * i], odd = x[2 * i + 1], sine = direction * s[i];
        x[2 * i] = even * c[i] - odd * sine;
        x[2 * i + 1] = even * sine + odd * c[i];
    }
}

template <class T> static inline void unpack(float* out, const T* in, int64_t n, float scale = 1) {
    for (int64_t i = 0; i < n; i += W) store_up_to(out + i, load_up_to(in + i, n - i) * scale, n - i);
}
template <class T> static inline void pack(T* out, const float* in, int64_t n, float scale = 1) {
    for (int64_t i = 0; i < n; i += W) store_up_to(out + i, load_up_to(in + i, n - i) * scale, n - i);
}

// Swaps the off-diagonal halves of ever larger (2, 4, ... W) squares of a W x W block.
template <int S> static inline void transpose_step(vf* block) {
    vi low, high;
    for (int l = 0; l < W; l++) low[l] = l & S ? W + l - S : l, high[l] = l & S ? W + l : l + S;
    for (int i = 0; i < W; i++) {
        if (i & S) continue;
        const vf a = block[i], b = block[i + S];
        block[i] = __builtin_shuffle(a, b, low);
        block[i + S] = __builtin_shuffle(a, b, high);
    }
}
static inline void transpose_block(vf* block) {
    transpose_step<1>(block);
    transpose_step<2>(block);
    if constexpr (W > 4) transpose_step<4>(block);
    if constexpr (W > 8) transpose_step<8>(block);
}

// Scratch of one thread and the task at hand.
template <class T> struct Task {
    const Attention& t;
    int64_t d, dp, vp, Lmax, first = 0, L = 0, Lp = 0, head = 0;
    std::vector<float> queries, keys, keys_t, values, values_t, scores, dscores, out, dout, dkeys, dvalues, row;

    Task(const Attention& t, int64_t longest, bool backward)
        : t(t), d(t.plain + t.rope), dp(padded(d)), vp(padded(t.value)), Lmax(padded(longest)) {
        queries.assign(Lmax * dp, 0), keys.assign(Lmax * dp, 0), keys_t.resize(d * Lmax), scores.resize(Q * Lmax),
            row.resize(std::max(dp, vp));
        out.resize(Q * std::max(vp, dp));
        if (!backward) {
            values.assign(Lmax * vp, 0);
            return;
        }
        values_t.resize(t.value * Lmax), dout.assign(Lmax * vp, 0);
        dscores.resize(Q * Lmax), dkeys.resize(Lmax * dp), dvalues.resize(Lmax * vp);
    }

    // out_t [dims, Lp] = in [L, dims]^T; columns past L are zero.
    void transpose(float* out_t, const float* in, int64_t stride, int64_t dims) {
        for (int64_t j0 = 0; j0 < Lp; j0 += W)
            for (int64_t i0 = 0; i0 < dims; i0 += W) {
                vf block[W];
                for (int j = 0; j < W; j++) block[j] = j0 + j < L ? load(in + (j0 + j) * stride + i0) : vf{};
                transpose_block(block);
                for (int i = 0; i < W && i0 + i < dims; i++) store(out_t + (i0 + i) * Lp + j0, block[i]);
            }
    }

    void begin(int64_t document, int64_t h, bool backward) {
        first = t.starts[document], L = t.starts[document + 1] - first, Lp = padded(L), head = h;
        for (int64_t i = 0; i < L; i++) {
            const int64_t n = first + i;
            // Rows of one head are far from each other in memory, which no hardware prefetcher foresees.
            const int64_t later = std::min(i + 8, L - 1) + first;
            prefetch((const T*)t.q + later * t.q_token + h * t.q_head, d);
            prefetch((const T*)t.k + later * t.k_token + h * t.k_head, t.plain);
            prefetch((const T*)t.v + later * t.v_token + h * t.v_head, t.value);
            if (backward) prefetch((const T*)t.d_o + (later * t.heads + h) * t.value, t.value);
            float *query = &queries[i * dp], *key = &keys[i * dp];
            unpack(query, (const T*)t.q + n * t.q_token + h * t.q_head, d, float(t.scale));
            apply_rope(query + t.plain, t, i, 1);
            unpack(key, (const T*)t.k + n * t.k_token + h * t.k_head, t.plain);
            unpack(key + t.plain, (const T*)t.k_rope + n * t.kr_token + h * t.kr_head, t.rope);
            apply_rope(key + t.plain, t, i, 1);
        }
        transpose(keys_t.data(), keys.data(), dp, d);
    }
    const T* value_row(int64_t i) const { return (const T*)t.v + (first + i) * t.v_token + head * t.v_head; }
    int64_t at(int64_t i) const { return (first + i) * t.heads + head; }

    void forward() {
        for (int64_t i = 0; i < L; i++) unpack(&values[i * vp], value_row(i), t.value);
        for (int64_t q0 = 0; q0 < L; q0 += Q) {
            const int64_t q1 = std::min<int64_t>(q0 + Q, L), rows = q1 - q0;
            product<false>(rows, padded(q1), d, &queries[q0 * dp], dp, 1, keys_t.data(), Lp, scores.data(), Lp);
            float inverse[Q];
            for (int64_t i = 0; i < rows; i++) {
                float* s = &scores[i * Lp];
                const int64_t seen = q0 + i + 1;
                vf top = splat(-INFINITY), total{};
                for (int64_t j = 0; j < seen; j += W) top = max(top, load_up_to(s + j, seen - j, -INFINITY));
                const float peak = max(top);
                for (int64_t j = 0; j < seen; j += W) {
                    vf e = exp(load(s + j) - peak);
                    if (seen - j < W)
                        for (int64_t x = seen - j; x < W; x++) e[x] = 0;
                    store(s + j, e);
                    total += e;
                }
                for (int64_t j = padded(seen); j < q1; j += W) store(s + j, vf{});
                const float z = sum(total);
                t.lse[at(q0 + i)] = peak + std::log(z);
                inverse[i] = 1 / z;
            }
            product<false>(rows, vp, q1, scores.data(), Lp, 1, values.data(), vp, out.data(), vp);
            for (int64_t i = 0; i < rows; i++) pack((T*)t.o + at(q0 + i) * t.value, &out[i * vp], t.value, inverse[i]);
        }
    }

    void backward() {
        for (int64_t i = 0; i < L; i++) {
            unpack(&dvalues[i * vp], value_row(i), t.value);  // only until transposed
            unpack(&dout[i * vp], (const T*)t.d_o + at(i) * t.value, t.value);
        }
        transpose(values_t.data(), dvalues.data(), vp, t.value);
        std::fill(dkeys.begin(), dkeys.begin() + L * dp, 0.f);
        std::fill(dvalues.begin(), dvalues.begin() + L * vp, 0.f);
        for (int64_t q0 = 0; q0 < L; q0 += Q) {
            const int64_t q1 = std::min<int64_t>(q0 + Q, L), rows = q1 - q0, span = padded(q1);
            product<false>(rows, span, d, &queries[q0 * dp], dp, 1, keys_t.data(), Lp, scores.data(), Lp);
            product<false>(rows, span, t.value, &dout[q0 * vp], vp, 1, values_t.data(), Lp, dscores.data(), Lp);
            for (int64_t i = 0; i < rows; i++) {
                float *p = &scores[i * Lp], *ds = &dscores[i * Lp];
                const int64_t seen = q0 + i + 1;
                const float lse = t.lse[at(q0 + i)];
                vf dot{};
                for (int64_t j = 0; j < span; j += W) {
                    vf e{};
                    if (j < seen) e = exp(load(p + j) - lse);
                    if (seen - j < W)
                        for (int64_t x = std::max<int64_t>(0, seen - j); x < W; x++) e[x] = 0;
                    store(p + j, e);
                    dot += e * load(ds + j);
                }
                const float delta = sum(dot);
                for (int64_t j = 0; j < span; j += W) store(ds + j, load(p + j) * (load(ds + j) - delta));
            }
            product<false>(rows, dp, q1, dscores.data(), Lp, 1, keys.data(), dp, out.data(), dp);
            product<true>(q1, vp, rows, scores.data(), 1, Lp, &dout[q0 * vp], vp, dvalues.data(), vp);
            product<true>(q1, dp, rows, dscores.data(), 1, Lp, &queries[q0 * dp], dp, dkeys.data(), dp);
            for (int64_t i = 0; i < rows; i++) {
                apply_rope(&out[i * dp + t.plain], t, q0 + i, -1);
                pack((T*)t.dq + at(q0 + i) * d, &out[i * dp], d, float(t.scale));
            }
        }
        for (int64_t i = 0; i < L; i++) {
            const int64_t n = first + i;
            float* key = &dkeys[i * dp];
            apply_rope(key + t.plain, t, i, -1);
            pack((T*)t.dk + n * t.dk_token + head * t.dk_head, key, t.plain);
            pack((T*)t.dv + n * t.dv_token + head * t.dv_head, &dvalues[i * vp], t.value);
            if (t.dk_rope_heads)
                pack(t.dk_rope_heads + at(i) * t.rope, key + t.plain, t.rope);
            else
                pack((T*)t.dk_rope + n * t.dkr_token + head * t.dkr_head, key + t.plain, t.rope);
        }
    }
};

template <class T> static void run(const Attention& t, bool backward) {
    int64_t longest = 0;
    for (int64_t s = 0; s < t.documents; s++) longest = std::max<int64_t>(longest, t.starts[s + 1] - t.starts[s]);
    const int64_t tasks = t.documents * t.heads;
    const int threads = int(std::max<int64_t>(1, std::min(t.threads, tasks)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Task<T> task(t, longest, backward);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            task.begin(i / t.heads, i % t.heads, backward);
            if (backward)
                task.backward();
            else
                task.forward();
        }
    }
    if (!backward || !t.dk_rope_heads) return;
    parallel_rows(t.tokens, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++)
            for (int64_t i = 0; i < t.rope; i++) {
                float total = 0;
                for (int64_t h = 0; h < t.heads; h++) total += t.dk_rope_heads[(n * t.heads + h) * t.rope + i];
                ((T*)t.dk_rope)[n * t.rope + i] = from_float<T>(total);
            }
    });
}

EXPORT void shenhong_attention(const Attention* t, int backward) {
    if (t->dtype == BF16)
        run<bf16>(*t, backward);
    else
        run<float>(*t, backward);
}
