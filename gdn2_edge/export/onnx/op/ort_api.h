// The part of ONNX Runtime's C API that one custom operator needs, and a program that decodes (examples/cpp), so that no
// SDK has to be installed.
//
// The C API is a table of function pointers that only ever grows at its end, so a function is its place in the table.
// The places, the signatures and the layout of OrtCustomOp are facts taken from onnxruntime_c_api.h (ONNX Runtime,
// Copyright (c) Microsoft Corporation, MIT License); nothing else of that header is here.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_CALL __stdcall
#define ORT_PATH_CHAR wchar_t
#define ORT_EXPORT extern "C" __declspec(dllexport)
#else
#define ORT_CALL
#define ORT_PATH_CHAR char
#define ORT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

struct OrtStatus;  // nullptr is success
struct OrtEnv;
struct OrtSession;
struct OrtRunOptions;
struct OrtAllocator;
struct OrtTypeInfo;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi {
  void* functions[275];
};

struct OrtApiBase {
  const OrtApi*(ORT_CALL* GetApi)(uint32_t version);
  const char*(ORT_CALL* GetVersionString)();
};

// The one function by name; everything else is in its tables.
extern "C" const OrtApiBase* ORT_CALL OrtGetApiBase();

enum {
  ORT_VERSION = 17,  // of ONNX Runtime 1.17, the first with KernelContext_ParallelFor
  ORT_LOG_FATAL = 4,
  ORT_FAIL = 1,
  ORT_INVALID_ARGUMENT = 2,
};

enum OrtType { ORT_FLOAT = 1, ORT_INT64 = 7, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 };

// ORT_FUNCTION(CreateStatus, ...) is the type of a function, ort_get<CreateStatus>(api) the function itself.
#define ORT_FUNCTION(name, place, result, ...)   \
  struct name {                                  \
    enum { at = place };                         \
    typedef result(ORT_CALL* Type)(__VA_ARGS__); \
  };
ORT_FUNCTION(CreateStatus, 0, OrtStatus*, int code, const char* message)
ORT_FUNCTION(GetErrorMessage, 2, const char*, const OrtStatus*)
ORT_FUNCTION(CreateEnv, 3, OrtStatus*, int log_level, const char* name, OrtEnv** out)
ORT_FUNCTION(CreateSession, 7, OrtStatus*, const OrtEnv*, const ORT_PATH_CHAR* path, const OrtSessionOptions*,
             OrtSession** out)
ORT_FUNCTION(Run, 9, OrtStatus*, OrtSession*, const OrtRunOptions*, const char* const* input_names,
             const OrtValue* const* inputs, size_t input_count, const char* const* output_names, size_t output_count,
             OrtValue** outputs)
