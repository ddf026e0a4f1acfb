// The recurrence of one value head. Included once for each instruction set, with ISA, the name of the set, and LANES,
// the floats in a vector register; knows nothing of ONNX Runtime.
//
// The textbook form passes over the state S [K, V] three times a token. With d = exp(g), e = b * k * d and
// f = scale * q * d the same values come from one pass for two tokens' halves:
//   r = S^T e,  p = S^T f                              what token t reads, before it writes
//   u = w * v - r,  o = p + scale * (q . k) * u        no pass
//   S <- d * S + k u^T                                 joined with the reading of token t + 1
// A column of S never meets another, so that any division of the columns among threads gives the same bits.
namespace ISA {

enum { VECTORS = LANES == 16 ? 2 : 4, COLUMNS = VECTORS * LANES };  // a block of columns and its r, p, u in registers

#ifdef __GNUC__
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
INLINE Vec load(const float* x) { return *(const UnalignedVec*)x; }
INLINE void store(float* x, Vec value) { *(UnalignedVec*)x = value; }
INLINE Vec splat(float x) { return x - Vec{}; }
#else  // Microsoft's compiler
#ifdef X86
#define SIMD(name) _mm_##name##_ps
typedef __m128 Register;
INLINE Register load_register(const float* x) { return _mm_loadu_ps(x); }
INLINE void store_register(float* x, Register value) { _mm_storeu_ps(x, value); }
INLINE Register splat_register(float x) { return _mm_set1_ps(x); }
#else
#define SIMD(name) v##name##q_f32
typedef float32x4_t Register;
INLINE Register load_register(const float* x) { return vld1q_f32(x); }
INLINE void store_register(float* x, Register value) { vst1q_f32(x, value); }
INLINE Register splat_register(float x) { return vdupq_n_f32(x); }
#endif
struct Vec {
  Register x;
};
INLINE Vec load(const float* x) { return Vec{load_register(x)}; }
INLINE void store(float* x, Vec value) { store_register(x, value.x); }
INLINE Vec splat(float x) { return Vec{splat_register(x)}; }
INLINE Vec operator+(Vec a, Vec b) { return Vec{SIMD(add)(a.x, b.x)}; }
INLINE Vec operator-(Vec a, Vec b) { return Vec{SIMD(sub)(a.x, b.x)}; }
INLINE Vec operator*(Vec a, Vec b) { return Vec{SIMD(mul)(a.x, b.x)}; }
#endif

// What a token does to each row of S: K floats (and zeros up to K_padded) of d, k, e, f, and the factor of u in o.
struct Token {
  float *d, *k, *e, *f, *q_dot_k;
};

static Token token_at(float* memory, int64_t K_padded, int64_t index) {
  float* x = memory + index * (4 * K_padded + 16);
  return Token{x, x + K_padded, x + 2 * K_padded, x + 3 * K_padded, x + 4 * K_padded};
}

static void make_token(const Call& c, int64_t batch, int64_t key_head, int64_t t, const Token& to) {
  int64_t at = ((batch * c.T + t) * c.H + key_head) * c.K;
  to_floats(c.type, c.g, at, c.K, to.d);
  to_floats(c.type, c.k, at, c.K, to.k);
  to_floats(c.type, c.b, at, c.K, to.e);
  to_floats(c.type, c.q, at, c.K, to.f);
  for (int64_t i = c.K; i < c.K_padded; i++) to.d[i] = to.k[i] = to.e[i] = to.f[i] = 0;
  for (int64_t i = 0; i < c.K_padded; i++) to.d[i] = exponential(to.d[i]);
  Vec sum = splat(0);
  for (int64_t i = 0; i < c.K_padded; i += LANES) sum = sum + load(to.f + i) * load(to.k + i);
  float lanes[LANES];
  store(lanes, sum);
  float q_dot_k = 0;
  for (int i = 0; i < LANES; i++) q_dot_k += lanes[i];
  *to.q_dot_k = c.scale * q_dot_k;
  for (int64_t i = 0; i < c.K_padded; i++) {
    to.e[i] *= to.k[i] * to.d[i];
    to.f[i] *= c.scale * to.d[i];
  }
}

// One pass over a block S [K, COLUMNS]: writes what token `past` leaves (if `writes`), reads for token `next` (if
// `reads`).
INLINE void pass(float* S, int64_t K, bool writes, const Token& past, const Vec* u, bool reads, const Token& next,
                 Vec* r, Vec* p) {
  Vec R[VECTORS], P[VECTORS], U[VECTORS];
  for (int j = 0; j < VECTORS; j++) {
    R[j] = P[j] = splat(0);
    if (writes) U[j] = u[j];
  }
  for (int64_t i = 0; i < K; i++, S += COLUMNS) {
    Vec d, k, e, f;
    if (writes) d = splat(past.d[i]), k = splat(past.k[i]);
    if (reads) e = splat(next.e[i]), f = splat(next.f[i]);
    for (int j = 0; j < VECTORS; j++) {
      Vec s = load(S + j * LANES);
      if (writes) {
        s = d * s + k * U[j];
        store(S + j * LANES, s);
      }
      if (reads) {
        R[j] = R[j] + e * s;
        P[j] = P[j] + f * s;
      }
    }
  }
  if (reads)
    for (int j = 0; j < VECTORS; j++) {
      r[j] = R[j];
      p[j] = P[j];
    }
}

// Many tokens: blocks of columns are copied together, so that they stay in the nearest cache while TOKENS tokens pass.
static void many_tokens(const Call& c, int64_t batch, int64_t head, int64_t begin, int64_t end, float* memory) {
  const int64_t K = c.K, at_S = (batch * c.HV + head) * K * c.V;
  float* tokens = memory;
  float* S = memory + TOKENS * (4 * c.K_padded + 16);
  for (int64_t column = begin; column < end; column += COLUMNS) {
    int64_t n = least(end - column, COLUMNS);
    float* block = S + (column - begin) * K;
    for (int64_t i = 0; i < K; i++) {
      memcpy(block + i * COLUMNS, c.past + at_S + i * c.V + column, n * sizeof(float));
      for (int64_t j = n; j < COLUMNS; j++) block[i * COLUMNS + j] = 0;
    }
  }
  for (int64_t first = 0; first < c.T; first += TOKENS) {
    int64_t count = least(c.T - first, TOKENS);
    for (int64_t t = 0; t < count; t++)
      make_token(c, batch, head / c.heads_per_key, first + t, token_at(tokens, c.K_padded, t));
    for (int64_t column = begin; column < end; column += COLUMNS) {
      int64_t n = least(end - column, COLUMNS);
      float* block = S + (column - begin) * K;
      Vec r[VECTORS], p[VECTORS], u[VECTORS];
      Token token = token_at(tokens, c.K_padded, 0);
      pass(block, K, false, token, u, true, token, r, p);
      for (int64_t t = 0; t < count; t++) {
        int64_t at = ((batch * c.T + first + t) * c.HV + head) * c.V + column;
        float v[COLUMNS] = {0}, w[COLUMNS] = {0}, o[COLUMNS];
        to_floats(c.type, c.v, at, n, v);
        to_floats(c.type, c.w, at, n, w);
        for (int j = 0; j < VECTORS; j++) {
          u[j] = load(w + j * LANES) * load(v + j * LANES) - r[j];
          store(o + j * LANES, p[j] + splat(*token.q_dot_k) * u[j]);
        }
        from_floats(c.type, o, n, c.o, at);
        if (t + 1 < count) {
          Token next = token_at(tokens, c.K_padded, t + 1);
          pass(block, K, true, token, u, true, next, r, p);
          token = next;
        } else {
          pass(block, K, true, token, u, false, token, r, p);
        }
      }
    }
  }
  for (int64_t column = begin; column < end; column += COLUMNS) {
    int64_t n = least(end - column, COLUMNS);
    for (int64_t i = 0; i < K; i++)
      memcpy(c.present + at_S + i * c.V + column, S + (column - begin) * K + i * COLUMNS, n * sizeof(float));
  }
}

// One token, columns a multiple of LANES: S is read in the order of memory, and a second time from a near cache.
static void one_token(const Call& c, int64_t batch, int64_t head, int64_t begin, int64_t end, float* memory) {
  const int64_t K = c.K, n = end - begin, at_S = (batch * c.HV + head) * K * c.V + begin;
  const int64_t at = (batch * c.HV + head) * c.V + begin;
  const Token x = token_at(memory, c.K_padded, 0);
  float* r = memory + 4 * c.K_padded + 16;
  float *p = r + n, *u = p + n;
  make_token(c, batch, head / c.heads_per_key, 0, x);
  for (int64_t j = 0; j < 2 * n; j++) r[j] = 0;
  int64_t i = 0;
  for (; i + 4 <= K; i += 4) {
    const float* S = c.past + at_S + i * c.V;
    Vec e0 = splat(x.e[i]), e1 = splat(x.e[i + 1]), e2 = splat(x.e[i + 2]), e3 = splat(x.e[i + 3]);
    Vec f0 = splat(x.f[i]), f1 = splat(x.f[i + 1]), f2 = splat(x.f[i + 2]), f3 = splat(x.f[i + 3]);
    for (int64_t j = 0; j < n; j += LANES) {
      Vec s0 = load(S + j), s1 = load(S + c.V + j), s2 = load(S + 2 * c.V + j), s3 = load(S + 3 * c.V + j);
      store(r + j, load(r + j) + e0 * s0 + e1 * s1 + e2 * s2 + e3 * s3);
      store(p + j, load(p + j) + f0 * s0 + f1 * s1 + f2 * s2 + f3 * s3);
    }
  }
  for (; i < K; i++)
    for (int64_t j = 0; j < n; j += LANES) {
      Vec s = load(c.past + at_S + i * c.V + j);
      store(r + j, load(r + j) + splat(x.e[i]) * s);
      store(p + j, load(p + j) + splat(x.f[i]) * s);
    }
  float* wv = u + n;
  to_floats(c.type, c.v, at, n, u);
  to_floats(c.type, c.w, at, n, wv);
  for (int64_t j = 0; j < n; j++) {
    u[j] = wv[j] * u[j] - r[j];
    p[j] += *x.q_dot_k * u[j];
  }
  from_floats(c.type, p, n, c.o, at);
  for (i = 0; i < K; i++) {
    const float* from = c.past + at_S + i * c.V;
    float* to = c.present + at_S + i * c.V;
    Vec d = splat(x.d[i]), k = splat(x.k[i]);
    for (int64_t j = 0; j < n; j += LANES) store(to + j, d * load(from + j) + k * load(u + j));
  }
}

static void columns(const Call& c, int64_t batch, int64_t head, int64_t begin, int64_t end, float* memory) {
  if (c.T == 1 && (end - begin) % LANES == 0)
    one_token(c, batch, head, begin, end, memory);
  else
    many_tokens(c, batch, head, begin, end, memory);
}

}  // namespace ISA
