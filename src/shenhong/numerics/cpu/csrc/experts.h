// The choice of experts: of a training step and of generation.
#pragma once
#include <cstdint>

// scores [tokens, experts], bias [experts]; chosen [tokens, k], ties to the lower index.
extern "C" void shenhong_select(const float* scores, const float* bias, int64_t* chosen, int64_t tokens,
                                int64_t experts, int k, int groups, int kept_groups, int by_best, int threads);
