// Decode with an exported model through ONNX Runtime's C API: decode [--op LIBRARY] DIR COUNT ID...
//
// The folder is made by: gdn2-edge export onnx tiny --out DIR, the library by: gdn2-edge export onnx --build-op.
// Feeds a prompt of token ids and prints the COUNT ids that follow, each the most likely one. To compile: README.md.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "ort_api.h"

static const OrtApi* api;
static OrtAllocator* allocator;

// With ONNX Runtime's own header in place of ours: check(api->name(...)).
#define ORT(name, ...) check(ort_get<name>(api)(__VA_ARGS__))

static void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "error: %s\n", ort_get<GetErrorMessage>(api)(status));
  std::exit(1);
}

static OrtValue* new_tensor(OrtType type, const std::vector<int64_t>& shape) {
  OrtValue* value;
  ORT(CreateTensorAsOrtValue, allocator, shape.data(), shape.size(), type, &value);
  return value;
}

static void* data_of(OrtValue* value) {
  void* data;
  ORT(GetTensorMutableData, value, &data);
  return data;
}

static int64_t number(const char* text) {
  char* end;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end != text && !*end) return value;
  std::fprintf(stderr, "error: %s is not a number\n", text);
  std::exit(2);
}

// A float tensor of zeros with the shape of an input, for one sequence: batch is the first dimension.
static OrtValue* zeros_for(const OrtSession* session, size_t input) {
  OrtTypeInfo* type;
  const OrtTensorTypeAndShapeInfo* info;
  size_t rank, size = sizeof(float);
  ORT(SessionGetInputTypeInfo, session, input, &type);
  ORT(CastTypeInfoToTensorInfo, type, &info);
  ORT(GetDimensionsCount, info, &rank);
  std::vector<int64_t> shape(rank);
  ORT(GetDimensions, info, shape.data(), rank);
  ort_get<ReleaseTypeInfo>(api)(type);
  shape[0] = 1;
  for (int64_t dimension : shape) size *= (size_t)dimension;
  OrtValue* value = new_tensor(ORT_FLOAT, shape);
  std::memset(data_of(value), 0, size);
  return value;
}

// Of logits [1, tokens, words], those after the last token.
static int64_t most_likely(OrtValue* logits) {
  OrtTensorTypeAndShapeInfo* info;
  int64_t shape[3];
  ORT(GetTensorTypeAndShape, logits, &info);
  ORT(GetDimensions, info, shape, 3);
  ort_get<ReleaseTensorTypeAndShapeInfo>(api)(info);
  const float* last = (const float*)data_of(logits) + (shape[1] - 1) * shape[2];
  return std::max_element(last, last + shape[2]) - last;
}

int main(int argc, char** argv) {
  const char* library = argc > 2 && !std::strcmp(argv[1], "--op") ? argv[2] : nullptr;
  char** arguments = argv + (library ? 3 : 1);
  if (argv + argc - arguments < 3) return std::fputs("usage: decode [--op LIBRARY] DIR COUNT ID...\n", stderr), 2;
  const std::filesystem::path folder = arguments[0];
  std::vector<int64_t> ids;
  for (char** id = arguments + 2; id < argv + argc; id++) ids.push_back(number(*id));

  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  void* handle;
  if (!(api = OrtGetApiBase()->GetApi(ORT_VERSION))) return 1;  // has said why
  ORT(CreateEnv, ORT_LOG_FATAL, "decode", &env);
  ORT(CreateSessionOptions, &options);
  if (library) ORT(RegisterCustomOpsLibrary, options, library, &handle);
  ORT(CreateSession, env, (folder / "model.onnx").c_str(), options, &session);
  ort_get<ReleaseSessionOptions>(api)(options);
  ORT(GetAllocatorWithDefaultOptions, &allocator);

  // Inputs: input_ids, for some models position_ids, then past states. Outputs: logits, then those states in order.
  size_t num_inputs, num_outputs;
  ORT(SessionGetInputCount, session, &num_inputs);
  ORT(SessionGetOutputCount, session, &num_outputs);
  std::vector<char*> input_names(num_inputs), output_names(num_outputs);
  for (size_t i = 0; i < num_inputs; i++) ORT(SessionGetInputName, session, i, allocator, &input_names[i]);
  for (size_t i = 0; i < num_outputs; i++) ORT(SessionGetOutputName, session, i, allocator, &output_names[i]);
  // Everything the model remembers, before the first token: zeros. It never grows, so two sets of tensors are enough.
  const size_t first = num_inputs - num_outputs + 1;
  std::vector<OrtValue*> inputs(num_inputs), outputs(num_outputs);
  for (size_t i = first; i < num_inputs; i++)
    inputs[i] = zeros_for(session, i), outputs[1 + i - first] = zeros_for(session, i);

  int64_t position = 0;
  for (int64_t n = number(arguments[1]); n > 0; n--) {
    for (size_t i = 0; i < first; i++) {
      inputs[i] = new_tensor(ORT_INT64, {1, (int64_t)ids.size()});
      int64_t* values = (int64_t*)data_of(inputs[i]);
      for (size_t t = 0; t < ids.size(); t++) values[t] = i == 0 ? ids[t] : position + (int64_t)t;
    }
    ORT(Run, session, nullptr, input_names.data(), inputs.data(), num_inputs, output_names.data(), num_outputs,
        outputs.data());
    position += (int64_t)ids.size();
    ids = {most_likely(outputs[0])};
    std::printf("%lld\n", (long long)ids[0]);
    std::fflush(stdout);
    // What was written is read next, and what was read is written: no state is copied.
    for (size_t i = first; i < num_inputs; i++) std::swap(inputs[i], outputs[1 + i - first]);
    for (size_t i = 0; i < first; i++) ort_get<ReleaseValue>(api)(std::exchange(inputs[i], nullptr));
    ort_get<ReleaseValue>(api)(std::exchange(outputs[0], nullptr));
  }

  for (char* name : input_names) ORT(AllocatorFree, allocator, name);
  for (char* name : output_names) ORT(AllocatorFree, allocator, name);
  for (OrtValue* value : inputs) ort_get<ReleaseValue>(api)(value);
  for (OrtValue* value : outputs) ort_get<ReleaseValue>(api)(value);
  ort_get<ReleaseSession>(api)(session);
  ort_get<ReleaseEnv>(api)(env);
}
