// Greedy text from one image with a bundle's four graphs, in C++ on ONNX Runtime's C API.
//
//     g++ -std=c++17 -I INCLUDE greedy.cpp -o greedy LIB/libonnxruntime.so -Wl,-rpath,LIB
//     ./greedy BUNDLE PIXELS NEW_TOKENS LAYERS HEADS HEAD_SIZE IMAGE_SIZE IMAGE_ID END_ID ID...
//
// INCLUDE and LIB are those of ONNX Runtime's release archive. PIXELS: float32 [1, 3, I, I], little-endian, resized and normalised as
// manifest.json says. The numbers are those of manifest.json, config: language_model.num_layers, num_kv_heads (num_heads where it is null),
// head_size; vision.image_size; tokens.image, tokens.eoc. ID...: the prompt's token ids, one <image> among them. Prints the generated ids.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

// A tensor that owns its memory.
struct Tensor {
  std::vector<int64_t> dims;
  std::vector<uint8_t> data;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

  template <class T>
  static Tensor of(ONNXTensorElementDataType type, std::vector<int64_t> dims, const std::vector<T>& values) {
    Tensor made{dims, std::vector<uint8_t>(values.size() * sizeof(T)), type};
    std::memcpy(made.data.data(), values.data(), made.data.size());
    return made;
  }
  static Tensor ints(std::vector<int64_t> dims, const std::vector<int64_t>& values) {
    return of(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, dims, values);
  }
  static Tensor floats(std::vector<int64_t> dims, const std::vector<float>& values) {
    return of(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, dims, values);
  }
};
using Tensors = std::map<std::string, Tensor>;

class Graph {
 public:
  Graph(OrtEnv* env, const std::string& path) {
    OrtSessionOptions* options;
    check(ort->CreateSessionOptions(&options));
    check(ort->CreateSession(env, path.c_str(), options, &session_));
    ort->ReleaseSessionOptions(options);
    check(ort->GetAllocatorWithDefaultOptions(&allocator_));
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    inputs = names(ort->SessionGetInputCount, ort->SessionGetInputName);
    outputs = names(ort->SessionGetOutputCount, ort->SessionGetOutputName);
  }

  // Runs with those of `feeds` that the graph has as inputs. Tables of distances have defaults and may be left out.
  Tensors run(Tensors& feeds) const {
    std::vector<const char*> given, wanted;
    std::vector<OrtValue*> values, results(outputs.size(), nullptr);
    for (const auto& name : inputs) {
      auto found = feeds.find(name);
      if (found == feeds.end()) continue;
      Tensor& tensor = found->second;
      OrtValue* value;
      check(ort->CreateTensorWithDataAsOrtValue(memory_, tensor.data.data(), tensor.data.size(), tensor.dims.data(), tensor.dims.size(),
                                                tensor.type, &value));
      given.push_back(name.c_str());
      values.push_back(value);
    }
    for (const auto& name : outputs) wanted.push_back(name.c_str());
    check(ort->Run(session_, nullptr, given.data(), values.data(), values.size(), wanted.data(), wanted.size(), results.data()));
    Tensors found;
    for (size_t i = 0; i < outputs.size(); ++i) {
      OrtTensorTypeAndShapeInfo* info;
      check(ort->GetTensorTypeAndShape(results[i], &info));
      size_t rank;
      check(ort->GetDimensionsCount(info, &rank));
      Tensor& tensor = found[outputs[i]];
      tensor.dims.resize(rank);
      check(ort->GetDimensions(info, tensor.dims.data(), rank));
      ort->ReleaseTensorTypeAndShapeInfo(info);
      const int64_t count = std::accumulate(tensor.dims.begin(), tensor.dims.end(), int64_t{1}, std::multiplies<int64_t>());
      void* data;
      check(ort->GetTensorMutableData(results[i], &data));
      tensor.data.assign(static_cast<uint8_t*>(data), static_cast<uint8_t*>(data) + count * sizeof(float));
      ort->ReleaseValue(results[i]);
    }
    for (OrtValue* value : values) ort->ReleaseValue(value);
    return found;
  }

  std::vector<std::string> inputs, outputs;

 private:
  template <class Count, class Name>
  std::vector<std::string> names(Count count, Name name) const {
    size_t total;
    check(count(session_, &total));
    std::vector<std::string> found;
    for (size_t i = 0; i < total; ++i) {
      char* text;
      check(name(session_, i, allocator_, &text));
      found.emplace_back(text);
      check(ort->AllocatorFree(allocator_, text));
    }
    return found;
  }

