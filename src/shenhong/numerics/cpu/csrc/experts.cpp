// Routed experts around the GEMMs: choose, sort, gather, gated SwiGLU, combine.
//
// A "row" here is a row of the padded, expert-sorted order of a Plan; assignment[row] = n * chosen + k, or -1 where
// the row is padding. Padding rows are written as zeros, so they add nothing to any weight gradient.
#include "experts.h"

#include "common.h"

template <class T> static inline void copy_row(T* out, const T* in, int64_t dim) {
    if (in)
        std::memcpy(out, in, dim * sizeof(T));
    else
        std::memset(out, 0, dim * sizeof(T));
}

template <class T>
static void gather(const T* x, const int32_t* assignment, T* out, int64_t rows, int64_t dim, int chosen, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++)
            copy_row(out + r * dim, assignment[r] < 0 ? nullptr : x + assignment[r] / chosen * dim, dim);
    });
}

// hidden = gate * swiglu(gate_up)
template <class T>
static void gated_forward(const T* gate_up, const float* gates, const int32_t* assignment, T* hidden, int64_t rows,
                          int64_t width, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T *g = gate_up + r * 2 * width, *u = g + width;
            const float gate = assignment[r] < 0 ? 0.f : gates[assignment[r]];
            for (int64_t i = 0; i < width; i += W) {
                vf gv = load_up_to(g + i, width - i);
                store_up_to(hidden + r * width + i, gv * sigmoid(gv) * load_up_to(u + i, width - i) * gate, width - i);
            }
        }
    });
}

// From d(hidden): d(gate_up), d(gate), and hidden once more for the down projection's weight gradient.
template <class T>
static void gated_backward(const T* gate_up, const float* gates, const int32_t* assignment, const T* dhidden,
                           T* dgate_up, T* hidden, float* dgates, int64_t rows, int64_t width, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r++) {
            const T *g = gate_up + r * 2 * width, *u = g + width;
            T *dg = dgate_up + r * 2 * width, *du = dg + width;
            const float gate = assignment[r] < 0 ? 0.f : gates[assignment[r]];
            vf dot{};
            for (int64_t i = 0; i < width; i += W) {
                const int64_t left = width - i;
                vf gv = load_up_to(g + i, left), uv = load_up_to(u + i, left);
                vf d = load_up_to(dhidden + r * width + i, left);
                vf s = sigmoid(gv), silu = gv * s, act = silu * uv;
                dot += d * act;
                d *= gate;
                store_up_to(hidden + r * width + i, act * gate, left);
                store_up_to(du + i, d * silu, left);
                store_up_to(dg + i, d * uv * (s + silu * (1.f - s)), left);
            }
            if (assignment[r] >= 0) dgates[assignment[r]] = sum(dot);
        }
    });
}

// y[n] = sum over k of x[slot[n, k]]
template <class T>
static void combine(const T* x, const int32_t* slot, T* y, int64_t tokens, int64_t dim, int chosen, int threads) {
    parallel_rows(tokens, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++) {
            // A token's rows lie anywhere among the experts' segments: ask for them some tokens early.
            for (int k = 0; k < chosen && n + 8 < end; k++) prefetch(x + slot[(n + 8) * chosen + k] * dim, dim);
            for (int64_t i = 0; i < dim; i += W) {
                vf total{};
                for (int k = 0; k < chosen; k++) total += load_up_to(x + slot[n * chosen + k] * dim + i, dim - i);
                store_up_to(y + n * dim + i, total, dim - i);
            }
        }
    });
}

