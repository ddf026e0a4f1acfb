// ai.gdn2::GatedDeltaRule2 for ONNX Runtime on a CPU, against its C API alone.
//
//   inputs   q, k [B, T, H * K]   v [B, T, HV * V]   g (log decay), b (erase gate) [B, T, H * K]
//            w (write gate) [B, T, HV * V]   past_state [B, HV, K, V], float
//   outputs  o [B, T, HV * V]   present_state [B, HV, K, V], float
//   attributes  num_heads H, num_v_heads HV (H where absent), scale (1 / sqrt(K) where absent or 0)
//   types    float, float16 or bfloat16, one for all but the states; the arithmetic is in float
//
//   S <- Diag(exp g) S     u = w * v - S^T (b * k)     S <- S + k u^T     o = scale * S^T q
//
// Compiles alone: c++ -std=c++17 -O3 -fPIC -shared gated_delta_rule2.cpp -o libgdn2_onnx.so (build_op.py has all the
// options). It needs neither an SDK nor the C++ library.
#include "ort_api.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define X86 1
#include <xmmintrin.h>
#ifdef __GNUC__
#include <cpuid.h>
#endif
#elif !defined(__GNUC__)
#include <arm_neon.h>
#endif

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

// Tokens that a block of columns meets in a row; least columns of a task; tasks to make where there is work for them.
enum { TOKENS = 16, UNIT = 32, MIN_TASKS = 16 };

struct Call {
  int64_t B, T, H, HV, K, V, heads_per_key, K_padded, tasks_per_head, columns_per_task;
  float scale;
  OrtType type;
  const void *q, *k, *v, *g, *b, *w;
  const float* past;
  void* o;
  float* present;
  size_t memory;
  void (*columns)(const Call&, int64_t batch, int64_t head, int64_t begin, int64_t end, float* memory);
  volatile int out_of_memory;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// exp(x) to 2 units in the last place for x <= 88; 0 where it would be denormal; NaN for NaN.
INLINE float exponential(float x) {
  float y = x < -87.3f ? -87.3f : x;
  y = y > 88.0f ? 88.0f : y;
  float shifted = y * 1.44269504f + 12582912.0f;  // its low bits are y / log(2), rounded
  float n = shifted - 12582912.0f;
  float z = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.9875691500e-4f;  // Cephes' polynomial for exp
  e = e * z + 1.3981999507e-3f;
  e = e * z + 8.3334519073e-3f;
  e = e * z + 4.1665795894e-2f;
  e = e * z + 1.6666665459e-1f;
  e = e * z + 5.0000001201e-1f;
  e = e * z * z + z + 1.0f;
  float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -87.3f ? 0.0f : e * power;
}

INLINE float float_of_half(uint16_t half) {
  uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t infinite = magnitude >= 0x0f800000u ? 112u << 23 : 0;
  uint32_t normal = magnitude + (112u << 23) + infinite;
  uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  return float_of(sign | (magnitude < 0x00800000u ? small : normal));
}

INLINE uint16_t half_of_float(float x) {
  uint32_t sign = bits_of(x) & 0x80000000u, a = bits_of(x) ^ sign;
  uint32_t normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  uint32_t large = a > 0x7f800000u ? 0x7e00 : 0x7c00;
  uint32_t half = a >= 0x477ff000u ? large : a < 0x38800000u ? small : normal;
  return (uint16_t)(half | sign >> 16);
}

INLINE uint16_t bfloat_of_float(float x) {
  uint32_t a = bits_of(x);
  uint32_t rounded = (a + 0x7fff + ((a >> 16) & 1)) >> 16;
  return (uint16_t)((a & 0x7fffffffu) > 0x7f800000u ? a >> 16 | 0x40 : rounded);
}

INLINE void to_floats(OrtType type, const void* from, int64_t at, int64_t n, float* to) {
  const uint16_t* x = (const uint16_t*)from + at;
  if (type == ORT_FLOAT)
    memcpy(to, (const float*)from + at, n * sizeof(float));
  else if (type == ORT_FLOAT16)
    for (int64_t i = 0; i < n; i++) to[i] = float_of_half(x[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = float_of((uint32_t)x[i] << 16);
}

INLINE void from_floats(OrtType type, const float* from, int64_t n, void* to, int64_t at) {
  uint16_t* x = (uint16_t*)to + at;
  if (type == ORT_FLOAT)
    memcpy((float*)to + at, from, n * sizeof(float));
  else if (type == ORT_FLOAT16)
    for (int64_t i = 0; i < n; i++) x[i] = half_of_float(from[i]);
  else
    for (int64_t i = 0; i < n; i++) x[i] = bfloat_of_float(from[i]);
}

// Compiled with GDN2_LANES there is one version with vectors of so many floats, and nothing is chosen at run time.
#if defined(X86) && defined(__GNUC__) && !defined(GDN2_LANES)
#define CHOOSES 1
#endif
#ifndef GDN2_LANES
#define GDN2_LANES 4
#endif

#define ISA baseline
#define LANES GDN2_LANES
#include "recurrence.h"
#undef ISA
#undef LANES

#ifdef CHOOSES
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define LANES 8
#include "recurrence.h"
#undef ISA
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
#define ISA avx512
#define LANES 16
#include "recurrence.h"
#undef ISA
#undef LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The lanes of the widest instruction set that the processor has and the system saves.
static int lanes() {
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1) || !(c >> 12 & 1)) return 4;  // OSXSAVE, FMA
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (saved & 0x6) != 0x6 || !(b >> 5 & 1)) return 4;  // AVX2
  return (saved & 0xe6) == 0xe6 && (b >> 16 & 1) ? 16 : 8;                                          // AVX512F
}
#endif

