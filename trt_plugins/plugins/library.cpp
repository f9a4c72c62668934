// The library's two entry points, by which TensorRT's registry takes its creators and gives it a logger. Nothing registers itself at load:
// REGISTER_TENSORRT_PLUGIN would need a TensorRT symbol and would drop the namespace.
#include <NvInferRuntime.h>

#include <new>

#include "fields.h"
#include "log.h"
#include "plugin.h"
#include "range_plugin.h"

namespace flamingo {

using namespace nvinfer1;

namespace {

// The parser passes those of a node's attributes that are named here; both plugins have the same.
const PluginFieldCollection* field_names() noexcept {
    static const PluginField fields[] = {{SCALE, nullptr, PluginFieldType::kFLOAT32, 1}, {KV_SCALES, nullptr, PluginFieldType::kINT32, 1}};
    static const PluginFieldCollection collection{2, fields};
    return &collection;
}

class PhiCrossAttentionCreator final : public IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return PLUGIN_NAME; }
    const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
    const char* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }

    const PluginFieldCollection* getFieldNames() noexcept override { return field_names(); }

    IPluginV3* createPlugin(const char*, const PluginFieldCollection* collection, TensorRTPhase) noexcept override {
        Fields fields;
        if (!read_fields(collection, fields)) return nullptr;
        auto* plugin = new (std::nothrow) PhiCrossAttentionPlugin(fields);
        if (!plugin) refuse("no memory for the plugin");
        return plugin;
    }
};

class PhiRangeCrossAttentionCreator final : public IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return RANGE_PLUGIN_NAME; }
    const char* getPluginVersion() const noexcept override { return RANGE_PLUGIN_VERSION; }
    const char* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }
    const PluginFieldCollection* getFieldNames() noexcept override { return field_names(); }

    IPluginV3* createPlugin(const char*, const PluginFieldCollection* collection, TensorRTPhase) noexcept override {
        Fields fields;
        if (!read_fields(collection, fields, refuse_range)) return nullptr;
        auto* plugin = new (std::nothrow) PhiRangeCrossAttentionPlugin(fields);
        if (!plugin) refuse_range("no memory for the plugin");
        return plugin;
    }
};

}  // namespace

}  // namespace flamingo

#define FLAMINGO_EXPORT extern "C" __attribute__((visibility("default")))

FLAMINGO_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static flamingo::PhiCrossAttentionCreator creator;
    static flamingo::PhiRangeCrossAttentionCreator range_creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator, &range_creator};
    count = 2;
    return creators;
}

FLAMINGO_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { flamingo::set_logger_finder(finder); }
