// The kernels of step.h. scripts/step_kernels makes flamingo_export/backends/tensorrt/step.ptx of this file; the driver compiles that for its card.
#include "step.h"

extern "C" __global__ void flamingo_step_update(const flamingo_update* updates, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) flamingo_apply(updates[i]);
}

extern "C" __global__ void flamingo_step_choose(const flamingo_choice* choices, int64_t count, const float* values, const int64_t* ids, int64_t n) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) flamingo_choose(choices[i], values, ids, n);
}
