// The tensors of PhiRangeCrossAttention: which types they have, and what they are in the launcher's terms.
//
//   0 q [B,S,H,D]   1, 2 k, v [N,Hk,R,D]   3 media_rows int64 [B,M]   4 first_media int64 [B,S]   5 phi int64 [B,S]
//   (6, 7 k_scale, v_scale float32 [] or [1])   y as q
#pragma once

#include <NvInferRuntime.h>

#include "fields.h"
#include "phi_range_cross_attention.h"

namespace flamingo {

flamingo_dtype to_dtype(nvinfer1::DataType type) noexcept;  // of tensors.h, whose inputs have other numbers

namespace range {

constexpr int32_t NUM_OUTPUTS = 1;

enum Input { Q, K, V, MEDIA_ROWS, FIRST_MEDIA, PHI, K_SCALE, V_SCALE };

constexpr int32_t num_inputs(const Fields& fields) { return fields.kv_scales ? V_SCALE + 1 : PHI + 1; }

constexpr const char* input_name(int32_t index) {
    constexpr const char* names[] = {"q", "k", "v", "media_rows", "first_media", "phi", "k_scale", "v_scale"};
    return names[index];
}

// As their namesakes there.
bool takes_type(const Fields& fields, int32_t index, nvinfer1::DataType type, nvinfer1::DataType q_type) noexcept;
bool check_counts(const Fields& fields, int32_t inputs, int32_t outputs) noexcept;
bool to_arguments(
    const Fields& fields, const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    flamingo_phi_range_cross_attention_args& args) noexcept;
flamingo_phi_range_cross_attention_args smallest_arguments(int64_t head_size, nvinfer1::DataType type, nvinfer1::DataType kv_type) noexcept;
bool has_kernel(flamingo_phi_range_cross_attention_args args) noexcept;

}  // namespace range

}  // namespace flamingo
