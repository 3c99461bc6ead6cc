// What all kernels share: vectors of floats, bfloat16, exp, and a deterministic split of rows over threads.
//
// Vectors are GCC vector extensions, so the same source serves AVX-512, AVX2 and anything else GCC knows. All
// arithmetic is float; bfloat16 is only a way of storing. Row tails shorter than a vector go through load_part and
// store_part, so no dimension has to be a multiple of anything.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// For loops over a register tile: GCC keeps an array in registers only if these loops are gone early.
#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

// The dtype argument of every exported function.
enum DType : int { F32 = 0, BF16 = 1 };

static inline vf splat(float x) { return x - vf{}; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
template <class T> static inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return bf16{0x7fc0};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &h, sizeof h);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu is_nan = (vu)(x != x);
    rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0);
    vh h = __builtin_convertvector(rounded, vh);
    std::memcpy(p, &h, sizeof h);
#endif
}

template <class T> static inline void prefetch(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

// n < W values; the rest of the vector is `fill`.
template <class T> static inline vf load_part(const T* p, int64_t n, float fill = 0) {
    float x[W];
    for (int i = 0; i < W; i++) x[i] = i < n ? to_float(p[i]) : fill;
    return load(x);
}
template <class T> static inline void store_part(T* p, vf v, int64_t n) {
    T x[W];
    store(x, v);
    for (int i = 0; i < n; i++) p[i] = x[i];
}
template <class T> static inline vf load_up_to(const T* p, int64_t n, float fill = 0) {
    return n >= W ? load(p) : load_part(p, n, fill);
}
template <class T> static inline void store_up_to(T* p, vf v, int64_t n) {
    if (n >= W)
        store(p, v);
    else
        store_part(p, v, n);
}

static inline float sum(vf x) {
    float y = 0;
    for (int i = 0; i < W; i++) y += x[i];
    return y;
}
static inline float max(vf x) {
    float y = x[0];
    for (int i = 1; i < W; i++) y = std::max(y, x[i]);
    return y;
}
// A NaN in x survives.
static inline vf max(vf x, vf y) { return x < y ? y : x; }
static inline vf min(vf x, vf y) { return x > y ? y : x; }

// e^x to 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, a polynomial for e^r, n added to the exponent. Below -87.3 it is
// e^-87.3 (about 1e-38), above 88 it is e^88.
static inline vf exp(vf x) {
    x = min(max(x, splat(-87.3f)), splat(88.f));
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return (vf)((vi)p + ((vi)shifted << 23));
}
static inline vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

// Calls f(begin, end, thread) once per thread over contiguous shares of 0..rows; the split depends only on the
// thread count, so partial sums kept per thread and added in order are deterministic.
template <class F> static inline void parallel_rows(int64_t rows, int threads, F f) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows)));
    if (threads == 1) {
        f(int64_t(0), rows, 0);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        int t = omp_get_thread_num(), n = omp_get_num_threads();
        f(rows * t / n, rows * (t + 1) / n, t);
    }
}
