/* flamingo::PhiCrossAttention on CUDA: every position attends to the latents of its own medium.
 *
 *   y[b,s,h,:] = softmax_r(scale * q[b,s,h,:] . k[row,h,r,:]) v[row,h,r,:]    row = media_rows[b, phi[b,s] - 1]
 *   y[b,s,h,:] = 0 where phi[b,s] = 0
 *
 * A plain C interface over raw device pointers: for the TensorRT plugin, for tests and for other hosts. Nothing here allocates device
 * memory or synchronises, so a call may be captured in a CUDA graph.
 */
#ifndef FLAMINGO_PHI_CROSS_ATTENTION_H
#define FLAMINGO_PHI_CROSS_ATTENTION_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAMINGO_KERNELS_VERSION 1

typedef enum flamingo_dtype {
    FLAMINGO_FLOAT32 = 0,
    FLAMINGO_FLOAT16 = 1,
    FLAMINGO_BFLOAT16 = 2,
    FLAMINGO_FLOAT8_E4M3 = 3 /* k and v only */
} flamingo_dtype;

/* All arrays are dense, in device memory, last axis fastest, 16-byte aligned. */
typedef struct flamingo_phi_cross_attention_args {
    const void* q;             /* [batch, positions, heads, head_size], dtype */
    const void* k;             /* [bank_rows, heads, latents, head_size], kv_dtype */
    const void* v;             /* as k */
    const int64_t* media_rows; /* [batch, media], each in 0 .. bank_rows - 1 */
    const int64_t* phi;        /* [batch, positions], 0: no medium, n: the n-th medium of the row */
    const float* k_scale;      /* one number on the device, by which stored k is multiplied; NULL: 1. FP8 only */
    const float* v_scale;      /* as k_scale, for v */
    void* y;                   /* as q */
    int32_t batch, positions, heads, head_size, latents, media, bank_rows;
    float scale;               /* of the products, as a rule head_size ** -0.5 */
    flamingo_dtype dtype;      /* of q and y: float32, float16 or bfloat16 */
    flamingo_dtype kv_dtype;   /* of k and v: dtype, or FLAMINGO_FLOAT8_E4M3 */
} flamingo_phi_cross_attention_args;

/* Enqueues the computation on `stream`. Head sizes 32, 64, 80, 96 and 128; any number of latents, positions and media.
 * phi or a row out of range is treated as "no medium" (zeros), never read.
 * Returns cudaErrorInvalidValue for arguments that it does not take, otherwise what the launch returned. */
cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t stream);

/* Which kernel the call above would choose, as a static string: `prefill`, `prefill_sliced` (more than 64 latents), `decode` (at most 16
 * positions), `fp32`, `nothing` (no positions); NULL if it would refuse. */
const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif
