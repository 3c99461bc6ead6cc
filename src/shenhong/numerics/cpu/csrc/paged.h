// Attention over the pages of a cache.
//
// Legend: N tokens, S sequences, D hidden, H heads, R latent rank, n nope dims, r rope dims, v value dims, e = R + r,
// G groups of heads with one key (latent attention: 1), J heads of a group, d width of a query, E experts.
#pragma once
#include "decode.h"
#include "panels.h"
#include "team.h"

constexpr int TILE = W == 16 ? 8 : 4;  // columns of a register tile of attention

// How many of the numbers that a vector or two could hold exist, as loads want to know it.
template <class T> using Some = std::conditional_t<pair<T> == 2, uint32_t, int64_t>;
template <class T> static inline Some<T> some_of(int64_t n) {
    return pair<T> == 1 ? n : n >= 2 * W ? ~0u : (1u << n) - 1;
}

// Words 0 .. W - 1 of W rows, `stride` words from one to the next, transposed: lane i of word j's vector is row i's.
static inline void transpose_words(const int32_t* rows, int64_t stride, vi* words) {
    // Halves of each four lanes of two vectors, one by one and two by two.
    const vi low = each_lane([](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * W; }), high = low + 2;
    const vi low_two = each_lane([](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * W; }), high_two = low_two + 2;
    UNROLL
    for (int k = 0; k < W; k += 4) {
        vi x[4];  // four words of rows i, 4 + i, 8 + i ...
        UNROLL
        for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
            auto four = [&](int row) { return _mm_loadu_si128((const __m128i*)(rows + row * stride + k)); };
            __m512i all = _mm512_castsi128_si512(four(i));
            all = _mm512_mask_broadcast_i32x4(all, 0x00f0, four(4 + i));
            all = _mm512_mask_broadcast_i32x4(all, 0x0f00, four(8 + i));
            x[i] = (vi)_mm512_mask_broadcast_i32x4(all, 0xf000, four(12 + i));
#else
            for (int g = 0; g < W; g += 4) std::memcpy((int32_t*)&x[i] + g, rows + (g + i) * stride + k, 16);
#endif
        }
        const vi a = __builtin_shuffle(x[0], x[1], low), b = __builtin_shuffle(x[2], x[3], low);
        const vi c = __builtin_shuffle(x[0], x[1], high), d = __builtin_shuffle(x[2], x[3], high);
        words[k] = __builtin_shuffle(a, b, low_two), words[k + 1] = __builtin_shuffle(a, b, high_two);
        words[k + 2] = __builtin_shuffle(c, d, low_two), words[k + 3] = __builtin_shuffle(c, d, high_two);
    }
}

#if defined(__AVX512BF16__)
// W words are W pairs.
static inline vi load_words(const bf16* p, uint32_t part) { return (vi)_mm512_maskz_loadu_epi16(part, p); }
// Of two rows 2W columns, paired.
static inline void load_columns(const bf16* const* rows, int64_t at, uint32_t part, __m512bh (&out)[2]) {
    const __m512i x = (__m512i)load_words(rows[0] + at, part), y = (__m512i)load_words(rows[1] + at, part);
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    out[0] = (__m512bh)_mm512_permutex2var_epi16(x, order, y);
    out[1] = (__m512bh)_mm512_permutex2var_epi16(x, _mm512_add_epi16(order, _mm512_set1_epi16(16)), y);
}
#else
static inline vi load_words(const bf16* p, int64_t n) { return (vi)load_up_to(p, n); }
#endif
static inline vi load_words(const float* p, int64_t n) { return (vi)load_up_to(p, n); }
template <class T> static inline void load_columns(const T* const* rows, int64_t at, int64_t n, vf (&out)[2]) {
    for (int i = 0; i < 2; i++, n -= W) out[i] = n > 0 ? load_up_to(rows[0] + at + i * W, n) : vf{};
}

