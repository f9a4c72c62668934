/* flamingo::PhiRangeCrossAttention on CUDA: every position attends to the keys of a range of media, first_media .. phi.
 *
 *   y[b,s,h,:] = softmax_j(scale * q[b,s,h,:] . K_j) V_j     over all keys j of the rows media_rows[b, m - 1], first_media[b,s] <= m <= phi[b,s],
 *                                                           of head h / (heads / kv_heads)
 *   y[b,s,h,:] = 0 where phi[b,s] = 0
 *
 * For media of many keys, a tile of an image say. The keys of a range are split over blocks where there are few queries; partial results
 * then lie in a workspace until a second kernel joins them. As phi_cross_attention.h otherwise: no allocation, no synchronisation.
 */
#ifndef FLAMINGO_PHI_RANGE_CROSS_ATTENTION_H
#define FLAMINGO_PHI_RANGE_CROSS_ATTENTION_H

#include "phi_cross_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* All arrays are dense, in device memory, last axis fastest, 16-byte aligned. */
typedef struct flamingo_phi_range_cross_attention_args {
    const void* q;              /* [batch, positions, heads, head_size], dtype */
    const void* k;              /* [bank_rows, kv_heads, keys, head_size], kv_dtype */
    const void* v;              /* as k */
    const int64_t* media_rows;  /* [batch, media], each in 0 .. bank_rows - 1 */
    const int64_t* first_media; /* [batch, positions], the first medium that a position sees, from 1 */
    const int64_t* phi;         /* [batch, positions], the last one; 0: no medium */
    const float* k_scale;       /* as in phi_cross_attention.h */
    const float* v_scale;
    void* y;                    /* as q */
    void* workspace;            /* flamingo_phi_range_cross_attention_workspace bytes; may be NULL where that is 0 */
    int32_t batch, positions, heads, kv_heads, head_size, keys, media, bank_rows;
    float scale;
    flamingo_dtype dtype;       /* of q and y: float32, float16 or bfloat16 */
    flamingo_dtype kv_dtype;    /* of k and v: dtype, or FLAMINGO_FLOAT8_E4M3 */
} flamingo_phi_range_cross_attention_args;

/* Bytes of the workspace that suffice for a call of these sizes, and for every call none of whose sizes is larger. */
size_t flamingo_phi_range_cross_attention_workspace(const flamingo_phi_range_cross_attention_args* args);

/* Enqueues the computation on `stream`: one kernel, or two. Head sizes 32, 64, 80, 96 and 128; kv_heads divides heads.
 * A range or a row out of range counts as "no medium", and is never read.
 * Returns cudaErrorInvalidValue for arguments that it does not take, otherwise what the launches returned. */
cudaError_t flamingo_phi_range_cross_attention(const flamingo_phi_range_cross_attention_args* args, cudaStream_t stream);

/* Which kernel the call above would choose, as a static string: `range`, `range_decode` (at most 16 queries of a head of keys), `range_fp32`,
 * `nothing`; NULL if it would refuse. */
const char* flamingo_phi_range_cross_attention_kernel(const flamingo_phi_range_cross_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif
