// The two names that phi_cross_attention.h takes from CUDA, so that a machine without CUDA can compile the kernels' code for its CPU.
#pragma once

typedef int cudaError_t;
typedef struct CUstream_st* cudaStream_t;