EXPORT void shenhong_gather(int dtype, const void* x, const int32_t* assignment, void* out, int64_t rows, int64_t dim,
                            int chosen, int threads) {
    if (dtype == BF16)
        gather((const bf16*)x, assignment, (bf16*)out, rows, dim, chosen, threads);
    else
        gather((const float*)x, assignment, (float*)out, rows, dim, chosen, threads);
}
EXPORT void shenhong_gated_forward(int dtype, const void* gate_up, const float* gates, const int32_t* assignment,
                                   void* hidden, int64_t rows, int64_t width, int threads) {
    if (dtype == BF16)
        gated_forward((const bf16*)gate_up, gates, assignment, (bf16*)hidden, rows, width, threads);
    else
        gated_forward((const float*)gate_up, gates, assignment, (float*)hidden, rows, width, threads);
}
EXPORT void shenhong_gated_backward(int dtype, const void* gate_up, const float* gates, const int32_t* assignment,
                                    const void* dhidden, void* dgate_up, void* hidden, float* dgates, int64_t rows,
                                    int64_t width, int threads) {
    if (dtype == BF16)
        gated_backward((const bf16*)gate_up, gates, assignment, (const bf16*)dhidden, (bf16*)dgate_up, (bf16*)hidden,
                       dgates, rows, width, threads);
    else
        gated_backward((const float*)gate_up, gates, assignment, (const float*)dhidden, (float*)dgate_up,
                       (float*)hidden, dgates, rows, width, threads);
}
EXPORT void shenhong_combine(int dtype, const void* x, const int32_t* slot, void* y, int64_t tokens, int64_t dim,
                             int chosen, int threads) {
    if (dtype == BF16)
        combine((const bf16*)x, slot, (bf16*)y, tokens, dim, chosen, threads);
    else
        combine((const float*)x, slot, (float*)y, tokens, dim, chosen, threads);
}

// Counting sort, first half: counts [experts] of the assignments. Returns 1 if an index is out of range.
EXPORT int shenhong_count(const int64_t* chosen, int64_t assignments, int64_t experts, int64_t* counts) {
    for (int64_t e = 0; e < experts; e++) counts[e] = 0;
    for (int64_t a = 0; a < assignments; a++) {
        if (chosen[a] < 0 || chosen[a] >= experts) return 1;
        counts[chosen[a]]++;
    }
    return 0;
}
// Second half: place every assignment at the next free row of its expert; bounds [experts + 1] in padded rows.
EXPORT void shenhong_place(const int64_t* chosen, int64_t assignments, int64_t experts, const int64_t* bounds,
                           int32_t* assignment, int32_t* slot) {
    std::vector<int64_t> next(bounds, bounds + experts);
    std::fill(assignment, assignment + bounds[experts], -1);
    for (int64_t a = 0; a < assignments; a++) {
        const int64_t row = next[chosen[a]]++;
        assignment[row] = int32_t(a);
        slot[a] = int32_t(row);
    }
}

// The k highest of score + bias, ties to the lower index; groups are limited first when groups > 1, by the sum of each
// one's best two, or by its best where by_best.
EXPORT void shenhong_select(const float* scores, const float* bias, int64_t* chosen, int64_t tokens, int64_t experts,
                            int k, int groups, int kept, int by_best, int threads) {
    parallel_rows(tokens, threads, [&](int64_t begin, int64_t end, int) {
        std::vector<float> total(experts), best(groups);
        const int64_t size = experts / groups;
        auto take_highest = [](float* values, int64_t n) {
            int64_t top = 0;
            for (int64_t i = 1; i < n; i++)
                if (values[i] > values[top]) top = i;
            return top;
        };
        for (int64_t n = begin; n < end; n++) {
            for (int64_t e = 0; e < experts; e++) total[e] = scores[n * experts + e] + bias[e];
            if (groups > 1) {
                for (int g = 0; g < groups; g++) {
                    float first = -INFINITY, second = size > 1 ? -INFINITY : 0.f;
                    for (int64_t e = g * size; e < (g + 1) * size; e++)
                        if (total[e] > first)
                            second = size > 1 ? first : 0.f, first = total[e];
                        else if (total[e] > second && size > 1)
                            second = total[e];
                    best[g] = by_best ? first : first + second;
                }
                std::vector<char> eligible(groups, 0);
                for (int i = 0; i < kept; i++) {
                    const int64_t g = take_highest(best.data(), groups);
                    best[g] = -INFINITY;
                    eligible[g] = 1;
                }
                for (int64_t e = 0; e < experts; e++)
                    if (!eligible[e / size]) total[e] = -INFINITY;
            }
            for (int i = 0; i < k; i++) {
                const int64_t e = take_highest(total.data(), experts);
                total[e] = -INFINITY;
                chosen[n * k + i] = e;
            }
        }
    });
}
