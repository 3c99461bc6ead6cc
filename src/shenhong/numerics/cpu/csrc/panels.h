// Products with packed matrices: panels of NB output rows, each [columns][NB], so that NB results grow in registers
// while a panel streams by once.
//
// A row of a product adds its columns one after the other, whatever other rows there are. Where the CPU multiplies
// bfloat16 itself, panels of that dtype hold pairs of columns, [columns / 2][NB][2], and a product's left side is
// bfloat16 too; everywhere else the left side is float.
#pragma once
#include <type_traits>
#include <utility>

#include "common.h"

constexpr int NV = 4, NB = NV * W, MR = 6;  // vectors and lanes of a panel; rows of a register tile

static inline int64_t panels(int64_t rows) { return (rows + NB - 1) / NB; }

// One factor of W products that are summed lane by lane: floats, or pairs of bfloat16.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
static inline __m512bh load_lanes(const bf16* p) {
    __m512bh x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline __m512bh splat_lane(const bf16* p) {
    int32_t two;
    std::memcpy(&two, p, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}
static inline vf add_product(vf sum, __m512bh x, __m512bh y) { return (vf)_mm512_dpbf16_ps((__m512)sum, x, y); }
#else
constexpr bool PAIRS = false;
static inline vf load_lanes(const bf16* p) { return load(p); }
#endif
static inline vf load_lanes(const float* p) { return load(p); }
static inline vf splat_lane(const float* p) { return splat(*p); }
static inline vf add_product(vf sum, vf x, vf y) { return sum + x * y; }

template <class T> constexpr int pair = PAIRS && sizeof(T) == 2 ? 2 : 1;
template <class T> using Left = std::conditional_t<pair<T> == 2, bf16, float>;
// Columns of a panel, and numbers of a left row, the odd one filled up with a zero.
template <class T> static inline int64_t depth(int64_t K) { return (K + pair<T> - 1) / pair<T> * pair<T>; }

// A vector of f(0), f(1) ... that the compiler knows.
template <class F, int... I> static inline vi each_lane(F f, std::integer_sequence<int, I...>) { return vi{f(I)...}; }
template <class F> static inline vi each_lane(F f) { return each_lane(f, std::make_integer_sequence<int, W>()); }

// All lanes taken together, by halves.
template <int HALF = W / 2, class F> static inline float fold(vf x, F f) {
    if constexpr (HALF == 0)
        return x[0];
    else
        return fold<HALF / 2>(f(x, __builtin_shuffle(x, each_lane([](int i) { return (i + HALF) % W; }))), f);
}

// Calls f with the number as a constant: 1 <= number <= MOST.
template <int MOST, class F> static inline void exactly(int number, F f) {
    if (number == MOST)
        f(std::integral_constant<int, MOST>());
    else if constexpr (MOST > 1)
        exactly<MOST - 1>(number, f);
}

// Fetches what comes next of a panel: a little of it close when few rows wait for nothing else, more of it further off
// when many compute meanwhile.
template <int M, class T> static inline void prefetch_panel(const T* w) {
    constexpr int rows = M <= 3 ? 24 : 64, bytes = NB * pair<T> * int(sizeof(T));
    UNROLL
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)(w + rows * NB) + i, 0, M <= 3 ? 3 : 2);
}

// M rows meet the first V vectors of a packed panel. A function of its own, so that its sums stay in registers
// wherever it is called from.
template <int M, int V, class T>
__attribute__((noinline)) static void panel_rows(int64_t K, const Left<T>* const* left, const T* w, vf (*out)[NV]) {
    vf sums[M][V];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int i = 0; i < V; i++) sums[m][i] = vf{};
    }
    for (int64_t k = 0; k < depth<T>(K); k += pair<T>, w += NB * pair<T>) {
        prefetch_panel<M>(w);
        decltype(load_lanes(w)) row[V];
        UNROLL
        for (int i = 0; i < V; i++) row[i] = load_lanes(w + i * W * pair<T>);
        UNROLL
        for (int m = 0; m < M; m++) {
            const auto x = splat_lane(left[m] + k);
            UNROLL
            for (int i = 0; i < V; i++) sums[m][i] = add_product(sums[m][i], row[i], x);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int i = 0; i < V; i++) out[m][i] = sums[m][i];
    }
}

// Meets one packed panel [K, NB], of which so many columns are wanted, with `rows` rows a(m) and hands each row's sums
// to done(m, sums).
template <class T, class A, class Done>
static inline void meet(int64_t rows, int64_t K, A a, const T* packed, int64_t columns, Done done) {
    const int vectors = int(std::min<int64_t>(NV, (columns + W - 1) / W));
    for (int64_t m0 = 0, M; m0 < rows; m0 += M) {
        const int64_t rest = rows - m0;  // in tiles as even as can be
        M = rest <= MR ? rest : rest <= 2 * MR ? (rest + 1) / 2 : rest <= 3 * MR ? (rest + 2) / 3 : MR;
        const Left<T>* left[MR];
        vf sums[MR][NV];
        for (int m = 0; m < M; m++) left[m] = a(m0 + m);
        exactly<MR>(int(M),
                    [&](auto m) { exactly<NV>(vectors, [&](auto v) { panel_rows<m, v>(K, left, packed, sums); }); });
        for (int m = 0; m < M; m++) done(m0 + m, sums[m]);
    }
}

template <bool ADD, class T> static inline void put(T* out, const vf* sums, int64_t columns) {
    for (int i = 0; i < NV && columns > 0; i++, out += W, columns -= W)
        store_up_to(out, ADD ? load_up_to(out, columns) + sums[i] : sums[i], columns);
}
