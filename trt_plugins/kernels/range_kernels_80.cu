#include "range_kernels.cuh"

template cudaError_t flamingo::launch_range<80>(const flamingo::RangeArgs&, flamingo::RangeKernel, cudaStream_t);
