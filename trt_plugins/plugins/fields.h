// The fields that a plugin is created from, in the build phase by the parser, in the runtime phase from the engine.
#pragma once

#include <NvInferRuntime.h>

#include <optional>

#include "log.h"
#include "version_check.h"

namespace flamingo {

constexpr const char* PLUGIN_NAME = "PhiCrossAttention";
constexpr const char* PLUGIN_VERSION = "1";
constexpr const char* RANGE_PLUGIN_NAME = "PhiRangeCrossAttention";
constexpr const char* RANGE_PLUGIN_VERSION = "1";
constexpr const char* PLUGIN_NAMESPACE = "flamingo";

constexpr const char* SCALE = "scale";          // float32, of q . k; absent: head_size ** -0.5
constexpr const char* KV_SCALES = "kv_scales";  // int32, 1: k and v are FP8 (E4M3) and the inputs k_scale, v_scale follow; absent: 0

struct Fields {
    std::optional<float> scale;
    bool kv_scales = false;
};

// False, with the reason logged by `report`, for an unknown field, a wrong type or length, a scale that is not positive.
bool read_fields(const nvinfer1::PluginFieldCollection* collection, Fields& fields, Refuse report = refuse) noexcept;

}  // namespace flamingo
