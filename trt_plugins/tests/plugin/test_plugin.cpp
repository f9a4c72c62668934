// Drives the plugin library as TensorRT would, without TensorRT and without a GPU: test_plugin libflamingo_plugins.so
// The library must be linked to the fake launcher.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fake_launcher.h"

using namespace nvinfer1;

static int passed = 0, failed = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (condition) {                                                         \
            ++passed;                                                            \
        } else {                                                                 \
            ++failed;                                                            \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
        }                                                                        \
    } while (0)

// What the plugin logs, and a finder that hands out the logger.
struct Log final : ILogger {
    std::vector<std::string> errors;
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kERROR) errors.emplace_back(text);
    }
    bool said(const char* part) const { return !errors.empty() && errors.back().find(part) != std::string::npos; }
};

struct Finder final : ILoggerFinder {
    ILogger* logger = nullptr;
    bool throws = false;
    ILogger* findLogger() override {
        if (throws) throw 1;
        return logger;
    }
};

static Log log_;
static IPluginCreatorV3One* creator = nullptr;

static std::unique_ptr<IPluginV3> create(std::vector<PluginField> fields = {}, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    const PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(creator->createPlugin("layer", &collection, phase));
}

static const int32_t ONE = 1;

static std::unique_ptr<IPluginV3> create_fp8() { return create({{"kv_scales", &ONE, PluginFieldType::kINT32, 1}}); }

template <class T>
static T* part(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<T*>(plugin.getCapabilityInterface(type));
}
static IPluginV3OneCore* core(IPluginV3& p) { return part<IPluginV3OneCore>(p, PluginCapabilityType::kCORE); }
static IPluginV3OneBuild* build(IPluginV3& p) { return part<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD); }
static IPluginV3OneRuntime* runtime(IPluginV3& p) { return part<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME); }

static Dims dims(std::vector<int64_t> sizes) {
    Dims made{};
    made.nbDims = int32_t(sizes.size());
    std::copy(sizes.begin(), sizes.end(), made.d);
    return made;
}

static PluginTensorDesc tensor(std::vector<int64_t> sizes, DataType type) { return {dims(sizes), type, TensorFormat::kLINEAR, 1.0f}; }

// No two sizes are equal that could be mixed up: B 2, S 5, H 3, D 64, N 7, R 11, M 4.
static std::vector<PluginTensorDesc> inputs(DataType type, bool fp8 = false) {
    const DataType kv = fp8 ? DataType::kFP8 : type;
    std::vector<PluginTensorDesc> made{
        tensor({2, 5, 3, 64}, type), tensor({7, 3, 11, 64}, kv), tensor({7, 3, 11, 64}, kv), tensor({2, 4}, DataType::kINT64),
        tensor({2, 5}, DataType::kINT64)};
    if (fp8) made.insert(made.end(), {tensor({}, DataType::kFLOAT), tensor({1}, DataType::kFLOAT)});
    return made;
}

