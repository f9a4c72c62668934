// Kernels of ranges on tensor cores of one head size. Each head size has a source file of its own, so that they compile side by side.
#pragma once

#include "cuda_machine.cuh"
#include "range_choose.h"

namespace flamingo {

// As min_blocks of mma_kernels.cuh: as many blocks as leave nothing to spill. Results are kept from slice to slice.
template <class Shape>
constexpr int range_min_blocks() {
    return Shape::ROW_TILES == 1 ? 4 : Shape::D <= 80 ? 3 : 2;
}

template <class Shape>
__global__ void __launch_bounds__(THREADS, range_min_blocks<Shape>()) range_kernel(const __grid_constant__ RangeArgs args, int splits) {
    __shared__ __align__(128) char shared[Shape::SHARED_BYTES];
    CudaMachine machine(shared);
    RangeBlock<CudaMachine, Shape>(machine, args, splits, blockIdx.x).run();
}

template <class T, class KV>
__global__ void __launch_bounds__(THREADS) join_kernel(const __grid_constant__ RangeArgs args, int splits, int64_t queries) {
    CudaMachine machine(nullptr);
    const int64_t query = int64_t(blockIdx.x) * WARPS + machine.warp();
    if (query < queries) join_warp<T, KV>(machine, args, splits, query);
}

template <class Shape>
cudaError_t launch_range_kernel(const RangeArgs& args, RangeKernel kernel, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(range_kernel<Shape>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    const int splits = splits_of(args, kernel);
    range_kernel<Shape><<<unsigned(unsplit_blocks(args, kernel) * splits), THREADS, 0, stream>>>(args, splits);
    if (splits > 1) {
        const int64_t queries = queries_of(args);
        join_kernel<typename Shape::T, typename Shape::KV><<<unsigned(up(queries, WARPS)), THREADS, 0, stream>>>(args, splits, queries);
    }
    return cudaGetLastError();
}

template <int D, class T, class KV>
cudaError_t launch_range_kernel(const RangeArgs& args, RangeKernel kernel, cudaStream_t stream) {
    return kernel == RangeKernel::DECODE ? launch_range_kernel<MmaShape<T, KV, D, 1, false>>(args, kernel, stream)
                                         : launch_range_kernel<MmaShape<T, KV, D, 4, false>>(args, kernel, stream);
}

template <int D>
cudaError_t launch_range(const RangeArgs& args, RangeKernel kernel, cudaStream_t stream) {
    const bool half = args.dtype == FLAMINGO_FLOAT16;
    if (args.kv_dtype == FLAMINGO_FLOAT8_E4M3)
        return half ? launch_range_kernel<D, Half, E4m3>(args, kernel, stream) : launch_range_kernel<D, Bfloat, E4m3>(args, kernel, stream);
    return half ? launch_range_kernel<D, Half, Half>(args, kernel, stream) : launch_range_kernel<D, Bfloat, Bfloat>(args, kernel, stream);
}

}  // namespace flamingo
