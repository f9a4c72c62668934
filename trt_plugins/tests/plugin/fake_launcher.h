// A launcher that computes nothing and records what it was called with.
#pragma once

#include "phi_cross_attention.h"
#include "phi_range_cross_attention.h"

struct FakeLauncher {
    flamingo_phi_cross_attention_args args;
    cudaStream_t stream;
    int calls;
    cudaError_t answer;
    flamingo_phi_range_cross_attention_args range_args;
    int range_calls;
};

extern "C" FakeLauncher* fake_launcher();