static auto chosen_columns() {
#ifdef CHOOSES
  int width = lanes();
  if (width == 8) return avx2::columns;
  if (width == 16) return avx512::columns;
#endif
  return baseline::columns;
}

// Chosen when the library is loaded: in a virtual machine the question alone takes longer than a token.
static const auto COLUMNS_OF_THIS_PROCESSOR = chosen_columns();

static void task(void* data, size_t index) {
  Call& c = *(Call*)data;
  void* memory = malloc(c.memory + 64);
  if (!memory) {
    c.out_of_memory = 1;
    return;
  }
#ifdef X86
  // Faded states would be denormal, and slow a hundred times: such numbers become 0 in here.
  unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);
#endif
  int64_t head = (int64_t)index / c.tasks_per_head, begin = (int64_t)index % c.tasks_per_head * c.columns_per_task;
  int64_t end = least(begin + c.columns_per_task, c.V);
  c.columns(c, head / c.HV, head % c.HV, begin, end, (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63));
#ifdef X86
  _mm_setcsr(control);
#endif
  free(memory);
}

struct Op : OrtCustomOp {
  OrtType type;
};

struct Kernel {
  const OrtApi* api;
  OrtType type;
  int64_t H, HV;
  float scale;
};

#define RETURN_IF_ERROR(expression) \
  if (OrtStatus* status = expression) return status

static OrtStatus* error(const OrtApi* api, int code, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return ort_get<CreateStatus>(api)(code, message);
}

struct Tensor {
  const char* name;
  void* data;
  size_t rank;
  int64_t shape[4];
};

static OrtStatus* get_tensor(const OrtApi* api, OrtKernelContext* context, size_t index, const char* name, size_t rank,
                             const char* meaning, Tensor* out) {
  const OrtValue* value = nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  out->name = name;
  RETURN_IF_ERROR(ort_get<KernelContext_GetInput>(api)(context, index, &value));
  if (!value)
    return error(api, ORT_INVALID_ARGUMENT, "GatedDeltaRule2: input %s is missing, expected %s.", name, meaning);
  RETURN_IF_ERROR(ort_get<GetTensorMutableData>(api)((OrtValue*)value, &out->data));
  RETURN_IF_ERROR(ort_get<GetTensorTypeAndShape>(api)(value, &info));
  OrtStatus* failed = ort_get<GetDimensionsCount>(api)(info, &out->rank);
  if (!failed && out->rank == rank) failed = ort_get<GetDimensions>(api)(info, out->shape, rank);
  ort_get<ReleaseTensorTypeAndShapeInfo>(api)(info);
  if (failed) return failed;
  if (out->rank != rank)
    return error(api, ORT_INVALID_ARGUMENT, "GatedDeltaRule2: %s has %d dimensions, expected %d: %s.", name,
                 (int)out->rank, (int)rank, meaning);
  return nullptr;
}