ORT_FUNCTION(CreateSessionOptions, 10, OrtStatus*, OrtSessionOptions** out)
ORT_FUNCTION(CreateCustomOpDomain, 26, OrtStatus*, const char* domain, OrtCustomOpDomain** out)
ORT_FUNCTION(CustomOpDomain_Add, 27, OrtStatus*, OrtCustomOpDomain*, const struct OrtCustomOp*)
ORT_FUNCTION(AddCustomOpDomain, 28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
ORT_FUNCTION(RegisterCustomOpsLibrary, 29, OrtStatus*, OrtSessionOptions*, const char* path, void** handle)
ORT_FUNCTION(SessionGetInputCount, 30, OrtStatus*, const OrtSession*, size_t* out)
ORT_FUNCTION(SessionGetOutputCount, 31, OrtStatus*, const OrtSession*, size_t* out)
ORT_FUNCTION(SessionGetInputTypeInfo, 33, OrtStatus*, const OrtSession*, size_t index, OrtTypeInfo** out)
ORT_FUNCTION(SessionGetInputName, 36, OrtStatus*, const OrtSession*, size_t index, OrtAllocator*, char** out)
ORT_FUNCTION(SessionGetOutputName, 37, OrtStatus*, const OrtSession*, size_t index, OrtAllocator*, char** out)
ORT_FUNCTION(CreateTensorAsOrtValue, 48, OrtStatus*, OrtAllocator*, const int64_t* shape, size_t rank, OrtType,
             OrtValue** out)
ORT_FUNCTION(GetTensorMutableData, 51, OrtStatus*, OrtValue*, void** out)
ORT_FUNCTION(CastTypeInfoToTensorInfo, 55, OrtStatus*, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo** out)
ORT_FUNCTION(GetDimensionsCount, 61, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t* out)
ORT_FUNCTION(GetDimensions, 62, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t* out, size_t count)
ORT_FUNCTION(GetSymbolicDimensions, 63, OrtStatus*, const OrtTensorTypeAndShapeInfo*, const char** out, size_t count)
ORT_FUNCTION(GetTensorTypeAndShape, 65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo** out)
ORT_FUNCTION(AllocatorFree, 76, OrtStatus*, OrtAllocator*, void*)
ORT_FUNCTION(GetAllocatorWithDefaultOptions, 78, OrtStatus*, OrtAllocator** out)
ORT_FUNCTION(KernelInfoGetAttribute_float, 85, OrtStatus*, const OrtKernelInfo*, const char* name, float* out)
ORT_FUNCTION(KernelInfoGetAttribute_int64, 86, OrtStatus*, const OrtKernelInfo*, const char* name, int64_t* out)
ORT_FUNCTION(KernelContext_GetInput, 90, OrtStatus*, const OrtKernelContext*, size_t index, const OrtValue** out)
ORT_FUNCTION(KernelContext_GetOutput, 91, OrtStatus*, OrtKernelContext*, size_t index, const int64_t* shape,
             size_t rank, OrtValue** out)
ORT_FUNCTION(ReleaseEnv, 92, void, OrtEnv*)
ORT_FUNCTION(ReleaseStatus, 93, void, OrtStatus*)
ORT_FUNCTION(ReleaseSession, 95, void, OrtSession*)
ORT_FUNCTION(ReleaseValue, 96, void, OrtValue*)
ORT_FUNCTION(ReleaseTypeInfo, 98, void, OrtTypeInfo*)
ORT_FUNCTION(ReleaseTensorTypeAndShapeInfo, 99, void, OrtTensorTypeAndShapeInfo*)
ORT_FUNCTION(ReleaseSessionOptions, 100, void, OrtSessionOptions*)
ORT_FUNCTION(ShapeInferContext_GetInputTypeShape, 268, OrtStatus*, const OrtShapeInferContext*, size_t index,
             OrtTensorTypeAndShapeInfo** out)
ORT_FUNCTION(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus*, const OrtShapeInferContext*, size_t index,
             const OrtTensorTypeAndShapeInfo*)
ORT_FUNCTION(KernelContext_ParallelFor, 274, OrtStatus*, const OrtKernelContext*,
             void (*task)(void* data, size_t index), size_t tasks, size_t batches, void* data)
#undef ORT_FUNCTION

template <class F>
typename F::Type ort_get(const OrtApi* api) {
  return reinterpret_cast<typename F::Type>(api->functions[F::at]);
}

// The first members are read by every version; those after GetInputMemoryType from the version in brackets on.
struct OrtCustomOp {
  uint32_t version;
  void*(ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // unused, see CreateKernelV2
  const char*(ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  OrtType(ORT_CALL* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  OrtType(ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);  // unused, see KernelComputeV2
  void(ORT_CALL* KernelDestroy)(void* kernel);
  int(ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);  // 0: required
  int(ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int(ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);  // 0: the provider's own [1.13]
  int(ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);          // [1.14]
  int(ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);       // [1.14]
  int(ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);         // [1.14]
  int(ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);      // [1.14]
  OrtStatus*(ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                                       void** kernel);                                  // [1.16]
  OrtStatus*(ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);               // [1.16]
  OrtStatus*(ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);  // [1.17]
  int(ORT_CALL* GetStartVersion)(const OrtCustomOp*);                                   // [1.17]
  int(ORT_CALL* GetEndVersion)(const OrtCustomOp*);                                     // [1.17]
};
