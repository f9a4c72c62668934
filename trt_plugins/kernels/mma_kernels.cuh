// Kernels on tensor cores of one head size. Each head size has a source file of its own, so that they compile side by side.
#pragma once

#include "choose.h"
#include "cuda_machine.cuh"

namespace flamingo {

// Blocks that a multiprocessor should hold at least, which bounds the registers: as many as leave nothing to spill. Queries of a large head, and
// results that are kept from slice to slice, take most of them.
template <class Shape>
constexpr int min_blocks() {
    if (Shape::ROW_TILES == 1) return 4;
    if (!Shape::ONE_PASS) return Shape::D <= 80 ? 3 : 2;
#if __CUDA_ARCH__ == 1000
    if (Shape::D == 64) return 3;  // 2 registers short of 4 blocks, only on this architecture
#endif
    return Shape::D <= 96 ? 4 : 3;
}

template <class Shape>
__global__ void __launch_bounds__(THREADS, min_blocks<Shape>()) mma_kernel(const __grid_constant__ Args args) {
    __shared__ __align__(128) char shared[Shape::SHARED_BYTES];
    CudaMachine machine(shared);
    MmaBlock<CudaMachine, Shape>(machine, args, blockIdx.x).run();
}

template <class Shape>
cudaError_t launch_mma_kernel(const Args& args, int64_t blocks, cudaStream_t stream) {
    // Without it the driver may keep so much L1 cache that fewer blocks fit.
    const cudaError_t error = cudaFuncSetAttribute(mma_kernel<Shape>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    mma_kernel<Shape><<<unsigned(blocks), THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

template <int D, class T, class KV>
cudaError_t launch_mma_kernel(const Args& args, Kernel kernel, cudaStream_t stream) {
    const int64_t blocks = blocks_of(args, kernel);
    switch (kernel) {
        case Kernel::PREFILL: return launch_mma_kernel<MmaShape<T, KV, D, 4, true>>(args, blocks, stream);
        case Kernel::PREFILL_SLICED: return launch_mma_kernel<MmaShape<T, KV, D, 4, false>>(args, blocks, stream);
        case Kernel::DECODE: return launch_mma_kernel<MmaShape<T, KV, D, 1, false>>(args, blocks, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <int D>
cudaError_t launch_mma(const Args& args, Kernel kernel, cudaStream_t stream) {
    const bool half = args.dtype == FLAMINGO_FLOAT16;
    if (args.kv_dtype == FLAMINGO_FLOAT8_E4M3)
        return half ? launch_mma_kernel<D, Half, E4m3>(args, kernel, stream) : launch_mma_kernel<D, Bfloat, E4m3>(args, kernel, stream);
    return half ? launch_mma_kernel<D, Half, Half>(args, kernel, stream) : launch_mma_kernel<D, Bfloat, Bfloat>(args, kernel, stream);
}

}  // namespace flamingo
