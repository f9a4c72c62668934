// What a decoding step does on the device beside its engine. The code of the kernels in step.cu, and on a CPU of what tests them.
//
//   update   inputs that stay on the device are changed where they differ, and tokens are taken from where the step before left them
//   choose   each branch's next token: the likeliest candidate, or one drawn among them by a number that the host has drawn
//
// A choice is made anew by the host when the candidates reach it (flamingo_export/runtime/sampling.py), so a rounding that differs from the
// host's costs a step and no result.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FLAMINGO_STEP __host__ __device__ inline
#else
#define FLAMINGO_STEP inline
#endif

// Eight bytes at `where` become `what`; where the lowest bit of `where` is set, the eight bytes that lie at `what`.
struct flamingo_update {
    uint64_t where;
    uint64_t what;
};

FLAMINGO_STEP void flamingo_apply(const flamingo_update& update) {
    const uint64_t from_memory = update.where & 1;
    uint64_t* target = reinterpret_cast<uint64_t*>(update.where & ~uint64_t(1));
    *target = from_memory ? *reinterpret_cast<const uint64_t*>(update.what) : update.what;
}

// How one branch's token is chosen. temperature 0: the likeliest. top_p 0, min_p 0: no such bound.
struct flamingo_choice {
    uint64_t target;  // address of the token, int64
    int64_t branch;   // of the candidates: values[branch * n .. ], ids[branch * n ..], best first
    int64_t top_k;    // candidates that are drawn among, at most n
    double temperature, top_p, min_p;
    double uniform;  // in [0, 1)
};

FLAMINGO_STEP int64_t flamingo_place(const flamingo_choice& choice, const float* values, int64_t n) {
    if (!(choice.temperature > 0)) return 0;
    int64_t count = choice.top_k < n ? choice.top_k : n;
    const double best = double(values[0]) / choice.temperature;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += exp(double(values[i]) / choice.temperature - best);
    // Candidates are sorted, so both bounds keep a beginning of them.
    double mass = 0;
    int64_t kept = 0;
    for (; kept < count; ++kept) {
        const double share = exp(double(values[kept]) / choice.temperature - best) / total;
        if (choice.top_p > 0 && kept > 0 && mass >= choice.top_p) break;
        if (choice.min_p > 0 && share < choice.min_p * (1.0 / total)) break;
        mass += share;
    }
    if (kept == 0) kept = 1;
    const double wanted = choice.uniform * mass;
    double reached = 0;
    for (int64_t i = 0; i < kept; ++i) {
        reached += exp(double(values[i]) / choice.temperature - best) / total;
        if (reached > wanted) return i;
    }
    return kept - 1;
}

FLAMINGO_STEP void flamingo_choose(const flamingo_choice& choice, const float* values, const int64_t* ids, int64_t n) {
    const float* own = values + choice.branch * n;
    *reinterpret_cast<int64_t*>(choice.target) = ids[choice.branch * n + flamingo_place(choice, own, n)];
}
