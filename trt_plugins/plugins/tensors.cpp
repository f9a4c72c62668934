#include "tensors.h"

#include <cmath>
#include <cstdint>

#include "log.h"

namespace flamingo {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

bool takes_type(const Fields& fields, int32_t index, DataType type, DataType q_type) noexcept {
    switch (index) {
        case Q: return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        case K:
        case V: return type == (fields.kv_scales ? DataType::kFP8 : q_type);
        case MEDIA_ROWS:
        case PHI: return type == DataType::kINT64;
        default: return type == (index < num_inputs(fields) ? DataType::kFLOAT : q_type);
    }
}

bool check_counts(const Fields& fields, int32_t inputs, int32_t outputs) noexcept {
    if (inputs == num_inputs(fields) && outputs == NUM_OUTPUTS) return true;
    return refuse("%d inputs and %d outputs, expected %d and %d (%s=%d)", int(inputs), int(outputs), int(num_inputs(fields)),
                  int(NUM_OUTPUTS), KV_SCALES, int(fields.kv_scales));
}

flamingo_dtype to_dtype(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT: return FLAMINGO_FLOAT32;
        case DataType::kHALF: return FLAMINGO_FLOAT16;
        case DataType::kBF16: return FLAMINGO_BFLOAT16;
        default: return FLAMINGO_FLOAT8_E4M3;
    }
}

static bool check_types(const Fields& fields, const PluginTensorDesc* in, const PluginTensorDesc& y) noexcept {
    const int32_t count = num_inputs(fields);
    for (int32_t i = 0; i <= count; ++i) {
        const PluginTensorDesc& tensor = i < count ? in[i] : y;
        const char* name = i < count ? input_name(i) : "y";
        if (!takes_type(fields, i, tensor.type, in[Q].type)) return refuse("%s has type %d, which does not fit", name, int(tensor.type));
        if (tensor.format != TensorFormat::kLINEAR) return refuse("%s is not linear (format %d)", name, int(tensor.format));
    }
    return true;
}

static bool check_rank(const char* name, const Dims& dims, int32_t rank) noexcept {
    if (dims.nbDims != rank) return refuse("%s has %d axes, expected %d", name, int(dims.nbDims), int(rank));
    for (int32_t axis = 0; axis < rank; ++axis)
        if (dims.d[axis] < 0 || dims.d[axis] > INT32_MAX)
            return refuse("%s has size %lld on axis %d", name, static_cast<long long>(dims.d[axis]), int(axis));
    return true;
}

static bool check_size(const char* name, const Dims& dims, int32_t axis, int32_t expected) noexcept {
    if (dims.d[axis] == expected) return true;
    return refuse("%s has size %lld on axis %d, expected %d", name, static_cast<long long>(dims.d[axis]), int(axis), int(expected));
}

static bool check_scalar(const char* name, const Dims& dims) noexcept {
    if (dims.nbDims == 0 || (dims.nbDims == 1 && dims.d[0] == 1)) return true;
    return refuse("%s is not a scalar", name);
}

bool to_arguments(
    const Fields& fields, const PluginTensorDesc* in, const PluginTensorDesc* out, flamingo_phi_cross_attention_args& args) noexcept {
    if (!check_types(fields, in, out[0])) return false;
    const Dims &q = in[Q].dims, &k = in[K].dims, &v = in[V].dims, &rows = in[MEDIA_ROWS].dims, &phi = in[PHI].dims, &y = out[0].dims;
    if (!check_rank("q", q, 4) || !check_rank("k", k, 4) || !check_rank("v", v, 4) || !check_rank("media_rows", rows, 2) ||
        !check_rank("phi", phi, 2) || !check_rank("y", y, 4))
        return false;
    if (fields.kv_scales && (!check_scalar("k_scale", in[K_SCALE].dims) || !check_scalar("v_scale", in[V_SCALE].dims))) return false;

    args = {};
    args.batch = int32_t(q.d[0]);
    args.positions = int32_t(q.d[1]);
    args.heads = int32_t(q.d[2]);
    args.head_size = int32_t(q.d[3]);
    args.bank_rows = int32_t(k.d[0]);
    args.latents = int32_t(k.d[2]);
    args.media = int32_t(rows.d[1]);
    args.scale = fields.scale ? *fields.scale : 1.0f / std::sqrt(float(args.head_size));
    args.dtype = to_dtype(in[Q].type);
    args.kv_dtype = to_dtype(in[K].type);

    if (!check_size("k", k, 1, args.heads) || !check_size("k", k, 3, args.head_size)) return false;
    for (int32_t axis = 0; axis < 4; ++axis)
        if (!check_size("v", v, axis, int32_t(k.d[axis])) || !check_size("y", y, axis, int32_t(q.d[axis]))) return false;
    return check_size("media_rows", rows, 0, args.batch) && check_size("phi", phi, 0, args.batch) &&
           check_size("phi", phi, 1, args.positions);
}

flamingo_phi_cross_attention_args smallest_arguments(int64_t head_size, DataType type, DataType kv_type) noexcept {
    flamingo_phi_cross_attention_args args{};
    args.batch = args.positions = args.heads = args.latents = args.media = args.bank_rows = 1;
    args.head_size = head_size <= INT32_MAX ? int32_t(head_size) : 0;
    args.scale = 1.0f;
    args.dtype = to_dtype(type);
    args.kv_dtype = to_dtype(kv_type);
    return args;
}

bool has_kernel(flamingo_phi_cross_attention_args args) noexcept {
    // The choice looks at shapes, types and alignment, never at what is pointed to.
    alignas(16) static char anywhere[16];
    args.q = args.k = args.v = args.y = anywhere;
    args.media_rows = args.phi = reinterpret_cast<const int64_t*>(anywhere);
    if (flamingo_phi_cross_attention_kernel(&args)) return true;
    return refuse("no kernel for head size %d, %d heads, %d latents, %d x %d positions, types %d and %d (head sizes: docs/plugin.md)",
                  args.head_size, args.heads, args.latents, args.batch, args.positions, int(args.dtype), int(args.kv_dtype));
}

}  // namespace flamingo
