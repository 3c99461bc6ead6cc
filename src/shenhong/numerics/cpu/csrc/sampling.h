// How a token is sampled from its row of logits, by a call from Python or from within generation.
#pragma once
#include <cstdint>

struct Sampling {
    float temperature, top_p, min_p;
    int32_t top_k;  // 0: no limit
    double uniform;
};

// chosen[n]: a token, or -1 where a logit is not a number or none is finite.
extern "C" void shenhong_sample(const float* logits, int64_t stride, int64_t vocab, const Sampling* how,
                                int64_t* chosen, int64_t rows, int threads);
