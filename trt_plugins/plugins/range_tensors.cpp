#include "range_tensors.h"

#include <cmath>
#include <cstdint>

#include "log.h"

namespace flamingo::range {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int32_t RANKS[] = {4, 4, 4, 2, 2, 2};

bool takes_type(const Fields& fields, int32_t index, DataType type, DataType q_type) noexcept {
    switch (index) {
        case Q: return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        case K:
        case V: return type == (fields.kv_scales ? DataType::kFP8 : q_type);
        case MEDIA_ROWS:
        case FIRST_MEDIA:
        case PHI: return type == DataType::kINT64;
        default: return type == (index < num_inputs(fields) ? DataType::kFLOAT : q_type);
    }
}

bool check_counts(const Fields& fields, int32_t inputs, int32_t outputs) noexcept {
    if (inputs == num_inputs(fields) && outputs == NUM_OUTPUTS) return true;
    return refuse_range("%d inputs and %d outputs, expected %d and %d (%s=%d)", int(inputs), int(outputs), int(num_inputs(fields)),
                        int(NUM_OUTPUTS), KV_SCALES, int(fields.kv_scales));
}

static bool check_tensor(const Fields& fields, const PluginTensorDesc& tensor, int32_t index, DataType q_type) noexcept {
    const bool output = index == num_inputs(fields);
    const char* name = output ? "y" : input_name(index);
    if (!takes_type(fields, index, tensor.type, q_type)) return refuse_range("%s has type %d, which does not fit", name, int(tensor.type));
    if (tensor.format != TensorFormat::kLINEAR) return refuse_range("%s is not linear (format %d)", name, int(tensor.format));
    const Dims& dims = tensor.dims;
    if (!output && index > PHI) {
        if (dims.nbDims == 0 || (dims.nbDims == 1 && dims.d[0] == 1)) return true;
        return refuse_range("%s is not a scalar", name);
    }
    const int32_t rank = output ? RANKS[Q] : RANKS[index];
    if (dims.nbDims != rank) return refuse_range("%s has %d axes, expected %d", name, int(dims.nbDims), int(rank));
    for (int32_t axis = 0; axis < rank; ++axis)
        if (dims.d[axis] < 0 || dims.d[axis] > INT32_MAX)
            return refuse_range("%s has size %lld on axis %d", name, static_cast<long long>(dims.d[axis]), int(axis));
    return true;
}

static bool check_size(const char* name, const Dims& dims, int32_t axis, int64_t expected) noexcept {
    if (dims.d[axis] == expected) return true;
    return refuse_range("%s has size %lld on axis %d, expected %lld", name, static_cast<long long>(dims.d[axis]), int(axis),
                        static_cast<long long>(expected));
}

bool to_arguments(
    const Fields& fields, const PluginTensorDesc* in, const PluginTensorDesc* out, flamingo_phi_range_cross_attention_args& args) noexcept {
    for (int32_t i = 0; i <= num_inputs(fields); ++i)
        if (!check_tensor(fields, i < num_inputs(fields) ? in[i] : out[0], i, in[Q].type)) return false;
    const Dims &q = in[Q].dims, &k = in[K].dims, &v = in[V].dims, &rows = in[MEDIA_ROWS].dims, &y = out[0].dims;

    args = {};
    args.batch = int32_t(q.d[0]);
    args.positions = int32_t(q.d[1]);
    args.heads = int32_t(q.d[2]);
    args.head_size = int32_t(q.d[3]);
    args.bank_rows = int32_t(k.d[0]);
    args.kv_heads = int32_t(k.d[1]);
    args.keys = int32_t(k.d[2]);
    args.media = int32_t(rows.d[1]);
    args.scale = fields.scale ? *fields.scale : 1.0f / std::sqrt(float(args.head_size));
    args.dtype = to_dtype(in[Q].type);
    args.kv_dtype = to_dtype(in[K].type);

    if (!check_size("k", k, 3, args.head_size)) return false;
    if (args.kv_heads < 1 || args.heads % args.kv_heads)
        return refuse_range("%d heads of k do not divide %d heads of q", int(args.kv_heads), int(args.heads));
    for (int32_t axis = 0; axis < 4; ++axis)
        if (!check_size("v", v, axis, k.d[axis]) || !check_size("y", y, axis, q.d[axis])) return false;
    for (int32_t i : {FIRST_MEDIA, PHI})
        if (!check_size(input_name(i), in[i].dims, 0, args.batch) || !check_size(input_name(i), in[i].dims, 1, args.positions)) return false;
    return check_size("media_rows", rows, 0, args.batch);
}

flamingo_phi_range_cross_attention_args smallest_arguments(int64_t head_size, DataType type, DataType kv_type) noexcept {
    flamingo_phi_range_cross_attention_args args{};
    args.batch = args.positions = args.heads = args.kv_heads = args.keys = args.media = args.bank_rows = 1;
    args.head_size = head_size <= INT32_MAX ? int32_t(head_size) : 0;
    args.scale = 1.0f;
    args.dtype = to_dtype(type);
    args.kv_dtype = to_dtype(kv_type);
    return args;
}

bool has_kernel(flamingo_phi_range_cross_attention_args args) noexcept {
    // The choice looks at shapes, types and alignment, never at what is pointed to.
    alignas(16) static char anywhere[16];
    args.q = args.k = args.v = args.y = args.workspace = anywhere;
    args.media_rows = args.first_media = args.phi = reinterpret_cast<const int64_t*>(anywhere);
    if (flamingo_phi_range_cross_attention_kernel(&args)) return true;
    return refuse_range("no kernel for head size %d, %d heads over %d, %d keys, %d x %d positions, types %d and %d (head sizes: docs/plugin.md)",
                        args.head_size, args.heads, args.kv_heads, args.keys, args.batch, args.positions, int(args.dtype), int(args.kv_dtype));
}

}  // namespace flamingo::range
