// The C interface of both kernels by way of the plugin library: what a GPU without any library of TensorRT can prove of it. Each call does as
// TensorRT does from building to running: create, agree on formats, configure, serialise, create again, set shapes, enqueue.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "phi_range_cross_attention.h"

using namespace nvinfer1;

namespace {

const std::string EXPECTED[] = {"flamingo::PhiCrossAttention 1", "flamingo::PhiRangeCrossAttention 1"};
IPluginCreatorV3One* creators[] = {nullptr, nullptr};  // of those
std::string fault;

DataType type_of(flamingo_dtype dtype) {
    switch (dtype) {
        case FLAMINGO_FLOAT32: return DataType::kFLOAT;
        case FLAMINGO_FLOAT16: return DataType::kHALF;
        case FLAMINGO_BFLOAT16: return DataType::kBF16;
        case FLAMINGO_FLOAT8_E4M3: return DataType::kFP8;
    }
    return DataType::kINT8;  // the plugin takes it nowhere
}

PluginTensorDesc tensor(const std::vector<int64_t>& sizes, DataType type) {
    Dims dims{};
    dims.nbDims = int32_t(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return {dims, type, TensorFormat::kLINEAR, 1.0f};
}

// A call as TensorRT sees it: the creator, its fields, and what it is given: inputs, then the output.
struct Call {
    IPluginCreatorV3One* creator;
    float scale;
    int32_t kv_scales;
    std::vector<PluginTensorDesc> tensors;

    int32_t inputs() const { return int32_t(tensors.size()) - 1; }
};

Call call_of(const flamingo_phi_cross_attention_args& a) {
    const PluginTensorDesc q = tensor({a.batch, a.positions, a.heads, a.head_size}, type_of(a.dtype));
    const PluginTensorDesc kv = tensor({a.bank_rows, a.heads, a.latents, a.head_size}, type_of(a.kv_dtype));
    Call call{creators[0], a.scale, a.kv_dtype == FLAMINGO_FLOAT8_E4M3, {q, kv, kv}};
    call.tensors.push_back(tensor({a.batch, a.media}, DataType::kINT64));
    call.tensors.push_back(tensor({a.batch, a.positions}, DataType::kINT64));
    if (call.kv_scales) call.tensors.insert(call.tensors.end(), 2, tensor({}, DataType::kFLOAT));
    call.tensors.push_back(q);
    return call;
}

Call call_of(const flamingo_phi_range_cross_attention_args& a) {
    const PluginTensorDesc q = tensor({a.batch, a.positions, a.heads, a.head_size}, type_of(a.dtype));
    const PluginTensorDesc kv = tensor({a.bank_rows, a.kv_heads, a.keys, a.head_size}, type_of(a.kv_dtype));
    Call call{creators[1], a.scale, a.kv_dtype == FLAMINGO_FLOAT8_E4M3, {q, kv, kv}};
    call.tensors.push_back(tensor({a.batch, a.media}, DataType::kINT64));
    call.tensors.insert(call.tensors.end(), 2, tensor({a.batch, a.positions}, DataType::kINT64));
    if (call.kv_scales) call.tensors.insert(call.tensors.end(), 2, tensor({}, DataType::kFLOAT));
    call.tensors.push_back(q);
    return call;
}

// The plugin as an engine holds it once it is loaded, and the workspace that it asked for when it was built; nullptr where it refuses, with
// its reason on stderr.
std::unique_ptr<IPluginV3> loaded(const Call& call, size_t& workspace) {
    const PluginField fields[] = {
        {"scale", &call.scale, PluginFieldType::kFLOAT32, 1}, {"kv_scales", &call.kv_scales, PluginFieldType::kINT32, 1}};
    const PluginFieldCollection given{2, fields};
    std::unique_ptr<IPluginV3> made(call.creator->createPlugin("layer", &given, TensorRTPhase::kBUILD));
    if (!made) return nullptr;
    auto* build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const PluginTensorDesc& one : call.tensors) dynamic.push_back({one, one.dims, one.dims, one.dims});
    const int32_t inputs = call.inputs();
    for (int32_t index = 0; index <= inputs; ++index)
        if (!build->supportsFormatCombination(index, dynamic.data(), inputs, 1)) return nullptr;
    if (build->configurePlugin(dynamic.data(), inputs, &dynamic.back(), 1) != 0) return nullptr;
    workspace = build->getWorkspaceSize(dynamic.data(), inputs, &dynamic.back(), 1);

    auto* built = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> read(call.creator->createPlugin("layer", built->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    if (!read) return nullptr;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(read->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    if (!attached) return nullptr;
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return runtime->onShapeChange(call.tensors.data(), inputs, &call.tensors.back(), 1) == 0 ? std::move(attached) : nullptr;
}

std::unique_ptr<IPluginV3> loaded(const flamingo_phi_cross_attention_args& args) {
    size_t workspace = 0;
    std::unique_ptr<IPluginV3> plugin = loaded(call_of(args), workspace);
    return workspace == 0 ? std::move(plugin) : nullptr;  // the kernels want none
}

cudaError_t enqueue(IPluginV3& plugin, const Call& call, const void* const* inputs, void* y, void* workspace, cudaStream_t stream) {
    void* const outputs[] = {y};
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return cudaError_t(runtime->enqueue(call.tensors.data(), &call.tensors.back(), inputs, outputs, workspace, stream));
}

}  // namespace

// Loads the plugin library that the calls below go through. Returns what is wrong with it, or nullptr.
extern "C" const char* flamingo_load_plugin(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (!get_creators || !dlsym(library, "setLoggerFinder")) return "it does not export getCreators and setLoggerFinder";
    creators[0] = creators[1] = nullptr;
    fault.clear();
    int32_t count = 0;
    IPluginCreatorInterface* const* given = get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(given[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return "it has a creator that is not of V3 plugins";
        auto* found = static_cast<IPluginCreatorV3One*>(given[i]);
        const std::string name = std::string(found->getPluginNamespace()) + "::" + found->getPluginName() + " " + found->getPluginVersion();
        for (int32_t kind = 0; kind < 2; ++kind)
            if (name == EXPECTED[kind]) creators[kind] = found;
        fault += (i ? ", " : "") + name;
    }
    if (!creators[0] || !creators[1]) return (fault = "it has " + fault + ", expected " + EXPECTED[0] + " and " + EXPECTED[1]).c_str();
    return nullptr;
}

extern "C" cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t stream) {
    const std::unique_ptr<IPluginV3> plugin = loaded(*args);
    if (!plugin) return cudaErrorInvalidValue;
    const void* const inputs[] = {args->q, args->k, args->v, args->media_rows, args->phi, args->k_scale, args->v_scale};
    return enqueue(*plugin, call_of(*args), inputs, args->y, nullptr, stream);
}

extern "C" const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args) {
    return loaded(*args) ? "plugin" : nullptr;
}

// What the plugin asks TensorRT for when an engine is built.
extern "C" size_t flamingo_phi_range_cross_attention_workspace(const flamingo_phi_range_cross_attention_args* args) {
    size_t workspace = 0;
    return loaded(call_of(*args), workspace) ? workspace : 0;
}

extern "C" cudaError_t flamingo_phi_range_cross_attention(const flamingo_phi_range_cross_attention_args* args, cudaStream_t stream) {
    size_t workspace = 0;
    const Call call = call_of(*args);
    const std::unique_ptr<IPluginV3> plugin = loaded(call, workspace);
    if (!plugin) return cudaErrorInvalidValue;
    const void* const inputs[] = {args->q, args->k, args->v, args->media_rows, args->first_media, args->phi, args->k_scale, args->v_scale};
    return enqueue(*plugin, call, inputs, args->y, args->workspace, stream);
}

extern "C" const char* flamingo_phi_range_cross_attention_kernel(const flamingo_phi_range_cross_attention_args* args) {
    size_t workspace = 0;
    return loaded(call_of(*args), workspace) ? "plugin" : nullptr;
}