static OrtStatus* check_shape(const OrtApi* api, const Tensor& x, const int64_t* expected, const char* meaning) {
  if (memcmp(x.shape, expected, x.rank * sizeof(int64_t)) == 0) return nullptr;
  char text[2][96];
  for (int side = 0; side < 2; side++) {
    const int64_t* shape = side ? expected : x.shape;
    int length = 0;
    for (size_t i = 0; i < x.rank; i++)
      length += snprintf(text[side] + length, sizeof text[side] - length, i ? ", %lld" : "%lld", (long long)shape[i]);
  }
  return error(api, ORT_INVALID_ARGUMENT, "GatedDeltaRule2: %s has shape [%s], expected [%s], which is %s.", x.name,
               text[0], text[1], meaning);
}

static OrtStatus* ORT_CALL compute(void* self, OrtKernelContext* context) {
  static const char *const NAMES[] = {"q", "k", "v", "g", "b", "w"}, *const KEYS = "[batch, tokens, num_heads * K]",
                           *const VALUES = "[batch, tokens, num_v_heads * V]",
                           *const STATE = "[batch, num_v_heads, K, V]";
  const Kernel& kernel = *(const Kernel*)self;
  const OrtApi* api = kernel.api;
  Tensor x[6], past;
  for (size_t i = 0; i < 6; i++)
    RETURN_IF_ERROR(get_tensor(api, context, i, NAMES[i], 3, i == 2 || i == 5 ? VALUES : KEYS, &x[i]));
  RETURN_IF_ERROR(get_tensor(api, context, 6, "past_state", 4, STATE, &past));

  Call c = {};
  c.B = x[0].shape[0], c.T = x[0].shape[1], c.H = kernel.H, c.HV = kernel.HV;
  c.K = x[0].shape[2] / c.H, c.V = x[2].shape[2] / c.HV;
  if (c.K < 1)
    return error(api, ORT_INVALID_ARGUMENT,
                 "GatedDeltaRule2: q has %lld channels, expected num_heads = %lld times 1 or more.",
                 (long long)x[0].shape[2], (long long)c.H);
  const int64_t keys[] = {c.B, c.T, c.H * c.K}, values[] = {c.B, c.T, c.HV * c.V}, state[] = {c.B, c.HV, c.K, c.V};
  for (size_t i = 0; i < 6; i++)
    RETURN_IF_ERROR(check_shape(api, x[i], i == 2 || i == 5 ? values : keys, i == 2 || i == 5 ? VALUES : KEYS));
  RETURN_IF_ERROR(check_shape(api, past, state, STATE));

  OrtValue *o = nullptr, *present = nullptr;
  void* present_data = nullptr;
  RETURN_IF_ERROR(ort_get<KernelContext_GetOutput>(api)(context, 0, values, 3, &o));
  RETURN_IF_ERROR(ort_get<KernelContext_GetOutput>(api)(context, 1, state, 4, &present));
  RETURN_IF_ERROR(ort_get<GetTensorMutableData>(api)(o, &c.o));
  RETURN_IF_ERROR(ort_get<GetTensorMutableData>(api)(present, &present_data));
  if (c.T == 0 && present_data != past.data) memcpy(present_data, past.data, c.B * c.HV * c.K * c.V * sizeof(float));
  if (c.T == 0 || c.B == 0 || c.V == 0) return nullptr;

  c.q = x[0].data, c.k = x[1].data, c.v = x[2].data, c.g = x[3].data, c.b = x[4].data, c.w = x[5].data;
  c.past = (const float*)past.data, c.present = (float*)present_data;
  c.type = kernel.type;
  c.scale = kernel.scale != 0 ? kernel.scale : 1 / sqrtf((float)c.K);
  c.heads_per_key = c.HV / c.H;
  c.K_padded = (c.K + 15) / 16 * 16;
  c.columns = COLUMNS_OF_THIS_PROCESSOR;
  // A whole head is a task where there are heads enough: its gates are then computed once.
  const int64_t units = (c.V + UNIT - 1) / UNIT, heads = c.B * c.HV;
  const int64_t wanted = heads * units / MIN_TASKS, units_per_task = wanted < 1 ? 1 : least(wanted, units);
  c.columns_per_task = units_per_task * UNIT;
  c.tasks_per_head = (units + units_per_task - 1) / units_per_task;
  c.memory = sizeof(float) * (TOKENS * (4 * c.K_padded + 16) + (c.K + 4) * (c.columns_per_task + UNIT));
  RETURN_IF_ERROR(ort_get<KernelContext_ParallelFor>(api)(context, task, heads * c.tasks_per_head, 0, &c));
  if (c.out_of_memory)
    return error(api, ORT_FAIL, "GatedDeltaRule2: a thread found no %zu bytes of memory, free some.", c.memory);
  return nullptr;
}

