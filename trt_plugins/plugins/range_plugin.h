// flamingo::PhiRangeCrossAttention, version 1, as TensorRT sees it. Immutable: clones and contexts share nothing.
#pragma once

#include <NvInferRuntime.h>

#include "fields.h"

namespace flamingo {

class PhiRangeCrossAttentionPlugin final : public nvinfer1::IPluginV3,
                                           public nvinfer1::IPluginV3OneCore,
                                           public nvinfer1::IPluginV3OneBuild,
                                           public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PhiRangeCrossAttentionPlugin(const Fields& fields) noexcept;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return RANGE_PLUGIN_NAME; }
    const char* getPluginVersion() const noexcept override { return RANGE_PLUGIN_VERSION; }
    const char* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(
        nvinfer1::DataType* outputs, int32_t num_outputs, const nvinfer1::DataType* inputs, int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(
        const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
        nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(
        int32_t index, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t configurePlugin(
        const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs, const nvinfer1::DynamicPluginTensorDesc* out,
        int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(
        const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs, const nvinfer1::DynamicPluginTensorDesc* out,
        int32_t num_outputs) const noexcept override;
    const char* getTimingCacheID() noexcept override { return timing_id_; }
    const char* getMetadataString() noexcept override { return metadata_; }

    int32_t onShapeChange(
        const nvinfer1::PluginTensorDesc* in, int32_t num_inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t num_outputs) noexcept override;
    int32_t enqueue(
        const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out, const void* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    Fields fields_;
    char timing_id_[56];
    char metadata_[96];
    // What getFieldsToSerialize points to.
    float scale_ = 0.0f;
    int32_t kv_scales_ = 0;
    nvinfer1::PluginField serialized_[2];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace flamingo
