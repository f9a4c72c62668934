#include "mma_kernels.cuh"

template cudaError_t flamingo::launch_mma<128>(const flamingo::Args&, flamingo::Kernel, cudaStream_t);
