#include "mma_kernels.cuh"

template cudaError_t flamingo::launch_mma<32>(const flamingo::Args&, flamingo::Kernel, cudaStream_t);
