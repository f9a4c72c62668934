#include "range_kernels.cuh"

template cudaError_t flamingo::launch_range<96>(const flamingo::RangeArgs&, flamingo::RangeKernel, cudaStream_t);
