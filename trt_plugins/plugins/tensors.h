// The plugin's tensors: which types they have, and what they are in the launcher's terms.
//
//   0 q [B,S,H,D]   1, 2 k, v [N,H,R,D]   3 media_rows int64 [B,M]   4 phi int64 [B,S]   (5, 6 k_scale, v_scale float32 [] or [1])   y as q
#pragma once

#include <NvInferRuntime.h>

#include "fields.h"
#include "phi_cross_attention.h"

namespace flamingo {

enum Input { Q, K, V, MEDIA_ROWS, PHI, K_SCALE, V_SCALE };

constexpr int32_t NUM_OUTPUTS = 1;

constexpr int32_t num_inputs(const Fields& fields) { return fields.kv_scales ? V_SCALE + 1 : PHI + 1; }

constexpr const char* input_name(int32_t index) {
    constexpr const char* names[] = {"q", "k", "v", "media_rows", "phi", "k_scale", "v_scale"};
    return names[index];
}

// Whether `type` may stand at an input, or at the output (index num_inputs), given the type of q.
bool takes_type(const Fields& fields, int32_t index, nvinfer1::DataType type, nvinfer1::DataType q_type) noexcept;

// False, with the reason logged, for another number of inputs or outputs.
bool check_counts(const Fields& fields, int32_t inputs, int32_t outputs) noexcept;

flamingo_dtype to_dtype(nvinfer1::DataType type) noexcept;

// Fills everything but the pointers. False, with the reason logged, where ranks, sizes or types do not fit each other.
bool to_arguments(
    const Fields& fields, const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    flamingo_phi_cross_attention_args& args) noexcept;

// One of everything but the head size.
flamingo_phi_cross_attention_args smallest_arguments(int64_t head_size, nvinfer1::DataType type, nvinfer1::DataType kv_type) noexcept;

// False, with the reason logged, where no kernel takes these shapes and types. The pointers do not matter.
bool has_kernel(flamingo_phi_cross_attention_args args) noexcept;

}  // namespace flamingo
