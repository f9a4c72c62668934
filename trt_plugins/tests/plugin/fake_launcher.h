// A launcher that computes nothing and records what it was called with.
#pragma once

#include "phi_cross_attention.h"

struct FakeLauncher {
    flamingo_phi_cross_attention_args args;
    cudaStream_t stream;
    int calls;
    cudaError_t answer;
};

extern "C" FakeLauncher* fake_launcher();
