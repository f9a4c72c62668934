#include "phi_range_cross_attention.h"

#include "cuda_machine.cuh"
#include "range_choose.h"
#include "range_fp32_warp.h"

namespace flamingo {

template <int D>
cudaError_t launch_range(const RangeArgs& args, RangeKernel kernel, cudaStream_t stream);  // range_kernels_D.cu

template <class KV>
__global__ void __launch_bounds__(THREADS) range_fp32_kernel(const __grid_constant__ RangeArgs args) {
    CudaMachine machine(nullptr);
    const int64_t item = int64_t(blockIdx.x) * WARPS + machine.warp();
    if (item < int64_t(args.batch) * args.positions * args.heads) range_fp32_warp<KV>(machine, args, item);
}

static cudaError_t launch_range_fp32(const RangeArgs& args, cudaStream_t stream) {
    const unsigned blocks = unsigned(unsplit_blocks(args, RangeKernel::FP32));
    if (args.kv_dtype == FLAMINGO_FLOAT8_E4M3)
        range_fp32_kernel<E4m3><<<blocks, THREADS, 0, stream>>>(args);
    else
        range_fp32_kernel<Single><<<blocks, THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace flamingo

size_t flamingo_phi_range_cross_attention_workspace(const flamingo_phi_range_cross_attention_args* args) {
    return args ? flamingo::range_workspace(*args) : 0;
}

cudaError_t flamingo_phi_range_cross_attention(const flamingo_phi_range_cross_attention_args* args, cudaStream_t stream) {
    using namespace flamingo;
    const RangeKernel kernel = args ? range_choose(*args) : RangeKernel::REFUSED;
    if (kernel == RangeKernel::REFUSED) return cudaErrorInvalidValue;
    if (kernel == RangeKernel::NOTHING) return cudaSuccess;
    if (kernel == RangeKernel::FP32) return launch_range_fp32(*args, stream);
    switch (args->head_size) {
        case 32: return launch_range<32>(*args, kernel, stream);
        case 64: return launch_range<64>(*args, kernel, stream);
        case 80: return launch_range<80>(*args, kernel, stream);
        case 96: return launch_range<96>(*args, kernel, stream);
        default: return launch_range<128>(*args, kernel, stream);
    }
}

const char* flamingo_phi_range_cross_attention_kernel(const flamingo_phi_range_cross_attention_args* args) {
    return args ? flamingo::name_of(flamingo::range_choose(*args)) : nullptr;
}