static void test_creator_names() {
    CHECK(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    CHECK(std::strcmp(creator->getPluginName(), "PhiCrossAttention") == 0);
    CHECK(std::strcmp(creator->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(creator->getPluginNamespace(), "flamingo") == 0);
    const PluginFieldCollection* names = creator->getFieldNames();
    CHECK(names->nbFields == 2);
    CHECK(std::strcmp(names->fields[0].name, "scale") == 0 && names->fields[0].type == PluginFieldType::kFLOAT32);
    CHECK(std::strcmp(names->fields[1].name, "kv_scales") == 0 && names->fields[1].type == PluginFieldType::kINT32);
    auto plugin = create();
    CHECK(std::strcmp(plugin->getInterfaceInfo().kind, "PLUGIN") == 0);
    CHECK(std::strcmp(core(*plugin)->getPluginName(), "PhiCrossAttention") == 0);
    CHECK(std::strcmp(core(*plugin)->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(core(*plugin)->getPluginNamespace(), "flamingo") == 0);
    CHECK(std::strcmp(core(*plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") == 0);
    CHECK(std::strcmp(build(*plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") == 0);
    CHECK(build(*plugin)->getInterfaceInfo().major == 1);
    CHECK(std::strcmp(runtime(*plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") == 0);
    CHECK(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr);
    CHECK(build(*plugin)->getNbOutputs() == 1);
    CHECK(build(*plugin)->getNbTactics() == 0);
}

static void test_wrong_fields_are_refused() {
    const float good = 0.5f, zero = 0.0f, negative = -1.0f, nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
    const double wide = 0.5;
    const int32_t two = 2;
    const auto refused = [](PluginField field, const char* why) {
        const size_t before = log_.errors.size();
        return create({field}) == nullptr && log_.errors.size() == before + 1 && log_.said(why);
    };
    CHECK(create({{"scale", &good, PluginFieldType::kFLOAT32, 1}}) != nullptr);
    CHECK(refused({"scale", &wide, PluginFieldType::kFLOAT64, 1}, "one float32"));
    CHECK(refused({"scale", &good, PluginFieldType::kFLOAT32, 2}, "length 2"));
    CHECK(refused({"scale", nullptr, PluginFieldType::kFLOAT32, 1}, "one float32"));
    for (const float* bad : {&zero, &negative, &nan, &inf}) CHECK(refused({"scale", bad, PluginFieldType::kFLOAT32, 1}, "positive"));
    CHECK(refused({"kv_scales", &two, PluginFieldType::kINT32, 1}, "0 or 1"));
    CHECK(refused({"kv_scales", &good, PluginFieldType::kFLOAT32, 1}, "one int32"));
    CHECK(refused({"kv_scales", &ONE, PluginFieldType::kINT32, 0}, "length 0"));
    CHECK(refused({"Scale", &good, PluginFieldType::kFLOAT32, 1}, "unknown field 'Scale'"));
    CHECK(refused({nullptr, &good, PluginFieldType::kFLOAT32, 1}, "unknown field ''"));
    const PluginFieldCollection hollow{1, nullptr};
    CHECK(creator->createPlugin("layer", &hollow, TensorRTPhase::kBUILD) == nullptr);
    std::unique_ptr<IPluginV3> none(creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD));
    CHECK(none != nullptr);
}

using Combination = std::vector<DataType>;

// Every combination of types and formats that the plugin takes, asked tensor by tensor as a builder asks; the tensors after the one in
// question hold rubbish, which must not matter.
static void collect(IPluginV3OneBuild& plugin, int32_t count, std::vector<DynamicPluginTensorDesc>& tensors, int32_t index,
                    std::set<Combination>& found) {
    if (index == count + 1) {
        Combination types;
        for (const auto& one : tensors) types.push_back(one.desc.type);
        found.insert(types);
        return;
    }
    for (int32_t type = 0; type < EnumMax<DataType>(); ++type) {
        for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format) {
            for (size_t later = index + 1; later < tensors.size(); ++later) {
                tensors[later].desc.type = static_cast<DataType>((type * 7 + format + later) % EnumMax<DataType>());
                tensors[later].desc.format = static_cast<TensorFormat>((format + later) % EnumMax<TensorFormat>());
            }
            tensors[index].desc.type = static_cast<DataType>(type);
            tensors[index].desc.format = static_cast<TensorFormat>(format);
            if (!plugin.supportsFormatCombination(index, tensors.data(), count, 1)) continue;
            CHECK(tensors[index].desc.format == TensorFormat::kLINEAR);
            collect(plugin, count, tensors, index + 1, found);
        }
    }
}

static void test_formats() {
    constexpr DataType F32 = DataType::kFLOAT, F16 = DataType::kHALF, B16 = DataType::kBF16, F8 = DataType::kFP8, I64 = DataType::kINT64;
    std::set<Combination> found;
    std::vector<DynamicPluginTensorDesc> tensors(6);
    collect(*build(*create()), 5, tensors, 0, found);
    CHECK((found == std::set<Combination>{{F32, F32, F32, I64, I64, F32}, {F16, F16, F16, I64, I64, F16}, {B16, B16, B16, I64, I64, B16}}));

    found.clear();
    tensors.assign(8, {});
    collect(*build(*create_fp8()), 7, tensors, 0, found);
    CHECK((found == std::set<Combination>{
        {F32, F8, F8, I64, I64, F32, F32, F32}, {F16, F8, F8, I64, I64, F32, F32, F16}, {B16, F8, F8, I64, I64, F32, F32, B16}}));

    // The field and the number of inputs must agree.
    for (auto& one : tensors) one.desc = tensor({}, F32);
    CHECK(!build(*create())->supportsFormatCombination(0, tensors.data(), 7, 1) && log_.said("7 inputs and 1 outputs, expected 5 and 1"));
    CHECK(!build(*create_fp8())->supportsFormatCombination(0, tensors.data(), 5, 1) && log_.said("expected 7 and 1 (kv_scales=1)"));
    CHECK(!build(*create())->supportsFormatCombination(0, tensors.data(), 5, 2));
    CHECK(!build(*create())->supportsFormatCombination(6, tensors.data(), 5, 1));
    CHECK(!build(*create())->supportsFormatCombination(-1, tensors.data(), 5, 1));
}

static void test_output_types() {
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        const DataType plain[] = {type, type, type, DataType::kINT64, DataType::kINT64};
        const DataType fp8[] = {type, DataType::kFP8, DataType::kFP8, DataType::kINT64, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT};
        DataType y = DataType::kBOOL;
        CHECK(build(*create())->getOutputDataTypes(&y, 1, plain, 5) == 0 && y == type);
        y = DataType::kBOOL;
        CHECK(build(*create_fp8())->getOutputDataTypes(&y, 1, fp8, 7) == 0 && y == type);
        CHECK(build(*create())->getOutputDataTypes(&y, 1, fp8, 7) != 0);
    }
}

// A size: known where value >= 0.
struct Expression final : IDimensionExpr {
    struct Body final : apiv::VDimensionExpr {
        int64_t value = -1;
        bool isConstant() const override { return value >= 0; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
    } body;
    explicit Expression(int64_t value) {
        body.value = value;
        mImpl = &body;
    }
};

// No expression is computed: the output's sizes are those of q.
struct Builder final : IExprBuilder {
    struct Body final : apiv::VExprBuilder {
        int calls = 0;
        const IDimensionExpr* constant(int64_t) override { return ++calls, nullptr; }
        const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override { return ++calls, nullptr; }
        const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return ++calls, nullptr; }
    } body;
    Builder() { mImpl = &body; }
};

static void test_output_shape() {
    Builder builder;
    std::vector<std::unique_ptr<Expression>> made;
    const auto sizes = [&](std::vector<int64_t> values) {
        DimsExprs list{};
        list.nbDims = int32_t(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
            made.push_back(std::make_unique<Expression>(values[i]));
            list.d[i] = made.back().get();
        }
        return list;
    };
    auto plugin = create();
    std::vector<DimsExprs> in{sizes({-1, -1, 3, 64}), sizes({-1, 3, 11, 64}), sizes({-1, 3, 11, 64}), sizes({-1, -1}), sizes({-1, -1})};
    DimsExprs y{};
    const auto shape = [&](const std::vector<DimsExprs>& from) {
        y = {};
        return build(*plugin)->getOutputShapes(from.data(), int32_t(from.size()), nullptr, 0, &y, 1, builder);
    };
    CHECK(shape(in) == 0);
    CHECK(y.nbDims == 4 && y.d[0] == in[0].d[0] && y.d[1] == in[0].d[1] && y.d[2] == in[0].d[2] && y.d[3] == in[0].d[3]);
    CHECK(builder.body.calls == 0);
    auto unknown = in;
    unknown[1] = sizes({-1, -1, -1, -1});
    CHECK(shape(unknown) == 0);
    for (const int32_t i : {1, 2}) {
        auto heads = in, size = in;
        heads[i] = sizes({-1, 4, 11, 64});
        size[i] = sizes({-1, 3, 11, 80});
        CHECK(shape(heads) != 0 && log_.said("heads or head sizes"));
        CHECK(shape(size) != 0);
    }
    for (size_t i = 0; i < in.size(); ++i) {
        auto rank = in;
        rank[i] = sizes({-1, -1, 3});
        CHECK(shape(rank) != 0 && log_.said("has 3 axes"));
    }
    in.pop_back();
    CHECK(shape(in) != 0);
}

static void test_serialisation() {
    const float scale = 0.08838834764f;
    const int32_t zero = 0;
    struct Case {
        std::vector<PluginField> fields;
        bool scaled, fp8;
    };
    const Case cases[] = {
        {{}, false, false},
        {{{"scale", &scale, PluginFieldType::kFLOAT32, 1}}, true, false},
        {{{"kv_scales", &ONE, PluginFieldType::kINT32, 1}}, false, true},
        {{{"kv_scales", &zero, PluginFieldType::kINT32, 1}}, false, false},
        {{{"kv_scales", &ONE, PluginFieldType::kINT32, 1}, {"scale", &scale, PluginFieldType::kFLOAT32, 1}}, true, true},
    };
    for (const Case& one : cases) {
        auto plugin = create(one.fields);
        // fields -> plugin -> fields -> plugin -> fields, and the same of a clone and of what a context gets.
        for (const char* way : {"created again", "cloned", "attached"}) {
            std::unique_ptr<IPluginV3> other;
            if (!std::strcmp(way, "cloned")) other.reset(plugin->clone());
            if (!std::strcmp(way, "attached")) other.reset(runtime(*plugin)->attachToContext(nullptr));
            if (!other) other.reset(creator->createPlugin("layer", runtime(*plugin)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
            CHECK(other != nullptr && other.get() != plugin.get());
            const PluginFieldCollection* fields = runtime(*other)->getFieldsToSerialize();
            CHECK(fields->nbFields == (one.scaled ? 2 : 1));
            bool has_scale = false, has_fp8 = false;
            for (int32_t i = 0; i < fields->nbFields; ++i) {
                const PluginField& field = fields->fields[i];
                CHECK(field.length == 1);
                if (!std::strcmp(field.name, "scale"))
                    has_scale = field.type == PluginFieldType::kFLOAT32 && *static_cast<const float*>(field.data) == scale;
                if (!std::strcmp(field.name, "kv_scales"))
                    has_fp8 = field.type == PluginFieldType::kINT32 && *static_cast<const int32_t*>(field.data) == int32_t(one.fp8);
            }
            CHECK(has_scale == one.scaled && has_fp8);
            CHECK(!std::strcmp(build(*other)->getTimingCacheID(), build(*plugin)->getTimingCacheID()));
            CHECK(!std::strcmp(build(*other)->getMetadataString(), build(*plugin)->getMetadataString()));
        }
    }
}

static void test_a_clone_outlives_its_original() {
    const float scale = 0.25f;
    auto plugin = create({{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    runtime(*plugin)->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> copy(plugin->clone());
    plugin.reset();
    CHECK(*static_cast<const float*>(runtime(*copy)->getFieldsToSerialize()->fields[1].data) == 0.25f);
}

static void test_timing_id_and_metadata() {
    const float scale = 0.25f;
    auto plain = create(), fp8 = create_fp8(), scaled = create({{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    CHECK(!std::strcmp(build(*plain)->getTimingCacheID(), "v1.kernels1.kv_scales0"));
    CHECK(!std::strcmp(build(*fp8)->getTimingCacheID(), "v1.kernels1.kv_scales1"));
    CHECK(!std::strcmp(build(*scaled)->getTimingCacheID(), build(*plain)->getTimingCacheID()));
    CHECK(!std::strcmp(build(*plain)->getMetadataString(), "scale=head_size**-0.5 kv_scales=0 kernels=1"));
    CHECK(!std::strcmp(build(*scaled)->getMetadataString(), "scale=0.25 kv_scales=0 kernels=1"));
}

static std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& tensors) {
    std::vector<DynamicPluginTensorDesc> made;
    for (const auto& one : tensors) made.push_back({one, one.dims, one.dims, one.dims});
    return made;
}

static void test_configure() {
    auto plugin = create();
    auto in = dynamic(inputs(DataType::kHALF));
    const auto configure = [&] { return build(*plugin)->configurePlugin(in.data(), int32_t(in.size()), in.data(), 1); };
    CHECK(configure() == 0);
    CHECK(build(*plugin)->getWorkspaceSize(in.data(), 5, in.data(), 1) == 0);
    in[0].desc.dims = dims({-1, -1, 3, -1});
    CHECK(configure() == 0);
    in[0].desc.dims = dims({-1, -1, 3, 72});
    CHECK(configure() != 0 && log_.said("no kernel for head size 72"));
    in = dynamic(inputs(DataType::kHALF, true));
    CHECK(configure() != 0);
}

static void test_shapes_that_do_not_fit() {
    const auto change = [](IPluginV3& plugin, const std::vector<PluginTensorDesc>& in, const PluginTensorDesc& y) {
        return runtime(plugin)->onShapeChange(in.data(), int32_t(in.size()), &y, 1);
    };
    auto plugin = create(), fp8 = create_fp8();
    const auto good = inputs(DataType::kBF16), good8 = inputs(DataType::kBF16, true);
    CHECK(change(*plugin, good, good[0]) == 0);
    CHECK(change(*fp8, good8, good8[0]) == 0);
    CHECK(change(*plugin, good8, good8[0]) != 0);
    CHECK(change(*fp8, good, good[0]) != 0);
    struct Case {
        int index;
        std::vector<int64_t> sizes;
        const char* why;
    };
    const Case cases[] = {
        {0, {2, 5, 3}, "q has 3 axes"},
        {0, {2, 5, 3, -1}, "q has size -1 on axis 3"},
        {0, {2, int64_t(1) << 31, 3, 64}, "q has size 2147483648 on axis 1"},
        {1, {7, 2, 11, 64}, "k has size 2 on axis 1, expected 3"},
        {1, {7, 3, 11, 80}, "k has size 80 on axis 3, expected 64"},
        {1, {7, 3, 11, 64, 1}, "k has 5 axes"},
        {2, {8, 3, 11, 64}, "v has size 8 on axis 0, expected 7"},
        {2, {7, 3, 12, 64}, "v has size 12 on axis 2, expected 11"},
        {3, {3, 4}, "media_rows has size 3 on axis 0, expected 2"},
        {3, {4}, "media_rows has 1 axes"},
        {4, {1, 5}, "phi has size 1 on axis 0, expected 2"},
        {4, {2, 6}, "phi has size 6 on axis 1, expected 5"},
        {5, {2}, "k_scale is not a scalar"},
        {6, {1, 1}, "v_scale is not a scalar"},
    };
    for (const Case& one : cases) {
        auto in = good8;
        in[one.index].dims = dims(one.sizes);
        CHECK(change(*fp8, in, good8[0]) != 0);
        CHECK(log_.said(one.why));
    }
    auto y = good[0];
    y.dims = dims({2, 5, 3, 80});
    CHECK(change(*plugin, good, y) != 0 && log_.said("y has size 80 on axis 3"));
    y = good[0];
    y.type = DataType::kHALF;
    CHECK(change(*plugin, good, y) != 0 && log_.said("y has type 1"));
    auto in = good;
    in[1].type = DataType::kHALF;
    CHECK(change(*plugin, in, good[0]) != 0 && log_.said("k has type 1"));
    in = good;
    in[4].type = DataType::kINT32;
    CHECK(change(*plugin, in, good[0]) != 0 && log_.said("phi has type 3"));
    in = good;
    in[2].format = TensorFormat::kCHW32;
    CHECK(change(*plugin, in, good[0]) != 0 && log_.said("v is not linear"));
    in = good;
    for (const int i : {0, 1, 2}) in[i].dims.d[3] = 72;
    CHECK(change(*plugin, in, in[0]) != 0 && log_.said("no kernel for head size 72"));
    CHECK(fake_launcher()->calls == 0);
}

static void test_enqueue() {
    alignas(16) char memory[8][16];
    const auto stream = reinterpret_cast<cudaStream_t>(memory[7]);
    const float own = 0.5f;
    struct Case {
        DataType type;
        flamingo_dtype dtype;
        bool fp8;
        const float* scale;
    };
    const Case cases[] = {
        {DataType::kFLOAT, FLAMINGO_FLOAT32, false, nullptr}, {DataType::kHALF, FLAMINGO_FLOAT16, false, nullptr},
        {DataType::kBF16, FLAMINGO_BFLOAT16, false, &own},    {DataType::kFLOAT, FLAMINGO_FLOAT32, true, nullptr},
        {DataType::kHALF, FLAMINGO_FLOAT16, true, &own},      {DataType::kBF16, FLAMINGO_BFLOAT16, true, nullptr},
    };
    for (const Case& one : cases) {
        const int32_t scales = one.fp8;
        std::vector<PluginField> fields{{"kv_scales", &scales, PluginFieldType::kINT32, 1}};
        if (one.scale) fields.emplace_back("scale", one.scale, PluginFieldType::kFLOAT32, 1);
        auto original = create(fields, TensorRTPhase::kRUNTIME);
        std::unique_ptr<IPluginV3> plugin(runtime(*original)->attachToContext(nullptr));
        const auto in = inputs(one.type, one.fp8);
        const void* pointers[] = {memory[0], memory[1], memory[2], memory[3], memory[4], memory[5], memory[6]};
        char y[16];
        void* outputs[] = {y};
        const int before = fake_launcher()->calls;
        fake_launcher()->answer = cudaSuccess;
        CHECK(runtime(*plugin)->onShapeChange(in.data(), int32_t(in.size()), in.data(), 1) == 0);
        CHECK(fake_launcher()->calls == before);
        CHECK(runtime(*plugin)->enqueue(in.data(), in.data(), pointers, outputs, nullptr, stream) == 0);
        CHECK(fake_launcher()->calls == before + 1 && fake_launcher()->stream == stream);
        const flamingo_phi_cross_attention_args& args = fake_launcher()->args;
        CHECK(args.q == memory[0] && args.k == memory[1] && args.v == memory[2] && args.y == y);
        CHECK(static_cast<const void*>(args.media_rows) == memory[3] && static_cast<const void*>(args.phi) == memory[4]);
        CHECK(static_cast<const void*>(args.k_scale) == (one.fp8 ? memory[5] : nullptr));
        CHECK(static_cast<const void*>(args.v_scale) == (one.fp8 ? memory[6] : nullptr));
        CHECK(args.batch == 2 && args.positions == 5 && args.heads == 3 && args.head_size == 64);
        CHECK(args.bank_rows == 7 && args.latents == 11 && args.media == 4);
        CHECK(args.scale == (one.scale ? 0.5f : 0.125f));
        CHECK(args.dtype == one.dtype && args.kv_dtype == (one.fp8 ? FLAMINGO_FLOAT8_E4M3 : one.dtype));

        fake_launcher()->answer = cudaErrorInvalidValue;
        CHECK(runtime(*plugin)->enqueue(in.data(), in.data(), pointers, outputs, nullptr, stream) == cudaErrorInvalidValue);
        CHECK(log_.said("invalid argument (cudaErrorInvalidValue) for q [2,5,3,64], k and v [7,3,11,64], 4 media"));
        auto wrong = in;
        wrong[4].dims = dims({2, 6});
        CHECK(runtime(*plugin)->enqueue(wrong.data(), in.data(), pointers, outputs, nullptr, stream) != 0);
        CHECK(fake_launcher()->calls == before + 2);
    }
}

// PhiRangeCrossAttention. No two sizes are equal that could be mixed up: B 2, S 5, H 6 over 3, D 64, N 7, R 11, M 4.
static std::vector<PluginTensorDesc> range_inputs(DataType type, bool fp8 = false) {
    const DataType kv = fp8 ? DataType::kFP8 : type;
    std::vector<PluginTensorDesc> made{tensor({2, 5, 6, 64}, type),         tensor({7, 3, 11, 64}, kv),          tensor({7, 3, 11, 64}, kv),
                                       tensor({2, 4}, DataType::kINT64),    tensor({2, 5}, DataType::kINT64),    tensor({2, 5}, DataType::kINT64)};
    if (fp8) made.insert(made.end(), {tensor({}, DataType::kFLOAT), tensor({1}, DataType::kFLOAT)});
    return made;
}

static void test_range_shapes(IPluginV3& plugin, const std::vector<PluginTensorDesc>& in) {
    const int32_t count = int32_t(in.size());
    const auto refused = [&](int32_t index, std::vector<int64_t> sizes, const char* why) {
        auto wrong = in;
        wrong[index].dims = dims(sizes);
        return runtime(plugin)->onShapeChange(wrong.data(), count, in.data(), 1) != 0 && log_.said(why);
    };
    CHECK(runtime(plugin)->onShapeChange(in.data(), count, in.data(), 1) == 0);
    CHECK(refused(1, {7, 4, 11, 64}, "4 heads of k do not divide 6 heads of q"));
    CHECK(refused(1, {7, 3, 11, 32}, "k has size 32 on axis 3, expected 64"));
    CHECK(refused(2, {7, 3, 12, 64}, "v has size 12 on axis 2, expected 11"));
    CHECK(refused(3, {3, 4}, "media_rows has size 3 on axis 0, expected 2"));
    CHECK(refused(4, {2, 6}, "first_media has size 6 on axis 1, expected 5"));
    CHECK(refused(5, {2, 5, 1}, "phi has 3 axes, expected 2"));
    CHECK(log_.said("flamingo::PhiRangeCrossAttention: "));
}

static void test_range_enqueue(IPluginV3& plugin, const std::vector<PluginTensorDesc>& in, flamingo_dtype dtype, bool fp8) {
    int32_t memory[10];
    const void* pointers[8];
    for (int i = 0; i < 8; ++i) pointers[i] = &memory[i];
    void* const outputs[] = {&memory[8]};
    const auto stream = reinterpret_cast<cudaStream_t>(&memory[9]);
    const int before = fake_launcher()->range_calls, others = fake_launcher()->calls;
    fake_launcher()->answer = cudaSuccess;
    CHECK(runtime(plugin)->enqueue(in.data(), in.data(), pointers, outputs, &memory[9], stream) == 0);
    CHECK(fake_launcher()->range_calls == before + 1 && fake_launcher()->calls == others && fake_launcher()->stream == stream);
    const auto& args = fake_launcher()->range_args;
    CHECK(args.q == pointers[0] && args.k == pointers[1] && args.v == pointers[2] && args.y == outputs[0] && args.workspace == &memory[9]);
    CHECK(args.media_rows == pointers[3] && args.first_media == pointers[4] && args.phi == pointers[5]);
    CHECK(args.k_scale == (fp8 ? pointers[6] : nullptr) && args.v_scale == (fp8 ? pointers[7] : nullptr));
    CHECK(args.batch == 2 && args.positions == 5 && args.heads == 6 && args.kv_heads == 3 && args.head_size == 64);
    CHECK(args.bank_rows == 7 && args.keys == 11 && args.media == 4 && std::fabs(args.scale - 0.125f) < 1e-7f);
    CHECK(args.dtype == dtype && args.kv_dtype == (fp8 ? FLAMINGO_FLOAT8_E4M3 : dtype));
    fake_launcher()->answer = cudaErrorInvalidValue;
    CHECK(runtime(plugin)->enqueue(in.data(), in.data(), pointers, outputs, nullptr, stream) == cudaErrorInvalidValue);
    CHECK(log_.said("(cudaErrorInvalidValue) for q [2,5,6,64], k and v [7,3,11,64], 4 media"));
}

// The workspace is asked for the largest sizes of a profile, whatever the present ones are.
static void test_range_workspace(IPluginV3& plugin, const std::vector<PluginTensorDesc>& in) {
    std::vector<DynamicPluginTensorDesc> tensors;
    for (const PluginTensorDesc& each : in) tensors.push_back({each, each.dims, each.dims, each.dims});
    for (int32_t i : {0, 4, 5}) tensors[i].max.d[1] = 9;
    for (int32_t i : {0, 3, 4, 5}) tensors[i].max.d[0] = 3;
    DynamicPluginTensorDesc y = tensors[0];
    CHECK(build(plugin)->getWorkspaceSize(tensors.data(), int32_t(tensors.size()), &y, 1) == 3009004);
    CHECK(build(plugin)->getWorkspaceSize(tensors.data(), 2, &y, 1) == 0);
}

static void test_range_plugin(IPluginCreatorV3One* ranges) {
    CHECK(std::strcmp(ranges->getPluginName(), "PhiRangeCrossAttention") == 0);
    CHECK(std::strcmp(ranges->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(ranges->getPluginNamespace(), "flamingo") == 0);
    CHECK(ranges->getFieldNames()->nbFields == 2);
    IPluginCreatorV3One* const other = creator;
    creator = ranges;
    CHECK(create({{"x", &ONE, PluginFieldType::kINT32, 1}}) == nullptr && log_.said("flamingo::PhiRangeCrossAttention: unknown field 'x'"));
    const struct {
        DataType type;
        flamingo_dtype dtype;
        bool fp8;
    } types[] = {{DataType::kFLOAT, FLAMINGO_FLOAT32, false}, {DataType::kHALF, FLAMINGO_FLOAT16, true}, {DataType::kBF16, FLAMINGO_BFLOAT16, false}};
    for (const auto& each : types) {
        auto plugin = each.fp8 ? create_fp8() : create();
        const auto in = range_inputs(each.type, each.fp8);
        CHECK(std::strcmp(core(*plugin)->getPluginName(), "PhiRangeCrossAttention") == 0);
        DataType given[8], found = DataType::kINT32;
        for (size_t i = 0; i < in.size(); ++i) given[i] = in[i].type;
        CHECK(build(*plugin)->getOutputDataTypes(&found, 1, given, int32_t(in.size())) == 0 && found == each.type);
        CHECK(build(*plugin)->getOutputDataTypes(&found, 1, given, 5) != 0 && log_.said("5 inputs and 1 outputs"));
        std::vector<DynamicPluginTensorDesc> tensors;
        for (const PluginTensorDesc& one : in) tensors.push_back({one, one.dims, one.dims, one.dims});
        tensors.push_back(tensors[0]);
        for (int32_t i = 0; i <= int32_t(in.size()); ++i) CHECK(build(*plugin)->supportsFormatCombination(i, tensors.data(), int32_t(in.size()), 1));
        tensors[4].desc.type = DataType::kINT32;
        CHECK(!build(*plugin)->supportsFormatCombination(4, tensors.data(), int32_t(in.size()), 1));
        test_range_shapes(*plugin, in);
        test_range_enqueue(*plugin, in, each.dtype, each.fp8);
        test_range_workspace(*plugin, in);
        std::unique_ptr<IPluginV3> copy(plugin->clone());
        plugin.reset();
        const PluginFieldCollection* kept = runtime(*copy)->getFieldsToSerialize();
        CHECK(kept->nbFields == 1 && *static_cast<const int32_t*>(kept->fields[0].data) == int32_t(each.fp8));
    }
    creator = other;
}

static void test_without_logger(void (*set_finder)(ILoggerFinder*), Finder& finder) {
    // To stderr, and no exception passes.
    const size_t before = log_.errors.size();
    finder.throws = true;
    CHECK(create({{"x", &ONE, PluginFieldType::kINT32, 1}}) == nullptr);
    finder.throws = false;
    finder.logger = nullptr;
    CHECK(create({{"x", &ONE, PluginFieldType::kINT32, 1}}) == nullptr);
    set_finder(nullptr);
    CHECK(create({{"x", &ONE, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(log_.errors.size() == before);
}

int main(int argc, char** argv) {
    void* library = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) {
        std::printf("usage: test_plugin LIBRARY; %s\n", argc == 2 ? dlerror() : "none given");
        return 2;
    }
    const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    const auto get_creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    if (!set_finder || !get_creators) {
        std::printf("%s lacks an entry point\n", argv[1]);
        return 2;
    }
    static Finder finder;
    finder.logger = &log_;
    set_finder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    CHECK(count == 2);
    creator = static_cast<IPluginCreatorV3One*>(creators[0]);

    test_creator_names();
    test_wrong_fields_are_refused();
    test_formats();
    test_output_types();
    test_output_shape();
    test_serialisation();
    test_a_clone_outlives_its_original();
    test_timing_id_and_metadata();
    test_configure();
    test_shapes_that_do_not_fit();
    test_enqueue();
    test_range_plugin(static_cast<IPluginCreatorV3One*>(creators[1]));
    test_without_logger(set_finder, finder);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
