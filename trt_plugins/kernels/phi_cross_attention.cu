#include "phi_cross_attention.h"

#include "choose.h"
#include "cuda_machine.cuh"
#include "fp32_warp.h"

namespace flamingo {

template <int D>
cudaError_t launch_mma(const Args& args, Kernel kernel, cudaStream_t stream);  // mma_kernels_D.cu

template <class KV>
__global__ void __launch_bounds__(THREADS) fp32_kernel(const __grid_constant__ Args args) {
    CudaMachine machine(nullptr);
    const int64_t item = int64_t(blockIdx.x) * WARPS + machine.warp();
    if (item < int64_t(args.batch) * args.positions * args.heads) fp32_warp<KV>(machine, args, item);
}

static cudaError_t launch_fp32(const Args& args, cudaStream_t stream) {
    const unsigned blocks = unsigned(blocks_of(args, Kernel::FP32));
    if (args.kv_dtype == FLAMINGO_FLOAT8_E4M3)
        fp32_kernel<E4m3><<<blocks, THREADS, 0, stream>>>(args);
    else
        fp32_kernel<Single><<<blocks, THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace flamingo

cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t stream) {
    using namespace flamingo;
    const Kernel kernel = args ? choose(*args) : Kernel::REFUSED;
    if (kernel == Kernel::REFUSED) return cudaErrorInvalidValue;
    if (kernel == Kernel::NOTHING) return cudaSuccess;
    if (kernel == Kernel::FP32) return launch_fp32(*args, stream);
    switch (args->head_size) {
        case 32: return launch_mma<32>(*args, kernel, stream);
        case 64: return launch_mma<64>(*args, kernel, stream);
        case 80: return launch_mma<80>(*args, kernel, stream);
        case 96: return launch_mma<96>(*args, kernel, stream);
        default: return launch_mma<128>(*args, kernel, stream);
    }
}

const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args) {
    return args ? flamingo::name_of(flamingo::choose(*args)) : nullptr;
}
