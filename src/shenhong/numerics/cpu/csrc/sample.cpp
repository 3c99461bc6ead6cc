// One token per row of logits: temperature, top-k, top-p, min-p, and the inverse of the cumulative distribution.
//
// The order in which candidates are laid out for the inversion is part of the result: by id where nothing limits them,
// else from the likeliest on, ties to the lower id. A row's result depends on that row alone.
#include <numeric>

#include "common.h"
#include "sampling.h"

constexpr int64_t BLOCK = 64;  // candidates of a partial sum

static inline bool any(vi mask) {
    int32_t all = 0;
    for (int i = 0; i < W; i++) all |= mask[i];
    return all != 0;
}

// Scratch of one thread.
struct Row {
    std::vector<float> probabilities;
    std::vector<int32_t> order;

    // Puts the `count` likeliest of all first and in order.
    void sort_first(int64_t count) {
        auto likelier = [&](int32_t a, int32_t b) {
            return probabilities[a] > probabilities[b] || (probabilities[a] == probabilities[b] && a < b);
        };
        if (count < int64_t(order.size())) {
            std::nth_element(order.begin(), order.begin() + count, order.end(), likelier);
            std::sort(order.begin(), order.begin() + count, likelier);
        } else {
            std::sort(order.begin(), order.end(), likelier);
        }
    }

    // The place where the running sum of probability(i), i < count, passes the point.
    template <class S> static int64_t invert(int64_t count, double uniform, S probability) {
        double total = 0;
        for (int64_t i = 0; i < count; i++) total += probability(i);
        const double point = uniform * total;
        double sum = 0;
        int64_t last = 0;
        for (int64_t i = 0; i < count; i++) {
            const double one = probability(i);
            sum += one;
            if (one > 0) last = i;
            if (sum > point) return i;
        }
        return last;  // rounding
    }

    int64_t sample(const float* logits, int64_t vocab, const Sampling& how) {
        vf top = splat(-INFINITY);
        vi odd{};
        for (int64_t i = 0; i < vocab; i += W) {
            const vf x = load_up_to(logits + i, vocab - i, -INFINITY);
            top = max(top, x);
            odd |= x != x;
        }
        const float peak = max(top);
        if (any(odd) || !std::isfinite(peak)) return -1;
        if (how.temperature == 0) {
            int64_t i = 0;
            while (i + W <= vocab && !any(load(logits + i) == splat(peak))) i += W;
            while (logits[i] != peak) i++;
            return i;
        }
        const float factor = 1.f / how.temperature;
        probabilities.resize(vocab + W);
        const int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
        std::vector<double> sums(blocks, 0.0);
        for (int64_t b = 0; b < blocks; b++) {
            vf some{};
            for (int64_t i = b * BLOCK; i < std::min((b + 1) * BLOCK, vocab); i += W) {
                const vf x = load_up_to(logits + i, vocab - i, -INFINITY);
                vf e = exp((x - peak) * factor);
                e = x > splat(-INFINITY) ? e : vf{};
                store(&probabilities[i], e);
                some += e;
            }
            sums[b] = sum(some);
        }
        const bool all = how.top_k == 0 || how.top_k >= vocab;
        if (all && how.top_p >= 1) {
            if (how.min_p > 0)
                return invert(vocab, how.uniform,
                              [&](int64_t i) { return probabilities[i] < how.min_p ? 0.f : probabilities[i]; });
            double total = 0;
            for (double s : sums) total += s;
            double point = how.uniform * total;
            int64_t b = 0;
            for (; b + 1 < blocks && sums[b] <= point; b++) point -= sums[b];
            const int64_t begin = b * BLOCK, count = std::min(BLOCK, vocab - begin);
            return begin +
                   invert(count, std::min(1.0, point / sums[b]), [&](int64_t i) { return probabilities[begin + i]; });
        }
        order.resize(vocab);
        std::iota(order.begin(), order.end(), 0);
        int64_t kept = all ? vocab : how.top_k;
        double total = 0;
        if (all)
            for (double s : sums) total += s;
        else {
            sort_first(kept);
            for (int64_t i = 0; i < kept; i++) total += probabilities[order[i]];
        }
        if (how.top_p < 1) {
            // The nucleus is mostly small: sort a few, and more only while they do not hold enough.
            int64_t sorted = all ? 0 : kept, first = 0;
            double before = 0;
            for (;; first++) {
                if (first == kept || before >= how.top_p * total) break;
                if (first == sorted) sort_first(sorted = std::min(kept, std::max<int64_t>(64, sorted * 8)));
                before += probabilities[order[first]];
            }
            kept = std::max<int64_t>(1, first);
        }
        const float least = how.min_p;  // the likeliest has probability 1
        return order[invert(kept, how.uniform, [&](int64_t i) {
            const float probability = probabilities[order[i]];
            return probability < least ? 0.f : probability;
        })];
    }
};

EXPORT void shenhong_sample(const float* logits, int64_t stride, int64_t vocab, const Sampling* how, int64_t* chosen,
                            int64_t rows, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        Row row;
        for (int64_t n = begin; n < end; n++) chosen[n] = row.sample(logits + n * stride, vocab, how[n]);
    });
}