  OrtSession* session_;
  OrtAllocator* allocator_;
  OrtMemoryInfo* memory_;
};

int main(int argc, char** argv) {
  if (argc < 11) {
    std::fprintf(stderr, "usage: see the first lines of this file\n");
    return 2;
  }
  const std::string bundle = argv[1];
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> raw((std::istreambuf_iterator<char>(file)), {});
  std::vector<float> pixels(raw.size() / sizeof(float));
  std::memcpy(pixels.data(), raw.data(), raw.size());
  std::vector<int64_t> numbers;
  for (int i = 3; i < argc; ++i) numbers.push_back(std::atoll(argv[i]));
  const int64_t most = numbers[0], layers = numbers[1], heads = numbers[2], size = numbers[3], side = numbers[4], image = numbers[5],
                end = numbers[6];
  const std::vector<int64_t> prompt(numbers.begin() + 7, numbers.end());

  OrtEnv* env;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "flamingo", &env));
  check(ort->DisableTelemetryEvents(env));
  auto open = [&](const std::string& name) { return Graph(env, bundle + "/" + name + ".onnx"); };

  // The image, once: pixels -> features -> latents -> keys and values of every gated layer. They are row 0 of the media bank.
  Tensors feeds{{"pixels", Tensor::floats({1, 3, side, side}, pixels)}};
  feeds = open("vision_encoder").run(feeds);
  feeds["features"].dims.insert(feeds["features"].dims.begin() + 1, 1);  // [N, T, P, E]: one medium of one frame
  feeds["time_weights"] = Tensor::floats({1, 8}, {1, 0, 0, 0, 0, 0, 0, 0});  // the first frame has the first time embedding
  feeds = open("resampler").run(feeds);
  const Tensors media = open("media_kv").run(feeds);

  // The decoder. C slots hold the prompt and all that is generated; each call's present_* are the next call's past_*.
  const Graph decoder = open("decoder");
  const int64_t capacity = static_cast<int64_t>(prompt.size()) + most;
  Tensors cache;
  for (int64_t layer = 0; layer < layers; ++layer)
    for (const char* kind : {"k", "v"})
      cache["past_" + std::string(kind) + "." + std::to_string(layer)] =
          Tensor::floats({1, heads, capacity, size}, std::vector<float>(heads * capacity * size));
  int64_t seen = 0;  // phi: which medium a token sees; an <image> and all that follows it see that image

  auto step = [&](const std::vector<int64_t>& ids, int64_t start) {
    const int64_t count = static_cast<int64_t>(ids.size());
    std::vector<int64_t> phi, positions(count), slots(capacity);
    std::vector<uint8_t> mask(count * capacity);
    for (const int64_t id : ids) phi.push_back(id == image ? ++seen : seen);
    std::iota(positions.begin(), positions.end(), start);
    std::iota(slots.begin(), slots.end(), 0);
    for (int64_t s = 0; s < count; ++s) std::fill_n(mask.begin() + s * capacity, start + s + 1, 1);  // itself and all before it
    Tensors every = media;
    every.insert(cache.begin(), cache.end());
    every["token_ids"] = Tensor::ints({1, count}, ids);
    every["positions"] = Tensor::ints({1, count}, positions);
    every["media_rows"] = Tensor::ints({1, 1}, {0});
    every["phi"] = Tensor::ints({1, count}, phi);
    every["write_index"] = Tensor::ints({1}, {start});
    every["mask"] = Tensor::of(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, {1, 1, count, capacity}, mask);
    every["key_positions"] = Tensor::ints({1, capacity}, slots);
    every["logit_positions"] = Tensor::ints({1, 1}, {count - 1});
    Tensors results = decoder.run(every);
    for (auto& [name, value] : cache) value = std::move(results["present_" + name.substr(5)]);
    const float* logits = reinterpret_cast<const float*>(results["logits"].data.data());
    const int64_t vocabulary = results["logits"].dims.back();
    int64_t best = image == 0 ? 1 : 0;
    for (int64_t id = 0; id < vocabulary; ++id)
      if (id != image && logits[id] > logits[best]) best = id;
    return best;
  };

  int64_t next = step(prompt, 0);
  for (int64_t made = 0; next != end && made < most; ++made) {
    std::printf("%lld ", static_cast<long long>(next));
    if (made + 1 < most) next = step({next}, static_cast<int64_t>(prompt.size()) + made);
  }
  std::printf("\n");
}
