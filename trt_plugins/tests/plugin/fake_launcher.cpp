#include "fake_launcher.h"

static FakeLauncher recorded{};

FakeLauncher* fake_launcher() { return &recorded; }

cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t stream) {
    recorded.args = *args;
    recorded.stream = stream;
    ++recorded.calls;
    return recorded.answer;
}

const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args) {
    const bool pointers = args->q && args->k && args->v && args->y && args->media_rows && args->phi;
    return pointers && args->head_size % 16 == 0 ? "fake" : nullptr;
}

cudaError_t flamingo_phi_range_cross_attention(const flamingo_phi_range_cross_attention_args* args, cudaStream_t stream) {
    recorded.range_args = *args;
    recorded.stream = stream;
    ++recorded.range_calls;
    return recorded.answer;
}

const char* flamingo_phi_range_cross_attention_kernel(const flamingo_phi_range_cross_attention_args* args) {
    const bool pointers = args->q && args->k && args->v && args->y && args->media_rows && args->first_media && args->phi && args->workspace;
    return pointers && args->head_size % 16 == 0 ? "fake" : nullptr;
}

size_t flamingo_phi_range_cross_attention_workspace(const flamingo_phi_range_cross_attention_args* args) {
    return size_t(args->batch) * 1000000 + size_t(args->positions) * 1000 + size_t(args->media);
}