static OrtStatus* ORT_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  Kernel kernel = {api, static_cast<const Op*>(op)->type, 0, 0, 0};
  if (OrtStatus* absent = ort_get<KernelInfoGetAttribute_int64>(api)(info, "num_heads", &kernel.H)) {
    ort_get<ReleaseStatus>(api)(absent);
    return error(api, ORT_INVALID_ARGUMENT, "GatedDeltaRule2: the attribute num_heads is missing, add it to the node.");
  }
  if (OrtStatus* absent = ort_get<KernelInfoGetAttribute_int64>(api)(info, "num_v_heads", &kernel.HV)) {
    ort_get<ReleaseStatus>(api)(absent);
    kernel.HV = kernel.H;
  }
  if (OrtStatus* absent = ort_get<KernelInfoGetAttribute_float>(api)(info, "scale", &kernel.scale)) {
    ort_get<ReleaseStatus>(api)(absent);
    kernel.scale = 0;
  }
  if (kernel.H < 1 || kernel.HV < 1 || kernel.HV % kernel.H)
    return error(api, ORT_INVALID_ARGUMENT,
                 "GatedDeltaRule2: num_heads is %lld and num_v_heads %lld, expected positive numbers, the second a "
                 "multiple of the first.",
                 (long long)kernel.H, (long long)kernel.HV);
  Kernel* made = (Kernel*)malloc(sizeof kernel);
  if (!made) return error(api, ORT_FAIL, "GatedDeltaRule2: no memory for the operator, free some.");
  *made = kernel;
  *out = made;
  return nullptr;
}

static const OrtApi* shape_api;

// The outputs have the shapes of v and of past_state. A dimension without a number or a name cannot be passed on.
static OrtStatus* ORT_CALL infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  const OrtApi* api = shape_api;
  for (size_t output = 0; output < 2; output++) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t rank = 0;
    RETURN_IF_ERROR(ort_get<ShapeInferContext_GetInputTypeShape>(api)(context, output ? 6 : 2, &info));
    RETURN_IF_ERROR(ort_get<GetDimensionsCount>(api)(info, &rank));
    if (rank != (output ? 4u : 3u)) continue;
    int64_t shape[4];
    const char* names[4] = {};
    RETURN_IF_ERROR(ort_get<GetDimensions>(api)(info, shape, rank));
    RETURN_IF_ERROR(ort_get<GetSymbolicDimensions>(api)(info, names, rank));
    bool known = true;
    for (size_t i = 0; i < rank; i++) known = known && (shape[i] >= 0 || (names[i] && *names[i]));
    if (known) RETURN_IF_ERROR(ort_get<ShapeInferContext_SetOutputTypeShape>(api)(context, output, info));
  }
  return nullptr;
}

static Op make_op(OrtType type) {
  Op op = {};
  op.version = ORT_VERSION;
  op.type = type;
  op.GetName = [](const OrtCustomOp*) { return "GatedDeltaRule2"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const OrtCustomOp* self, size_t i) {
    return i == 6 ? ORT_FLOAT : static_cast<const Op*>(self)->type;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 7; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) {
    return i == 1 ? ORT_FLOAT : static_cast<const Op*>(self)->type;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetInputCharacteristic = op.GetOutputCharacteristic =
      op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { free(kernel); };
  op.InferOutputShapeFn = infer_shapes;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

static Op ops[] = {make_op(ORT_FLOAT), make_op(ORT_FLOAT16), make_op(ORT_BFLOAT16)};

// What register_custom_ops_library calls. The domain lives as long as the process: sessions point to it.
ORT_EXPORT OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_VERSION);
  if (!api) return nullptr;
  shape_api = api;
  OrtCustomOpDomain* domain = nullptr;
  RETURN_IF_ERROR(ort_get<CreateCustomOpDomain>(api)("ai.gdn2", &domain));
  for (Op& op : ops) RETURN_IF_ERROR(ort_get<CustomOpDomain_Add>(api)(domain, &op));
  return ort_get<AddCustomOpDomain>(api)(options, domain);
}
