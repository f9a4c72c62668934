// The kernels' C interface by way of the plugin library: what a GPU without any library of TensorRT can prove of it. Each call does as
// TensorRT does from building to running: create, agree on formats, configure, serialise, create again, set shapes, enqueue.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "phi_cross_attention.h"

using namespace nvinfer1;

namespace {

IPluginCreatorV3One* creator = nullptr;

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

// Inputs, then the output.
std::vector<PluginTensorDesc> tensors_of(const flamingo_phi_cross_attention_args& a) {
    const PluginTensorDesc q = tensor({a.batch, a.positions, a.heads, a.head_size}, type_of(a.dtype));
    const PluginTensorDesc kv = tensor({a.bank_rows, a.heads, a.latents, a.head_size}, type_of(a.kv_dtype));
    std::vector<PluginTensorDesc> all{q, kv, kv, tensor({a.batch, a.media}, DataType::kINT64), tensor({a.batch, a.positions}, DataType::kINT64)};
    if (a.kv_dtype == FLAMINGO_FLOAT8_E4M3) all.insert(all.end(), 2, tensor({}, DataType::kFLOAT));
    all.push_back(q);
    return all;
}

// The plugin as an engine holds it once it is loaded; nullptr where it refuses, with its reason on stderr.
std::unique_ptr<IPluginV3> loaded(const flamingo_phi_cross_attention_args& args, const std::vector<PluginTensorDesc>& tensors) {
    const int32_t kv_scales = args.kv_dtype == FLAMINGO_FLOAT8_E4M3;
    const PluginField fields[] = {
        {"scale", &args.scale, PluginFieldType::kFLOAT32, 1}, {"kv_scales", &kv_scales, PluginFieldType::kINT32, 1}};
    const PluginFieldCollection given{2, fields};
    std::unique_ptr<IPluginV3> made(creator->createPlugin("layer", &given, TensorRTPhase::kBUILD));
    if (!made) return nullptr;
    auto* build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const PluginTensorDesc& one : tensors) dynamic.push_back({one, one.dims, one.dims, one.dims});
    const int32_t inputs = int32_t(tensors.size()) - 1;
    for (int32_t index = 0; index <= inputs; ++index)
        if (!build->supportsFormatCombination(index, dynamic.data(), inputs, 1)) return nullptr;
    if (build->configurePlugin(dynamic.data(), inputs, &dynamic.back(), 1) != 0) return nullptr;
    if (build->getWorkspaceSize(dynamic.data(), inputs, &dynamic.back(), 1) != 0) return nullptr;

    auto* built = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> read(creator->createPlugin("layer", built->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    if (!read) return nullptr;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(read->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    if (!attached) return nullptr;
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return runtime->onShapeChange(tensors.data(), inputs, &tensors.back(), 1) == 0 ? std::move(attached) : nullptr;
}

const std::string EXPECTED = "flamingo::PhiCrossAttention 1";
std::string fault;

}  // namespace

// Loads the plugin library that the calls below go through. Returns what is wrong with it, or nullptr.
extern "C" const char* flamingo_load_plugin(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (!get_creators || !dlsym(library, "setLoggerFinder")) return "it does not export getCreators and setLoggerFinder";
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return "it has a creator that is not of V3 plugins";
        auto* found = static_cast<IPluginCreatorV3One*>(creators[i]);
        const std::string name = std::string(found->getPluginNamespace()) + "::" + found->getPluginName() + " " + found->getPluginVersion();
        if (name == EXPECTED) creator = found;
        fault += (i ? ", " : "") + name;
    }
    if (!creator) return (fault = "it has " + fault + ", expected " + EXPECTED).c_str();
    return nullptr;
}

extern "C" cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t stream) {
    const std::vector<PluginTensorDesc> tensors = tensors_of(*args);
    const std::unique_ptr<IPluginV3> plugin = loaded(*args, tensors);
    if (!plugin) return cudaErrorInvalidValue;
    const void* const inputs[] = {args->q, args->k, args->v, args->media_rows, args->phi, args->k_scale, args->v_scale};
    void* const outputs[] = {args->y};
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return cudaError_t(runtime->enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, stream));
}

extern "C" const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args) {
    return loaded(*args, tensors_of(*args)) ? "plugin" : nullptr;
}
