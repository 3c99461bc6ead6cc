// Softmax cross-entropy over one chunk of logits, in place.
#include "common.h"

// logits [rows, vocab] become, if `gradient`, weights_n * (softmax - onehot(target)); logprob [rows] is always
// written. A row and its exponentials stay in L1/L2, so memory is read once and written once.
template <class T>
static void softmax_loss(T* logits, const int64_t* targets, const float* weights, float* logprob, int64_t rows,
                         int64_t vocab, bool gradient, int threads) {
    parallel_rows(rows, threads, [&](int64_t begin, int64_t end, int) {
        std::vector<float> exps(vocab + W);
        for (int64_t n = begin; n < end; n++) {
            T* row = logits + n * vocab;
            vf top = splat(-INFINITY), top2 = top;
            int64_t i = 0;
            for (; i + 2 * W <= vocab; i += 2 * W) top = max(top, load(row + i)), top2 = max(top2, load(row + i + W));
            for (; i < vocab; i += W) top = max(top, load_up_to(row + i, vocab - i, -INFINITY));
            const float peak = max(max(top, top2));
            vf total{}, total2{};
            for (i = 0; i + 2 * W <= vocab; i += 2 * W) {
                vf e = exp(load(row + i) - peak), e2 = exp(load(row + i + W) - peak);
                store(&exps[i], e), store(&exps[i + W], e2);
                total += e, total2 += e2;
            }
            for (; i < vocab; i += W) {
                vf e = exp(load_up_to(row + i, vocab - i, -INFINITY) - peak);
                store(&exps[i], e);
                total += e;
            }
            const float z = sum(total + total2);
            logprob[n] = to_float(row[targets[n]]) - peak - std::log(z);
            if (!gradient) continue;
            const float scale = weights[n] / z;
            for (i = 0; i < vocab; i += W) store_up_to(row + i, load(&exps[i]) * scale, vocab - i);
            row[targets[n]] = from_float<T>(exps[targets[n]] * scale - weights[n]);
        }
    });
}

EXPORT void shenhong_softmax_loss(int dtype, void* logits, const int64_t* targets, const float* weights, float* logprob,
                                  int64_t rows, int64_t vocab, int gradient, int threads) {
    if (dtype == BF16)
        softmax_loss((bf16*)logits, targets, weights, logprob, rows, vocab, gradient, threads);
    else
        softmax_loss((float*)logits, targets, weights, logprob, rows, vocab, gradient, threads);
}
