#include "fields.h"

#include <cmath>
#include <cstring>

#include "log.h"

namespace flamingo {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

static bool read_scale(const PluginField& field, Fields& fields, Refuse refuse) noexcept {
    if (field.type != PluginFieldType::kFLOAT32 || field.length != 1 || !field.data)
        return refuse("field %s is one float32, found type %d and length %d", SCALE, int(field.type), int(field.length));
    const float scale = *static_cast<const float*>(field.data);
    if (!std::isfinite(scale) || scale <= 0.0f) return refuse("field %s is positive, found %g", SCALE, double(scale));
    fields.scale = scale;
    return true;
}

static bool read_kv_scales(const PluginField& field, Fields& fields, Refuse refuse) noexcept {
    if (field.type != PluginFieldType::kINT32 || field.length != 1 || !field.data)
        return refuse("field %s is one int32, found type %d and length %d", KV_SCALES, int(field.type), int(field.length));
    const int32_t value = *static_cast<const int32_t*>(field.data);
    if (value != 0 && value != 1) return refuse("field %s is 0 or 1, found %d", KV_SCALES, int(value));
    fields.kv_scales = value == 1;
    return true;
}

bool read_fields(const nvinfer1::PluginFieldCollection* collection, Fields& fields, Refuse refuse) noexcept {
    fields = Fields{};
    if (!collection) return true;
    if (collection->nbFields > 0 && !collection->fields) return refuse("%d fields without data", int(collection->nbFields));
    for (int32_t i = 0; i < collection->nbFields; ++i) {
        const PluginField& field = collection->fields[i];
        const char* name = field.name ? field.name : "";
        if (std::strcmp(name, SCALE) == 0) {
            if (!read_scale(field, fields, refuse)) return false;
        } else if (std::strcmp(name, KV_SCALES) == 0) {
            if (!read_kv_scales(field, fields, refuse)) return false;
        } else {
            return refuse("unknown field '%s'; version %s has %s and %s", name, PLUGIN_VERSION, SCALE, KV_SCALES);
        }
    }
    return true;
}

}  // namespace flamingo
