// Products with packed matrices: panels of NB output rows, each [columns][NB], so that NB results grow in registers
// while a panel streams by once.
//
// A row of a product adds its columns one after the other, whatever other rows there are. Where the CPU multiplies
// bfloat16 itself, panels of that dtype hold pairs of columns, [columns / 2][NB][2], and a product's left side is
// rounded to bfloat16, as it is everywhere in that dtype.
#pragma once
#include "common.h"

constexpr int NV = 4, NB = NV * W, MR = 6;  // vectors and lanes of a panel; rows of a register tile

static inline int64_t panels(int64_t rows) { return (rows + NB - 1) / NB; }

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
template <class T> constexpr int pair = PAIRS && sizeof(T) == 2 ? 2 : 1;
// Columns of a panel, the odd one filled up.
template <class T> static inline int64_t depth(int64_t K) { return (K + pair<T> - 1) / pair<T> * pair<T>; }

// The tile's left side: float rows as they are, or rounded rows of pairs.
template <class T> struct Left {
    const float* at[MR];
    void row(int m, const float* in, int64_t) { at[m] = in; }
};
#if defined(__AVX512BF16__)
template <> struct Left<bf16> {
    const bf16* at[MR];
    std::vector<bf16>& rows() {
        static thread_local std::vector<bf16> kept;
        return kept;
    }
    void row(int m, const float* in, int64_t K) {
        const int64_t stride = (K + 2 * W) / W * W;
        if (int64_t(rows().size()) < MR * stride) rows().resize(MR * stride);
        bf16* out = rows().data() + m * stride;
        for (int64_t k = 0; k < K; k += W) store(out + k, load_up_to(in + k, K - k));
        if (K % W == 0) out[K] = bf16{0};
        at[m] = out;
    }
};
#endif

template <class T> static inline void ahead(const T* w) {
    for (int i = 0; i < NB; i += 64 / int(sizeof(T))) __builtin_prefetch(w + 24 * NB + i);
}

template <int M, class T>
static inline void panel_rows(int64_t K, const Left<T>& left, const T* w, vf (&acc)[MR][NV]) {
    vf sums[M][NV];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < NV; i++) sums[m][i] = vf{};
    for (int64_t k = 0; k < depth<T>(K); k += pair<T>, w += NB * pair<T>) {
        if (M <= 3)  // few rows: memory is what one waits for
            for (int i = 0; i < pair<T>; i++) ahead(w + i * NB);
#if defined(__AVX512BF16__)
        if constexpr (pair<T> == 2) {
            __m512bh row[NV];
            for (int i = 0; i < NV; i++) std::memcpy(&row[i], w + i * 2 * W, sizeof row[i]);
            for (int m = 0; m < M; m++) {
                int32_t two;
                std::memcpy(&two, left.at[m] + k, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                for (int i = 0; i < NV; i++) sums[m][i] = (vf)_mm512_dpbf16_ps((__m512)sums[m][i], row[i], x);
            }
            continue;
        }
#endif
        vf row[NV];
        for (int i = 0; i < NV; i++) row[i] = load(w + i * W);
        for (int m = 0; m < M; m++) {
            const vf x = splat(to_float(left.at[m][k]));
            for (int i = 0; i < NV; i++) sums[m][i] += x * row[i];
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < NV; i++) acc[m][i] = sums[m][i];
}

// Meets one packed panel [K, NB] with `rows` rows a(m) and hands each row's NB sums to done(m, sums).
template <class T, class A, class Done>
static void meet(int64_t rows, int64_t K, A a, const T* w, Done done) {
    for (int64_t m0 = 0; m0 < rows; m0 += MR) {
        const int M = int(std::min<int64_t>(MR, rows - m0));
        Left<T> left;
        for (int m = 0; m < M; m++) left.row(m, a(m0 + m), K);
        vf acc[MR][NV];
        switch (M) {
            case 1: panel_rows<1>(K, left, w, acc); break;
            case 2: panel_rows<2>(K, left, w, acc); break;
            case 3: panel_rows<3>(K, left, w, acc); break;
            case 4: panel_rows<4>(K, left, w, acc); break;
            case 5: panel_rows<5>(K, left, w, acc); break;
            case 6: panel_rows<6>(K, left, w, acc); break;
        }
        for (int m = 0; m < M; m++) done(m0 + m, acc[m]);
    }
}

template <bool ADD> static inline void put(float* out, const vf* sums, int64_t columns) {
    for (int i = 0; i < NV && columns > 0; i++, out += W, columns -= W)
        store_up_to(out, ADD ? load_up_to(out, columns) + sums[i] : sums[i], columns);
}