// Attention of a few columns (token t, head h of a group: column t J + h) of one sequence over its pages. W keys at a
// time are transposed so that each has a lane, and all columns meet them. In a cache row the group's key has its first e
// numbers, its value those from value_at on.
template <class T> class Columns {
    using L = Left<T>;
    DecodeModel m;
    int64_t e, row, values, value_at, words;
    std::vector<T> nothing;  // a row behind the last key
    std::vector<const T*> keys;
    std::vector<vi> transposed, copy;  // [words] of W keys, and W keys of so many words
    Buffer<float> scores;              // [columns, keys]
    Buffer<L> probabilities;           // likewise

public:
    void begin(const DecodeModel& model) {
        m = model, e = m.rank + m.rope, row = m.key_heads ? 2 * m.key_heads * m.value : e;
        values = m.key_heads ? m.value : m.rank, value_at = m.key_heads ? m.value : 0;
        words = depth<T>(e) / pair<T>;
        nothing.assign(row, T{}), transposed.resize((words + W - 1) / W * W), copy.resize(transposed.size());
    }

    // pool: rows begin with the group's key. queries(j): column j's [e]; out(j): where its values go; length[j]: keys
    // it sees. At most MOST columns.
    static constexpr int MOST = 16;
    template <class Q, class O>
    void run(const T* pool, const int32_t* table, int columns, const int32_t* length, Q queries, O out) {
        const int64_t longest = *std::max_element(length, length + columns), padded = (longest + W - 1) / W * W;
        keys.assign(padded, nothing.data());
        for (int64_t s = 0; s < longest; s += m.page)
            for (int64_t i = 0; i < std::min(m.page, longest - s); i++)
                keys[s + i] = pool + (table[s / m.page] * m.page + i) * row;
        scores.grow(columns * padded), probabilities.grow(columns * padded);
        const L* query[MOST];
        for (int j = 0; j < columns; j++) query[j] = queries(j);
        for (int64_t s = 0; s < padded; s += W) {
            transpose_keys(s);
            for (int j = 0; j < columns; j += TILE)
                exactly<TILE>(std::min(TILE, columns - j),
                              [&](auto count) { score<count>(query + j, &scores[j * padded + s], padded); });
        }
        vf inverse[MOST], sums[TILE][2];
        for (int j = 0; j < columns; j++)
            inverse[j] = splat(1.f / softmax(&scores[j * padded], &probabilities[j * padded], padded, length[j]));
        for (int64_t i = 0; i < values; i += 2 * W)
            for (int j = 0; j < columns; j += TILE) {
                const int some = std::min(TILE, columns - j);
                // Together as far as all see, then each to its own end: what a column does not see may not be a number,
                // and even a probability of zero would bring that in.
                const int64_t shortest = *std::min_element(length + j, length + j + some);
                const int64_t common = shortest == longest ? longest : shortest / pair<T> * pair<T>;
                exactly<TILE>(some,
                              [&](auto count) { weigh<count>(common, i, &probabilities[j * padded], padded, sums); });
                for (int x = 0; x < some; x++) end(common, length[j + x], i, &probabilities[(j + x) * padded], sums[x]);
                for (int x = 0; x < some; x++)
                    for (int y = 0; y < 2 && i + y * W < values; y++)
                        store_up_to(out(j + x) + i + y * W, sums[x][y] * inverse[j + x], values - i - y * W);
            }
    }

private:
    // What M columns make of the transposed keys. Like weigh a function of its own, so that its sums stay in registers.
    template <int M> __attribute__((noinline)) void score(const L* const* query, float* out, int64_t stride) const {
        vf sums[M][2];  // even and odd words, or few columns would wait for their own sums
        UNROLL
        for (int x = 0; x < M; x++) sums[x][0] = sums[x][1] = vf{};
        auto add = [&](int64_t d, int y) {
            const auto key = load_lanes((const L*)&transposed[d]);
            UNROLL
            for (int x = 0; x < M; x++) sums[x][y] = add_product(sums[x][y], key, splat_lane(query[x] + d * pair<T>));
        };
        for (int64_t d = 0; d + 1 < words; d += 2) add(d, 0), add(d + 1, 1);
        if (words % 2) add(words - 1, 0);
        UNROLL
        for (int x = 0; x < M; x++) store(out + x * stride, sums[x][0] + sums[x][1]);
    }

    // Of M columns the values' numbers i .. i + 2W - 1 by their probabilities.
    template <int M>
    __attribute__((noinline)) void weigh(int64_t seen, int64_t i, const L* probability, int64_t stride,
                                         vf (*out)[2]) const {
        const Some<T> some = some_of<T>(values - i);
        vf sums[M][2];
        UNROLL
        for (int x = 0; x < M; x++) sums[x][0] = sums[x][1] = vf{};
        for (int64_t s = 0; s < seen; s += pair<T>) {
            decltype(load_lanes(probability)) value[2];
            load_columns(&keys[s], value_at + i, some, value);
            UNROLL
            for (int x = 0; x < M; x++) {
                const auto one = splat_lane(probability + x * stride + s);
                UNROLL
                for (int y = 0; y < 2; y++) sums[x][y] = add_product(sums[x][y], value[y], one);
            }
        }
        UNROLL
        for (int x = 0; x < M; x++) {
            UNROLL
            for (int y = 0; y < 2; y++) out[x][y] = sums[x][y];
        }
    }

    // One column's keys from .. seen - 1, behind what weigh did.
    void end(int64_t from, int64_t seen, int64_t i, const L* probability, vf (&sums)[2]) const {
        for (int64_t s = from; s < seen; s += pair<T>) {
            const T* two[2] = {keys[s], s + 1 < seen ? keys[s + 1] : nothing.data()};
            decltype(load_lanes(probability)) value[2];
            load_columns(two, value_at + i, some_of<T>(values - i), value);
            for (int y = 0; y < 2; y++) sums[y] = add_product(sums[y], value[y], splat_lane(probability + s));
        }
    }

    // Keys s .. s + W - 1. Where they do not lie in a page as whole vectors of words, a copy of them is transposed.
    void transpose_keys(int64_t s) {
        const int32_t* from = (const int32_t*)keys[s];
        int64_t stride = row / pair<T>;
        if (s % m.page + W > m.page || sizeof(T) * pair<T> != 4 || e % (W * pair<T>) || row % pair<T>) {
            stride = int64_t(transposed.size());
            for (int i = 0; i < W; i++)
                for (int64_t d = 0; d < words; d += W)
                    copy[(i * stride + d) / W] = load_words(keys[s + i] + d * pair<T>, some_of<T>(e - d * pair<T>));
            from = (const int32_t*)copy.data();
        }
        for (int64_t d = 0; d < words; d += W) transpose_words(from + d, stride, &transposed[d]);
    }

    // The first `seen` scores as probabilities of one column, zeros behind them, and the sum to divide by.
    __attribute__((noinline)) float softmax(const float* in, L* out, int64_t padded, int32_t seen) const {
        const vi lane = each_lane([](int i) { return i; });
        vf top = splat(-INFINITY), total{};
        for (int32_t s = 0; s < seen; s += W) top = max(top, lane + s < seen ? load(in + s) : splat(-INFINITY));
        const float peak = fold(top, [](vf x, vf y) { return max(x, y); }), scale = float(m.scale);
        for (int32_t s = 0; s < padded; s += W) {
            const vf probability = lane + s < seen ? exp((load(in + s) - peak) * scale) : vf{};
            total += probability;
            store(out + s, probability);
        }
        return fold(total, [](vf x, vf y) { return x + y; });
    }
};
