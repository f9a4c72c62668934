#include "range_plugin.h"

#include <cstdio>
#include <new>

#include "log.h"
#include "range_tensors.h"

namespace flamingo {

using namespace nvinfer1;
using namespace range;

static constexpr int32_t OK = 0;
static constexpr int32_t REFUSED = -1;

PhiRangeCrossAttentionPlugin::PhiRangeCrossAttentionPlugin(const Fields& fields) noexcept : fields_(fields) {
    // The scale changes no time, so engines that differ in it share their timings; other kernels do not.
    std::snprintf(timing_id_, sizeof timing_id_, "range.v%s.kernels%d.kv_scales%d", RANGE_PLUGIN_VERSION, FLAMINGO_KERNELS_VERSION, int(fields.kv_scales));
    char scale[32] = "head_size**-0.5";
    if (fields.scale) std::snprintf(scale, sizeof scale, "%.9g", double(*fields.scale));
    std::snprintf(metadata_, sizeof metadata_, "%s=%s %s=%d kernels=%d", SCALE, scale, KV_SCALES, int(fields.kv_scales), FLAMINGO_KERNELS_VERSION);
}

IPluginCapability* PhiRangeCrossAttentionPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* PhiRangeCrossAttentionPlugin::clone() noexcept {
    auto* copy = new (std::nothrow) PhiRangeCrossAttentionPlugin(fields_);
    if (!copy) refuse_range("no memory for a copy of the plugin");
    return copy;
}

IPluginV3* PhiRangeCrossAttentionPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

int32_t PhiRangeCrossAttentionPlugin::getNbOutputs() const noexcept { return NUM_OUTPUTS; }

int32_t PhiRangeCrossAttentionPlugin::getOutputDataTypes(
    DataType* outputs, int32_t num_outputs, const DataType* inputs, int32_t num_inputs) const noexcept {
    if (!check_counts(fields_, num_inputs, num_outputs)) return REFUSED;
    outputs[0] = inputs[Q];
    return OK;
}

// Whether two sizes differ for certain; sizes known only at run time are compared by onShapeChange.
static bool differ(const IDimensionExpr* a, const IDimensionExpr* b) noexcept {
    return a->isConstant() && b->isConstant() && a->getConstantValue() != b->getConstantValue();
}

int32_t PhiRangeCrossAttentionPlugin::getOutputShapes(
    const DimsExprs* inputs, int32_t num_inputs, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t num_outputs, IExprBuilder&) noexcept {
    if (!check_counts(fields_, num_inputs, num_outputs)) return REFUSED;
    constexpr int32_t ranks[] = {4, 4, 4, 2, 2, 2};
    for (int32_t i = Q; i <= PHI; ++i)
        if (inputs[i].nbDims != ranks[i]) {
            refuse_range("%s has %d axes, expected %d", input_name(i), int(inputs[i].nbDims), int(ranks[i]));
            return REFUSED;
        }
    const DimsExprs &q = inputs[Q], &k = inputs[K], &v = inputs[V];
    if (differ(k.d[1], v.d[1]) || differ(q.d[3], k.d[3]) || differ(q.d[3], v.d[3])) {
        refuse_range("heads of k and v [N,Hk,R,D], or head sizes of them and q [B,S,H,D], differ");
        return REFUSED;
    }
    outputs[0] = q;
    return OK;
}

bool PhiRangeCrossAttentionPlugin::supportsFormatCombination(
    int32_t index, const DynamicPluginTensorDesc* tensors, int32_t num_inputs, int32_t num_outputs) noexcept {
    if (!check_counts(fields_, num_inputs, num_outputs) || index < 0 || index >= num_inputs + num_outputs) return false;
    const PluginTensorDesc& tensor = tensors[index].desc;
    return tensor.format == TensorFormat::kLINEAR && takes_type(fields_, index, tensor.type, tensors[Q].desc.type);
}

// Sizes may still be unknown here; head size and types are not.
int32_t PhiRangeCrossAttentionPlugin::configurePlugin(
    const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
    if (!check_counts(fields_, num_inputs, num_outputs)) return REFUSED;
    const PluginTensorDesc &q = in[Q].desc, &k = in[K].desc;
    if (q.dims.nbDims != 4 || q.dims.d[3] < 0) return OK;
    return has_kernel(smallest_arguments(q.dims.d[3], q.type, k.type)) ? OK : REFUSED;
}

// Of the largest sizes of the profile: keys are split over blocks, whose partial results lie there until they are joined.
size_t PhiRangeCrossAttentionPlugin::getWorkspaceSize(
    const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc* out, int32_t num_outputs) const noexcept {
    if (!check_counts(fields_, num_inputs, num_outputs)) return 0;
    PluginTensorDesc inputs[V_SCALE + 1], y = out[0].desc;
    for (int32_t i = 0; i < num_inputs; ++i) {
        inputs[i] = in[i].desc;
        inputs[i].dims = in[i].max;
    }
    y.dims = out[0].max;
    flamingo_phi_range_cross_attention_args args;
    return to_arguments(fields_, inputs, &y, args) ? flamingo_phi_range_cross_attention_workspace(&args) : 0;
}

// Called with the sizes of a profile's optimum when building and whenever sizes change when running: the place for every check.
int32_t PhiRangeCrossAttentionPlugin::onShapeChange(
    const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc* out, int32_t num_outputs) noexcept {
    flamingo_phi_range_cross_attention_args args;
    const bool fits = check_counts(fields_, num_inputs, num_outputs) && to_arguments(fields_, in, out, args) && has_kernel(args);
    return fits ? OK : REFUSED;
}

int32_t PhiRangeCrossAttentionPlugin::enqueue(
    const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream) noexcept {
    flamingo_phi_range_cross_attention_args args;
    if (!to_arguments(fields_, in, out, args)) return REFUSED;
    args.q = inputs[Q];
    args.k = inputs[K];
    args.v = inputs[V];
    args.media_rows = static_cast<const int64_t*>(inputs[MEDIA_ROWS]);
    args.first_media = static_cast<const int64_t*>(inputs[FIRST_MEDIA]);
    args.phi = static_cast<const int64_t*>(inputs[PHI]);
    if (fields_.kv_scales) {
        args.k_scale = static_cast<const float*>(inputs[K_SCALE]);
        args.v_scale = static_cast<const float*>(inputs[V_SCALE]);
    }
    args.y = outputs[0];
    args.workspace = workspace;
    const cudaError_t error = flamingo_phi_range_cross_attention(&args, stream);
    if (error == cudaSuccess) return OK;
    refuse_range("%s (%s) for q [%d,%d,%d,%d], k and v [%d,%d,%d,%d], %d media", cudaGetErrorString(error), cudaGetErrorName(error), args.batch,
                 args.positions, args.heads, args.head_size, args.bank_rows, args.kv_heads, args.keys, args.head_size, args.media);
    return int32_t(error);
}

const PluginFieldCollection* PhiRangeCrossAttentionPlugin::getFieldsToSerialize() noexcept {
    kv_scales_ = fields_.kv_scales;
    serialized_[0] = PluginField(KV_SCALES, &kv_scales_, PluginFieldType::kINT32, 1);
    collection_ = {1, serialized_};
    if (fields_.scale) {
        scale_ = *fields_.scale;
        serialized_[1] = PluginField(SCALE, &scale_, PluginFieldType::kFLOAT32, 1);
        collection_.nbFields = 2;
    }
    return &collection_;
}

}  // namespace flamingo
