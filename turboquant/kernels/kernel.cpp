// Rows to codes and back for one instruction set: compiled once for each, with ISA as
// its name and VW as the floats of one of its vectors.
//
// 16 rows are worked on at a time, as columns: a row of the working buffers has one
// coordinate of all 16, so that nothing is ever added across the lanes of a vector. With
// AVX-512, common rows are coded one by one instead, in the same order (rows.h).
// Every sum is added in the order of turboquant/kernels/numpy.py, and the compiler may
// not contract a product and a sum into one rounding (-ffp-contract=off): codes and
// norms are the same bytes there and here, and decoded rows the same on any machine.
//
// Knows planes and buffers, as numpy.py does, and believes its caller, native.py.

#include "kernel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// GCC has the first from version 12 on.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(vi, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(vi, a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

namespace {

constexpr int LANES = 16;  // rows of a group
constexpr float FLOAT_MAX = 3.40282346638528859812e38f;
constexpr uint32_t INF_BITS = 0x7f800000, NAN_BITS = 0x7fc00000;

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));
typedef uint16_t vh __attribute__((vector_size(2 * VW)));
// For moving things, every instruction set has vectors of 16 bytes.
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

template <class V> INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V> INLINE void store(void* to, V v) { memcpy(to, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf choose(vi mask, vf yes, vf no) { return mask ? yes : no; }

// --- Transposition: rows to columns and back, on 16 bytes at a time ---

INLINE u8x16 low(u8x16 a, u8x16 b) {
  return SHUFFLE(u8x16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE u8x16 high(u8x16 a, u8x16 b) {
  return SHUFFLE(u8x16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                 31);
}
INLINE u16x8 low(u16x8 a, u16x8 b) {
  return SHUFFLE(u16x8, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
INLINE u16x8 high(u16x8 a, u16x8 b) {
  return SHUFFLE(u16x8, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
INLINE u32x4 low(u32x4 a, u32x4 b) { return SHUFFLE(u32x4, a, b, 0, 4, 1, 5); }
INLINE u32x4 high(u32x4 a, u32x4 b) { return SHUFFLE(u32x4, a, b, 2, 6, 3, 7); }

// Number the elements of all vectors: a pass rotates the bits of each number left by
// one. As many passes as a row's number has bits turn rows into columns.
template <int PASSES, int N, class V> INLINE void rotate(V* v) {
#pragma GCC unroll 4
  for (int pass = 0; pass < PASSES; pass++) {
    V w[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) {
      w[2 * i] = low(v[i], v[i + N / 2]);
      w[2 * i + 1] = high(v[i], v[i + N / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) v[i] = w[i];
  }
}

template <class E> struct Tile;
template <> struct Tile<uint16_t> {
  typedef u16x8 V;
  static constexpr int SIDE = 8, PASSES = 3;
};
template <> struct Tile<uint32_t> {
  typedef u32x4 V;
  static constexpr int SIDE = 4, PASSES = 2;
};

// columns: (dim, 16)
template <class E> void rows_to_columns(char* const* rows, int dim, E* columns) {
  constexpr int S = Tile<E>::SIDE;
  for (int r = 0; r < LANES; r += S)
    for (int d = 0; d < dim; d += S) {
      typename Tile<E>::V v[S];
#pragma GCC unroll 8
      for (int i = 0; i < S; i++)
        v[i] = load<typename Tile<E>::V>(rows[r + i] + d * sizeof(E));
      rotate<Tile<E>::PASSES, S>(v);
#pragma GCC unroll 8
      for (int i = 0; i < S; i++) store(columns + (d + i) * LANES + r, v[i]);
    }
}

template <class E> void columns_to_rows(const E* columns, int dim, char* const* rows) {
  constexpr int S = Tile<E>::SIDE;
  for (int r = 0; r < LANES; r += S)
    for (int d = 0; d < dim; d += S) {
      typename Tile<E>::V v[S];
#pragma GCC unroll 8
      for (int i = 0; i < S; i++)
        v[i] = load<typename Tile<E>::V>(columns + (d + i) * LANES + r);
      rotate<Tile<E>::PASSES, S>(v);
#pragma GCC unroll 8
      for (int i = 0; i < S; i++) store(rows[r + i] + d * sizeof(E), v[i]);
    }
}

// rows: 16 of so many bytes; columns: (nbytes, 16)
void bytes_to_columns(const uint8_t* const* rows, int nbytes, uint8_t* columns) {
  int j = 0;
  for (; j + 8 <= nbytes; j += 8) {
    u8x16 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      memcpy((char*)&v[i], rows[2 * i] + j, 8);
      memcpy((char*)&v[i] + 8, rows[2 * i + 1] + j, 8);
    }
    rotate<4, 8>(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) store(columns + (j + i) * LANES, v[i]);
  }
  for (; j < nbytes; j++)
    for (int r = 0; r < LANES; r++) columns[j * LANES + r] = rows[r][j];
}

void columns_to_bytes(const uint8_t* columns, int nbytes, uint8_t* const* rows) {
  int j = 0;
  for (; j + 8 <= nbytes; j += 8) {
    u8x16 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = load<u8x16>(columns + (j + i) * LANES);
    rotate<3, 8>(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      memcpy(rows[2 * i] + j, (const char*)&v[i], 8);
      memcpy(rows[2 * i + 1] + j, (const char*)&v[i] + 8, 8);
    }
  }
  for (; j < nbytes; j++)
    for (int r = 0; r < LANES; r++) rows[r][j] = columns[j * LANES + r];
}

// --- Integers of 8, 16 and 32 bits ---
// Compilers convert vectors of less than 16 bytes number by number, hence these.

INLINE vi load_bytes(const uint8_t* from) {
#if defined(__AVX512F__) && VW == 16
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__) && VW == 8
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  u8x16 x = {};
  memcpy(&x, from, VW);
  return (vi)low((u16x8)low(x, (u8x16){}), (u16x8){});
#endif
}

INLINE void store_bytes(uint8_t* to, vi x) {
#if defined(__AVX512F__) && VW == 16
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__) && VW == 8
  __m256i wide = (__m256i)x;
  __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide),
                                 _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(half, half));
#else
#if defined(__x86_64__)
  __m128i half = _mm_packs_epi32((__m128i)x, (__m128i)x);
  u8x16 bytes = (u8x16)_mm_packus_epi16(half, half);
#else
  u8x16 v = (u8x16)x;
  u8x16 bytes = SHUFFLE(u8x16, v, v, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#endif
  memcpy(to, &bytes, VW);
#endif
}

// Numbers of 16 bits as the high halves of 32, and back.
INLINE vu load_high(const void* from) {
#if VW == 4
  u16x8 x = {};
  memcpy(&x, from, 2 * VW);
  return (vu)low((u16x8){}, x);
#else
  return __builtin_convertvector(load<vh>(from), vu) << 16;
#endif
}

INLINE void store_high(void* to, vu x) {
#if defined(__AVX512F__) && VW == 16
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)(x >> 16)));
#elif defined(__AVX2__) && VW == 8
  __m256i wide = (__m256i)(x >> 16);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(wide),
                                                  _mm256_extracti128_si256(wide, 1)));
#else
#if defined(__x86_64__)
  __m128i high = _mm_srai_epi32((__m128i)x, 16);
  u16x8 v = (u16x8)_mm_packs_epi32(high, high);
#else
  u16x8 v = (u16x8)x;
  v = SHUFFLE(u16x8, v, v, 1, 3, 5, 7, 1, 3, 5, 7);
#endif
  memcpy(to, &v, 2 * VW);
#endif
}

// --- Floats of 16 and 32 bits ---

template <int TYPE> struct Element { typedef uint16_t E; };
template <> struct Element<F32> { typedef uint32_t E; };

template <int TYPE> INLINE vf widen(const void* from) {
  if constexpr (TYPE == F32) return load<vf>(from);
  if constexpr (TYPE == BF16) return (vf)load_high(from);
#if defined(__AVX512F__) && VW == 16
  return (vf)_mm512_cvtph_ps((__m256i)load<vh>(from));
#elif defined(__F16C__) && VW == 8
  return (vf)_mm256_cvtph_ps((__m128i)load<vh>(from));
#elif defined(__aarch64__) && VW == 4
  return (vf)vcvt_f32_f16((float16x4_t)load<vh>(from));
#else
  vu u = load_high(from) >> 16, magnitude = u & 0x7fff;
  vf finite = (vf)(magnitude << 13) * splat(0x1p112f);
  vf broken = (vf)(magnitude << 13 | INF_BITS);
  vf x = choose((vi)(magnitude >= 0x7c00), broken, finite);
  return (vf)((vu)x | (u & 0x8000) << 16);
#endif
}

// A finite number within float16, or NaN, to the nearest, ties to even.
INLINE uint16_t narrow_to_half(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > INF_BITS) return sign | 0x7e00;
  if (u >= 0x38800000) return sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
  // Below the normal numbers the addition rounds at the right place.
  memcpy(&x, &u, 4);
  x += 0.5f;
  memcpy(&u, &x, 4);
  return sign | (u - 0x3f000000);
}

template <int TYPE> INLINE void narrow(void* to, vf x) {
  if constexpr (TYPE == F32) {
    store(to, x);
  } else if constexpr (TYPE == BF16) {
    vu u = (vu)x;
    store_high(to, u + 0x7fff + (u >> 16 & 1));
  } else {
#if defined(__AVX512F__) && VW == 16
    store(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && VW == 8
    store(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__) && VW == 4
    store(to, vcvt_f16_f32((float32x4_t)x));
#else
    vh h;
    for (int i = 0; i < VW; i++) h[i] = narrow_to_half(x[i]);
    store(to, h);
#endif
  }
}

// --- Tables of 2**BITS floats, 16 at least ---

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool CAN_LOOK_UP = true;
#else
constexpr bool CAN_LOOK_UP = false;
#endif

template <int BITS> INLINE vf look_up(const float* table, vi index) {
  if constexpr (BITS == 0) return splat(table[0]);
#if defined(__AVX512F__) && VW == 16
  __m512i at = (__m512i)index;
  if constexpr (BITS <= 4)
    return (vf)_mm512_permutexvar_ps(at, _mm512_loadu_ps(table));
  else if constexpr (BITS == 5)
    return (vf)_mm512_permutex2var_ps(_mm512_loadu_ps(table), at,
                                      _mm512_loadu_ps(table + 16));
  else
    return (vf)_mm512_i32gather_ps(at, table, 4);
#elif defined(__AVX2__) && VW == 8
  __m256i at = (__m256i)index;
  if constexpr (BITS > 4) return (vf)_mm256_i32gather_ps(table, at, 4);
  __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
  if constexpr (BITS <= 3) return (vf)lower;
  __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
  return (vf)_mm256_blendv_ps(lower, upper, (__m256)(index << 28));
#else
#if defined(__aarch64__) && VW == 4
  if constexpr (BITS <= 4) {
    const uint8_t* t = (const uint8_t*)table;
    uint8x16x4_t bytes = {vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32),
                          vld1q_u8(t + 48)};
    return (vf)vqtbl4q_u8(bytes, (uint8x16_t)(index * 0x04040404 + 0x03020100));
  }
#endif
  vf x;
  for (int i = 0; i < VW; i++) x[i] = table[index[i]];
  return x;
#endif
}

// --- The Walsh-Hadamard transform ---

template <int R> INLINE void butterflies(vf* x) {
#pragma GCC unroll 4
  for (int half = R / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
      if (!(i & half)) {
        vf a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

// The stages block / 2 to block / R of a transform of so many columns.
template <int R> INLINE void stages(float* columns, int size, int block) {
  const int step = block / R * LANES;
  for (float* x = columns; x < columns + size * LANES; x += block * LANES)
    for (int j = 0; j < step; j += VW) {
      vf v[R];
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) v[i] = load<vf>(x + i * step + j);
      butterflies<R>(v);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) store(x + i * step + j, v[i]);
    }
}

void transform_block(float* columns, int size) {
  int block = size;
  if constexpr (VW == 16)  // which has 32 registers
    for (; block >= 16; block /= 16) stages<16>(columns, size, block);
  for (; block >= 8; block /= 8) stages<8>(columns, size, block);
  if (block == 4) stages<4>(columns, size, block);
  if (block == 2) stages<2>(columns, size, block);
}

// Each power of two in dim is a block of its own, the largest first.
void transform(float* columns, int dim) {
  for (int size = 1 << 30; size; size >>= 1)
    if (dim & size) {
      transform_block(columns, size);
      columns += size * LANES;
    }
}

// --- Sums over all coordinates, in the order of numpy.py ---

struct Pair {
  vf a, b;
};
INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }

// The first three foldings of what `term` gives for 0 to 7.
template <class F> INLINE auto fold_8(F term) {
  return ((term(0) + term(4)) + (term(2) + term(6))) +
         ((term(1) + term(5)) + (term(3) + term(7)));
}

// The others, in place; the sums are then the first row.
void fold(float* rows, int num_rows) {
  while (num_rows > 1) {
    int half = num_rows / 2;
    const float* last = rows + (num_rows - half) * LANES;
    for (int i = 0; i < half * LANES; i += VW)
      store(rows + i, load<vf>(rows + i) + load<vf>(last + i));
    num_rows -= half;
  }
}

// --- The buffers of one group of rows ---

struct Buffers {
  char* memory;
  float* columns;    // (dim, 16)
  char* typed;       // (dim, 16) of up to 4 bytes
  float *sum, *sum2; // (dim / 8, 16)
  uint8_t* symbols;  // (dim, 16)
  uint8_t* bytes;    // (dim, 16)
  char* spare;       // a row that nobody wants

  explicit Buffers(int dim) {
    size_t floats = (size_t)dim * LANES * 4;
    memory = (char*)aligned_alloc(64, 4 * floats);
    columns = (float*)memory;
    typed = memory + floats;
    sum = (float*)(typed + floats);
    sum2 = sum + dim / 8 * LANES;
    symbols = (uint8_t*)(sum2 + dim / 8 * LANES);
    bytes = symbols + dim * LANES;
    spare = (char*)(bytes + dim * LANES);
  }
  ~Buffers() { free(memory); }
};

// Pointers to 16 rows, of which the first `count` exist.
template <class P> INLINE void point(P* rows, P first, int64_t stride, int count) {
  for (int r = 0; r < LANES; r++) rows[r] = first + stride * (r < count ? r : count - 1);
}

// Rows lie too far apart for the processor to foresee them.
template <int WRITE> INLINE void prefetch(const Job& job, const char* row, int size) {
  for (int r = 0; r < LANES; r++, row += job.row_stride)
    for (int i = 0; i < size; i += 64) __builtin_prefetch(row + i, WRITE);
}

constexpr int WIDTHS[] = {8, 4, 2, 1};
constexpr uint8_t ONES[] = {0, 1, 3, 0, 15, 0, 0, 0, 255};

INLINE u8x16 splat_byte(uint8_t x) { return x - (u8x16){}; }
// Of bytes two at a time: what comes in from the neighbour is masked away.
INLINE u8x16 shift_right(u8x16 x, int n) { return (u8x16)((u16x8)x >> n); }
INLINE u8x16 shift_left(u8x16 x, int n) { return (u8x16)((u16x8)x << n); }

// --- Decoding ---

// The fields of one plane, (D * width / 8, 16), into symbols of (D, 16).
void unpack_plane(const uint8_t* bytes, int dim, int width, int shift, bool is_first,
                  uint8_t* symbols) {
  const int len = dim * width / 8;
  const u8x16 mask = splat_byte(ONES[width]);
  for (int place = 0; place < 8 / width; place++)
    for (int j = 0; j < len; j++) {
      u8x16 x = load<u8x16>(bytes + j * LANES);
      x = shift_left(shift_right(x, place * width) & mask, shift);
      uint8_t* to = symbols + (place * len + j) * LANES;
      store(to, is_first ? x : x | load<u8x16>(to));
    }
}

// The levels of symbols, (D, 16), or of a plane that has all their bits where they can be
// looked up at once, (D * width / 8, 16).
template <int BITS>
void look_up_levels(const uint8_t* bytes, int width, const float* levels, int dim,
                    float* out) {
  if constexpr (!CAN_LOOK_UP) {
    for (int i = 0; i < dim * LANES; i++) out[i] = levels[bytes[i]];
    return;
  }
  const int size = dim * width / 8 * LANES;
  for (int shift = 0; shift < 8; shift += width, out += size)
    for (int i = 0; i < size; i += VW) {
      const vi field = load_bytes(bytes + i) >> shift & ((1 << BITS) - 1);
      store(out + i, look_up<BITS>(levels, field));
    }
}

INLINE vf clamp(vf x, vf most) {
  // Where one is a NaN, x86 returns the second.
#if defined(__AVX512F__) && VW == 16
  return (vf)_mm512_max_ps((__m512)-most, _mm512_min_ps((__m512)most, (__m512)x));
#elif defined(__AVX2__) && VW == 8
  return (vf)_mm256_max_ps((__m256)-most, _mm256_min_ps((__m256)most, (__m256)x));
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)-most, _mm_min_ps((__m128)most, (__m128)x));
#else
  // A NaN compares false and stays.
  x = choose(x > most, most, x);
  return choose(x < -most, -most, x);
#endif
}

template <int TYPE> constexpr float largest() {
  return TYPE == F32 ? FLOAT_MAX : TYPE == F16 ? 65504.0f : 3.3895313892515355e38f;
}

template <int TYPE>
void scale_columns(const float* columns, const Job& job, const float* mean,
                   const float* norms, char* out) {
  constexpr int SIZE = sizeof(typename Element<TYPE>::E);
  const vf most = splat(largest<TYPE>());
  for (int d = 0; d < job.dim; d++) {
    const vf factor = splat(job.factors[d]);
    const vf offset = splat(mean ? mean[d] : 0);
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += VW) {
      vf x = load<vf>(columns + d * LANES + i) * factor * load<vf>(norms + i);
      if (mean) x = x + offset;
      narrow<TYPE>(out + (d * LANES + i) * SIZE, clamp(x, most));
    }
  }
}

float read_norm(const Job& job, int64_t row) {
  uint32_t u = 0;
  for (int k = 0; k < 4; k++)
    u |= (uint32_t)job.norms[k * job.norm_byte_stride + row * job.norm_row_stride]
         << (8 * k);
  // One NaN for all: the rounding to bfloat16 would carry another's payload over.
  if ((u & INF_BITS) == INF_BITS) u = NAN_BITS;
  float norm;
  memcpy(&norm, &u, 4);
  return norm;
}

template <int TYPE>
void decode_group(const Job& job, int head, int64_t first, int count, Buffers& use) {
  typedef typename Element<TYPE>::E E;
  const int64_t row = head * job.num_rows + first;
  prefetch<1>(job, job.heads[head] + first * job.row_stride, job.dim * sizeof(E));
  int shift = job.bits, plane = 0;
  const bool is_one = CAN_LOOK_UP && !(job.bits & (job.bits - 1));
  for (int width : WIDTHS)
    if (job.bits & width) {
      shift -= width;
      const int len = job.dim * width / 8;
      const uint8_t* rows[LANES];
      point(rows, (const uint8_t*)job.planes[plane] + row * len, len, count);
      bytes_to_columns(rows, len, use.bytes);
      if (!is_one)
        unpack_plane(use.bytes, job.dim, width, shift, plane++ == 0, use.symbols);
    }
  const uint8_t* from = is_one ? use.bytes : use.symbols;
  const int width = is_one ? job.bits : 8;
  switch (job.bits) {
#define CASE(BITS) \
  case BITS: look_up_levels<BITS>(from, width, job.levels, job.dim, use.columns); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
  transform(use.columns, job.dim);
  alignas(64) float norms[LANES] = {};
  for (int r = 0; r < count; r++) norms[r] = read_norm(job, row + r);
  const float* mean = job.mean ? job.mean + (int64_t)head * job.dim : nullptr;
  scale_columns<TYPE>(use.columns, job, mean, norms, use.typed);
  char* rows[LANES];
  point(rows, job.heads[head] + first * job.row_stride, job.row_stride, count);
  for (int r = count; r < LANES; r++) rows[r] = use.spare;
  columns_to_rows<E>((const E*)use.typed, job.dim, rows);
}

// --- Encoding ---

template <int TYPE>
void add_rows(const Job& job, int head, float* sums) {
  constexpr int SIZE = sizeof(typename Element<TYPE>::E);
  const char* row = job.heads[head];
  for (int64_t t = 0; t < job.num_rows; t++, row += job.row_stride)
    for (int d = 0; d < job.dim; d += VW) {
      vf x;
      if (job.dim - d >= VW) {
        x = widen<TYPE>(row + d * SIZE);
      } else {
        char part[VW * SIZE] = {};
        memcpy(part, row + d * SIZE, (job.dim - d) * SIZE);
        x = widen<TYPE>(part);
      }
      store(sums + d, t ? load<vf>(sums + d) + x : x);
    }
}

// What is added to a head's peak: the largest magnitude, whose bits order as integers.
template <int TYPE>
void centre_columns(const char* typed, const Job& job, const float* mean, float* columns,
                    int32_t* peaks) {
  constexpr int SIZE = sizeof(typename Element<TYPE>::E);
  vi peak[LANES / VW] = {};
  for (int d = 0; d < job.dim; d++) {
    const vf offset = splat(mean ? mean[d] : 0), sign = splat(job.signs[d]);
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += VW) {
      vf x = widen<TYPE>(typed + (d * LANES + i) * SIZE);
      if (mean) x = x - offset;
      vi magnitude = (vi)x & 0x7fffffff, before = peak[i / VW];
      vi is_more = magnitude > before;
      peak[i / VW] = (magnitude & is_more) | (before & ~is_more);
      store(columns + d * LANES + i, x * sign);
    }
  }
  memcpy(peaks, peak, sizeof peak);
}

INLINE float as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// By what a row with this peak is multiplied, so that its squares neither vanish nor grow
// too large; exactly.
INLINE float middle_scale(int32_t peak) {
  const float x = as_float(peak);
  return x < 0x1p-40f ? 0x1p84f : x < 0x1p40f ? 1 : 0x1p-84f;
}

// Whether all numbers are finite, and one is no smaller than the normal ones.
INLINE bool is_codable(int32_t peak) {
  return peak < (int32_t)INF_BITS && as_float(peak) >= 0x1p-126f;
}

// Makes columns safe to square, and returns by what each row was multiplied.
void scale_to_middle(const int32_t* peaks, const Job& job, float* columns,
                     float* scales) {
  alignas(64) int32_t masks[LANES];
  bool is_plain = true;
  for (int r = 0; r < LANES; r++) {
    scales[r] = middle_scale(peaks[r]);
    masks[r] = is_codable(peaks[r]) ? -1 : 0;
    is_plain &= masks[r] && scales[r] == 1;
  }
  if (is_plain) return;
  for (int d = 0; d < job.dim; d++)
    for (int i = 0; i < LANES; i += VW) {
      float* at = columns + d * LANES + i;
      vf x = load<vf>(at) * load<vf>(scales + i);
      store(at, choose(load<vi>(masks + i), x, splat(0 * job.signs[d])));
    }
}

// Makes the transform orthonormal, and returns each row's factor to length sqrt(dim).
void stretch_columns(const Job& job, float* columns, float* sum, float* stretch) {
  const int eighth = job.dim / 8;
  for (int j = 0; j < eighth; j++)
    for (int i = 0; i < LANES; i += VW)
      store(sum + j * LANES + i, fold_8([&](int k) __attribute__((always_inline)) {
              const int d = j + k * eighth;
              float* at = columns + d * LANES + i;
              vf x = load<vf>(at) * splat(job.factors[d]);
              store(at, x);
              return x * x;
            }));
  fold(sum, eighth);
  const float root = (float)sqrt((double)job.dim);
  for (int r = 0; r < LANES; r++) {
    float length = sqrtf(sum[r]);
    stretch[r] = root / (length == 0 ? 1 : length);
  }
}

// How many boundaries are not above x, by bisection: tables[s] has those of step s.
template <int BITS, int STEP> INLINE vi bisect(vf x, vi index, const float (*tables)[128]) {
  if constexpr (STEP == BITS) {
    return index;
  } else {
    vi is_above = x >= look_up<STEP>(tables[STEP], index);
    return bisect<BITS, STEP + 1>(x, index + index - is_above, tables);
  }
}

template <int BITS> INLINE vi nearest(vf x, const float (*tables)[128],
                                      [[maybe_unused]] const float* bounds) {
  // Without a look-up instruction, comparing with each is faster.
  if constexpr (!CAN_LOOK_UP && BITS <= 4) {
    vi index = {};
#pragma GCC unroll 16
    for (int i = 0; i < (1 << BITS) - 1; i++) index -= x >= splat(bounds[i]);
    return index;
  }
  return bisect<BITS, 0>(x, (vi){}, tables);
}

template <int BITS> INLINE vi to_symbol(vi index) {
  if constexpr (BITS % 2 == 0 || BITS == 1) return index;
  constexpr int MASK = (1 << (BITS - 1)) - 1;
  vi is_negative = 1 - (index >> (BITS - 1));
  return ((index ^ (is_negative * MASK)) & MASK) << 1 | is_negative;
}

template <int BITS>
void quantize_columns(const Job& job, const float* stretch, Buffers& use) {
  const int eighth = job.dim / 8;
  alignas(64) float tables[8][128] = {};
  for (int step = 0; step < BITS; step++)
    for (int i = 0; i < 1 << step; i++)
      tables[step][i] = job.boundaries[(2 * i + 1) * (1 << (BITS - 1 - step)) - 1];
  for (int j = 0; j < eighth; j++)
    for (int i = 0; i < LANES; i += VW) {
      const vf factor = load<vf>(stretch + i);
      Pair sums = fold_8([&](int k) __attribute__((always_inline)) {
        const int at = (j + k * eighth) * LANES + i;
        vf x = load<vf>(use.columns + at);
        vi index = nearest<BITS>(x * factor, tables, job.boundaries);
        store_bytes(use.symbols + at, to_symbol<BITS>(index));
        vf level = look_up<BITS>(job.levels, index);
        return Pair{x * level, level * level};
      });
      store(use.sum + j * LANES + i, sums.a);
      store(use.sum2 + j * LANES + i, sums.b);
    }
  fold(use.sum, eighth);
  fold(use.sum2, eighth);
}

void pack_plane(const uint8_t* symbols, int dim, int width, int shift, uint8_t* bytes) {
  const int len = dim * width / 8;
  const u8x16 mask = splat_byte(ONES[width]);
  for (int j = 0; j < len; j++) {
    u8x16 x = {};
    for (int place = 0; place < 8 / width; place++) {
      u8x16 field = load<u8x16>(symbols + (place * len + j) * LANES);
      x |= shift_left(shift_right(field, shift) & mask, place * width);
    }
    store(bytes + j * LANES, x);
  }
}

void write_norm(const Job& job, int64_t row, int32_t peak, float norm) {
  uint32_t u = NAN_BITS;
  if (norm > FLOAT_MAX) norm = FLOAT_MAX;
  if (peak < (int32_t)INF_BITS) memcpy(&u, &norm, 4);
  for (int k = 0; k < 4; k++)
    job.norms[k * job.norm_byte_stride + row * job.norm_row_stride] = u >> (8 * k);
}

template <int TYPE>
void encode_group(const Job& job, int head, int64_t first, int count, Buffers& use) {
  typedef typename Element<TYPE>::E E;
  char* rows[LANES];
  point(rows, job.heads[head] + first * job.row_stride, job.row_stride, count);
  rows_to_columns<E>(rows, job.dim, (E*)use.typed);
  prefetch<0>(job, rows[0] + LANES * job.row_stride, job.dim * sizeof(E));
  const float* mean = job.mean ? job.mean + (int64_t)head * job.dim : nullptr;
  alignas(64) int32_t peaks[LANES];
  alignas(64) float scales[LANES], stretch[LANES];
  centre_columns<TYPE>(use.typed, job, mean, use.columns, peaks);
  scale_to_middle(peaks, job, use.columns, scales);
  transform(use.columns, job.dim);
  stretch_columns(job, use.columns, use.sum, stretch);
  switch (job.bits) {
#define CASE(BITS) case BITS: quantize_columns<BITS>(job, stretch, use); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
  const int64_t row = head * job.num_rows + first;
  const float root = (float)sqrt((double)job.dim);
  for (int r = 0; r < count; r++)
    write_norm(job, row + r, peaks[r], use.sum[r] / use.sum2[r] * root / scales[r]);
  int shift = job.bits, plane = 0;
  for (int width : WIDTHS)
    if (job.bits & width) {
      shift -= width;
      const int len = job.dim * width / 8;
      uint8_t* to[LANES];
      point(to, job.planes[plane++] + row * len, len, count);
      for (int r = count; r < LANES; r++) to[r] = (uint8_t*)use.spare;
      pack_plane(use.symbols, job.dim, width, shift, use.bytes);
      columns_to_bytes(use.bytes, len, to);
    }
}

// Whole jobs row by row, where that is known and faster.
#if VW == 16
#include "rows.h"
template <int TYPE> bool decode_by_row(const Job& job) {
  return run_by_row<DecodeRows, TYPE>(job);
}
template <int TYPE> bool encode_by_row(const Job& job) {
  return run_by_row<EncodeRows, TYPE>(job);
}
#else
template <int> bool decode_by_row(const Job&) { return false; }
template <int> bool encode_by_row(const Job&) { return false; }
#endif

template <class F> int for_each_group(const Job& job, F run) {
  Buffers use(job.dim);
  if (!use.memory) return 1;
  for (int head = 0; head < job.num_heads; head++)
    for (int64_t first = 0; first < job.num_rows; first += LANES) {
      int64_t left = job.num_rows - first;
      run(head, first, left < LANES ? (int)left : LANES, use);
    }
  return 0;
}

template <int TYPE> void add_all(const Job& job, float* sums) {
  // Rows of the sums are a whole number of vectors apart.
  const int64_t stride = (job.dim + 15) / 16 * 16;
  for (int head = 0; head < job.num_heads; head++)
    add_rows<TYPE>(job, head, sums + head * stride);
}

// --- Bytes of numbers into planes, and back ---

INLINE u8x16 even(u8x16 a, u8x16 b) {
#if defined(__x86_64__)
  const u16x8 mask = (u16x8){} + 0xff;
  return (u8x16)_mm_packus_epi16((__m128i)((u16x8)a & mask), (__m128i)((u16x8)b & mask));
#else
  return SHUFFLE(u8x16, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#endif
}
INLINE u8x16 odd(u8x16 a, u8x16 b) {
#if defined(__x86_64__)
  return (u8x16)_mm_packus_epi16((__m128i)((u16x8)a >> 8), (__m128i)((u16x8)b >> 8));
#else
  return SHUFFLE(u8x16, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#endif
}

template <int SIZE> INLINE void split_16(const char* from, uint8_t* const* to, int64_t i) {
  u8x16 v[SIZE];
  for (int k = 0; k < SIZE; k++) v[k] = load<u8x16>(from + i * SIZE + k * 16);
  if constexpr (SIZE == 2) {
    store(to[0] + i, even(v[0], v[1]));
    store(to[1] + i, odd(v[0], v[1]));
  } else {
    u8x16 a = even(v[0], v[1]), b = even(v[2], v[3]);
    u8x16 c = odd(v[0], v[1]), d = odd(v[2], v[3]);
    store(to[0] + i, even(a, b));
    store(to[1] + i, even(c, d));
    store(to[2] + i, odd(a, b));
    store(to[3] + i, odd(c, d));
  }
}

template <int SIZE> INLINE void join_16(uint8_t* const* from, char* to, int64_t i) {
  u8x16 v[SIZE];
  for (int k = 0; k < SIZE; k++) v[k] = load<u8x16>(from[k] + i);
  to += i * SIZE;
  if constexpr (SIZE == 2) {
    store(to, low(v[0], v[1]));
    store(to + 16, high(v[0], v[1]));
  } else {
    u16x8 a = (u16x8)low(v[0], v[1]), b = (u16x8)low(v[2], v[3]);
    u16x8 c = (u16x8)high(v[0], v[1]), d = (u16x8)high(v[2], v[3]);
    store(to, low(a, b));
    store(to + 16, high(a, b));
    store(to + 32, low(c, d));
    store(to + 48, high(c, d));
  }
}

template <int SIZE, bool IS_SPLIT> void move_bytes(const Bytes& job) {
  for (int head = 0; head < job.num_heads; head++) {
    char* numbers = job.heads[head];
    uint8_t* planes[SIZE];
    for (int k = 0; k < SIZE; k++) planes[k] = job.planes[k] + head * job.plane_stride;
    int64_t i = 0;
    for (; i + 16 <= job.count; i += 16)
      if constexpr (IS_SPLIT)
        split_16<SIZE>(numbers, planes, i);
      else
        join_16<SIZE>(planes, numbers, i);
    for (; i < job.count; i++)
      for (int k = 0; k < SIZE; k++)
        if constexpr (IS_SPLIT)
          planes[k][i] = numbers[i * SIZE + k];
        else
          numbers[i * SIZE + k] = planes[k][i];
  }
}

// --- Integers in a basis, to rows ---

constexpr int NUM_GROUPS = VW == 16 ? 2 : 1;  // of 16 rows that are multiplied at once

// 16 rows at a time as columns, as everywhere here.
struct LongBuffers {
  char* memory;
  float* panels;   // (groups of 16 rows, coefficients, 16)
  float* columns;  // (NUM_GROUPS, dim, 16), one head of them
  char* typed;     // (dim, 16) of up to 4 bytes
  float* row;      // one coefficient of all rows, or two as integers
  float* factors;  // what the integers of each row of the matrix count
  int16_t* whole;  // (width, width), the matrix as integers
  char* spare;     // a row that nobody wants

  explicit LongBuffers(const Long& job) {
    constexpr int AT_ONCE = NUM_GROUPS * LANES;
    const int64_t width = 2 * job.num_joined * job.dim;
    const int64_t padded = (job.num_rows + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    const int64_t head = job.dim * LANES;
    const int64_t floats = padded * width + (NUM_GROUPS + 1) * head +
                           2 * (padded + LANES) + width + job.dim;
    const int64_t nbytes = floats * 4 + width * width * 2;
    memory = (char*)aligned_alloc(64, (nbytes + 63) / 64 * 64);
    panels = (float*)memory;
    columns = panels + padded * width;
    typed = (char*)(columns + NUM_GROUPS * head);
    row = columns + (NUM_GROUPS + 1) * head;
    factors = row + 2 * (padded + LANES);
    whole = (int16_t*)(factors + width);
    spare = (char*)(whole + width * width);
  }
  ~LongBuffers() { free(memory); }
};

// All that is known of one layer.
struct OneLayer : Long, LongLayer {
  OneLayer(const Long& job, int number) : Long(job), LongLayer(job.layers[number]) {
    heads += (int64_t)number * 2 * num_joined * num_parts;
    scales += number * num_parts * num_rows;
    cos += number * turn_stride;
    sin += number * turn_stride;
  }
};

struct Digits {
  float numbers[256][4];
  int16_t integers[256][4];

  void of(float (&row)[4], int byte) const { memcpy(row, numbers[byte], sizeof row); }
  void of(int16_t (&row)[4], int byte) const { memcpy(row, integers[byte], sizeof row); }
};

void make_digits(const Stream& stream, Digits& digits) {
  if (stream.per_byte == 1) return;  // which are looked up nowhere
  const int levels = 2 * stream.limit + 1;
  for (int i = 0; i < 256; i++)
    for (int k = 0, left = i; k < 4; k++, left /= levels)
      digits.numbers[i][k] = digits.integers[i][k] = left % levels - stream.limit;
}

// The low bits of a coefficient in 8 rows, a byte for each.
INLINE uint64_t low_bits(const Stream& stream, const uint8_t* low) {
  uint64_t found = 0;
  for (int bit = 0; bit < stream.low_bits; bit++) {
    // The first row's is the highest bit of its plane's byte.
    const uint64_t apart = low[bit * stream.plane_stride] * 0x0101010101010101u;
    const uint64_t ones = (apart & 0x0102040810204080u) + 0x7f7f7f7f7f7f7f7fu;
    found |= (ones >> 7 & 0x0101010101010101u) << bit;
  }
  return found;
}

// One coefficient of all rows; beyond them some numbers may be written.
template <class N>
void unpack_row(const Stream& stream, const Digits& digits, int64_t rank,
                int64_t num_rows, N* row) {
  const uint8_t* packed = stream.packed + rank * stream.packed_stride;
  if (stream.per_byte > 1) {
    for (int64_t t = 0; t < num_rows; t += stream.per_byte)
      digits.of(*(N(*)[4])(row + t), *packed++);
    return;
  }
  if (!stream.low_bits) {
    for (int64_t t = 0; t < num_rows; t++) row[t] = packed[t] - stream.limit;
    return;
  }
  const uint8_t* low = stream.low + rank * stream.low_stride;
  for (int64_t t = 0; t < num_rows; t += 8) {
    const uint64_t found = low_bits(stream, low + t / 8);
    uint8_t bits[8];
    memcpy(bits, &found, 8);
    const int count = num_rows - t < 8 ? num_rows - t : 8;
    for (int i = 0; i < count; i++)
      row[t + i] = (packed[t + i] - stream.limit) * (1 << stream.low_bits) + bits[i];
  }
}

// A coefficient of a part in all rows, and zeros up to so many; false where it is zero.
template <class N>
bool unpack_one(const OneLayer& job, int64_t number, const Digits* digits, int64_t padded,
                N* row) {
  const int kind = job.kinds[number];
  if (kind == NO_STREAM) return false;
  unpack_row(job.streams[kind], digits[kind], job.ranks[number], job.num_rows, row);
  memset(row + job.num_rows, 0, (padded - job.num_rows) * sizeof(N));
  return true;
}

void unpack_part(const OneLayer& job, int part, int count, const Digits* digits,
                 LongBuffers& use) {
  const int64_t groups = (job.num_rows + LANES - 1) / LANES;
  const int64_t first = (int64_t)part * 2 * job.num_joined * job.dim;
  for (int c = 0; c < count; c++) {
    float* to = use.panels + c * LANES;
    const bool is_coded = unpack_one(job, first + c, digits, groups * LANES, use.row);
    for (int64_t g = 0; g < groups; g++, to += count * LANES)
      if (is_coded)
        memcpy(to, use.row + g * LANES, LANES * 4);
      else
        memset(to, 0, LANES * 4);
  }
}

// Sums over coefficients in their order, of R numbers of 16 rows.
template <int R>
INLINE void multiply(const float* matrix, int width, const float* panel, int count,
                     const vf* scale, const float* mean, float* columns) {
  vf sums[R][LANES / VW] = {};
  for (int c = 0; c < count; c++)
#pragma GCC unroll 16
    for (int i = 0; i < LANES / VW; i++) {
      const vf x = load<vf>(panel + c * LANES + i * VW);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r][i] += splat(matrix[r * width + c]) * x;
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int i = 0; i < LANES / VW; i++)
      store(columns + r * LANES + i * VW, sums[r][i] * scale[i] + splat(mean[r]));
}

// --- The same with integers, where rows have 16 bits ---

// As integers of 16 bits, the numbers of a row of the matrix are as exact as its largest
// one is to 1 in 65,534: rows of 16 bits are rounded hundreds of times coarser. Sums are
// exact, and so the same on any machine.

int largest_of(const int16_t* row, int64_t count) {
  int16_t most = 0, least = 0;
  for (int64_t t = 0; t < count; t++) {
    most = row[t] > most ? row[t] : most;
    least = row[t] < least ? row[t] : least;
  }
  return most > -least ? most : -least;
}

// Coefficients two by two; returns the sum of the largest of each.
int64_t unpack_pairs(const OneLayer& job, int part, int count, const Digits* digits,
                     LongBuffers& use) {
  constexpr int AT_ONCE = NUM_GROUPS * LANES;
  const int64_t padded = (job.num_rows + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  const int64_t first = (int64_t)part * 2 * job.num_joined * job.dim;
  int16_t* const rows = (int16_t*)use.row;
  const int64_t stride = padded + LANES;
  int64_t sum = 0;
  for (int c = 0; c < count; c += 2) {
    for (int k = 0; k < 2; k++) {
      int16_t* row = rows + k * stride;
      if (c + k < count && unpack_one(job, first + c + k, digits, padded, row))
        sum += largest_of(row, padded);
      else
        memset(row, 0, padded * 2);
    }
    int16_t* to = (int16_t*)use.panels + c * LANES;
    for (int64_t t = 0; t < padded; t += LANES, to += (count + count % 2) * LANES)
      for (int i = 0; i < LANES; i += VW) {
        const vu first = load_high(rows + t + i) >> 16;
        store(to + 2 * i, first | load_high(rows + stride + t + i));
      }
  }
  return sum;
}

constexpr int NUM_WHOLE = 8;  // rows of the matrix whose integers lie together

// The largest magnitude of some numbers, or a very small one.
float largest_size(const float* row, int count) {
  const int whole = count / VW * VW;
  vf largest = splat(0x1p-100f);
  for (int c = 0; c < whole; c += VW) {
    const vf size = (vf)(load<vi>(row + c) & 0x7fffffff);
    largest = choose(size > largest, size, largest);
  }
  float most = 0;
  for (int i = 0; i < VW; i++) most = largest[i] > most ? largest[i] : most;
  for (int c = whole; c < count; c++) {
    const float size = row[c] < 0 ? -row[c] : row[c];
    most = size > most ? size : most;
  }
  return most;
}

// The matrix as integers up to a limit, which is below 2**15.
void round_matrix(const float* matrix, int width, int count, int limit, int16_t* whole,
                  float* factors) {
  const int even = count + count % 2;
  // Behind the point of a number of this size no bits are left.
  const float round = 0x1.8p23f;
  for (int n = 0; n < width; n++) {
    const float* row = matrix + (int64_t)n * width;
    const float most = largest_size(row, count), factor = limit / most;
    factors[n] = most / limit;
    int16_t* to = whole + (int64_t)(n / NUM_WHOLE) * NUM_WHOLE * even + n % NUM_WHOLE * 2;
    for (int c = 0; c < even; c++) {
      const float rounded = (c < count ? row[c] : 0) * factor + round;
      uint32_t bits;
      memcpy(&bits, &rounded, 4);
      to[c / 2 * 2 * NUM_WHOLE + c % 2] = bits;  // its last bits are the integer's
    }
  }
}

// A sum, and of each lane two products of 16 bits.
INLINE vi add_products(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__) && VW == 16
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && VW == 16
  return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && VW == 8
  return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && VW == 4
  return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

constexpr int NUM_SUMS = VW == 4 ? 2 : VW == 8 ? 4 : 8;

// Sums of a few numbers of some groups of 16 rows.
INLINE void multiply_pairs(const int16_t* matrix, int dim, int count,
                           const int16_t* panels, const vf* scale, const float* factors,
                           const float* mean, float* columns) {
  constexpr int K = LANES / VW * NUM_GROUPS;  // vectors of rows
  vi sums[NUM_SUMS][K] = {};
  for (int c = 0; c < count; c += 2) {
    vi x[K];
#pragma GCC unroll 16
    for (int i = 0; i < K; i++)
      x[i] = load<vi>(panels + (i * VW / LANES * count + c) * LANES + i * VW % LANES * 2);
#pragma GCC unroll 16
    for (int r = 0; r < NUM_SUMS; r++) {
      int32_t pair;
      memcpy(&pair, matrix + c * NUM_WHOLE + r * 2, 4);
#pragma GCC unroll 16
      for (int i = 0; i < K; i++) sums[r][i] = add_products(sums[r][i], x[i], pair - (vi){});
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < NUM_SUMS; r++)
#pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      const vf sum = __builtin_convertvector(sums[r][i], vf);
      const int column = i * VW / LANES * dim + r;
      store(columns + column * LANES + i * VW % LANES,
            sum * (scale[i] * splat(factors[r])) + splat(mean[r]));
    }
}

// Turns the columns of a key to their positions, of which the first is given.
void turn(const OneLayer& job, int64_t first, float* columns) {
  const float* cos = job.cos + first * job.num_pairs;
  const float* sin = job.sin + first * job.num_pairs;
  const int far = job.is_traditional ? 1 : job.num_pairs;
  for (int pair = 0; pair < job.num_pairs; pair++) {
    float* one = columns + (job.is_traditional ? 2 * pair : pair) * LANES;
    float* two = one + far * LANES;
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += VW) {
      const vf a = load<vf>(one + i), b = load<vf>(two + i);
      const vf c = load<vf>(cos + pair * LANES + i), s = load<vf>(sin + pair * LANES + i);
      store(one + i, a * c - b * s);
      store(two + i, a * s + b * c);
    }
  }
}

// A head's first row in memory, of the heads whose keys and values make one part.
INLINE char* first_row(const OneLayer& job, int part, int head) {
  const int heads = job.num_joined, side = head / heads;
  return job.heads[(side * job.num_parts + part) * heads + head % heads];
}

// Some rows of one head, that are to be written.
struct HeadRows {
  char* row;
  int64_t stride;
  int count, nbytes;

  // Has the memory of its share of them fetched while what is written there is computed.
  void fetch(int begin, int end, int of) const {
    for (int r = begin * count / of; r < end * count / of; r++)
      for (int i = 0; i < nbytes; i += 64) __builtin_prefetch(row + r * stride + i, 1);
  }
};

// Writes the columns of one head, which is one of a part's.
template <int TYPE>
void write_columns(const OneLayer& job, char* row, int count, const float* columns,
                   LongBuffers& use) {
  typedef typename Element<TYPE>::E E;
  const vf most = splat(largest<TYPE>());
  for (int i = 0; i < job.dim * LANES; i += VW)
    narrow<TYPE>(use.typed + i * sizeof(E), clamp(load<vf>(columns + i), most));
  char* rows[LANES];
  point(rows, row, job.row_stride, count);
  for (int r = count; r < LANES; r++) rows[r] = use.spare;
  columns_to_rows<E>((const E*)use.typed, job.dim, rows);
}

// Writes some columns of 16 rows that lie in a panel.
void multiply_panel(const float* matrix, int width, int num_columns, const float* panel,
                    int count, const vf* scale, const float* mean, float* columns) {
  for (int n = 0; n < num_columns; n += NUM_SUMS)
    multiply<NUM_SUMS>(matrix + (int64_t)n * width, width, panel, count, scale, mean + n,
                       columns + n * LANES);
}

// One part's matrix, as floats or as integers.
struct PartMatrix {
  int count;
  const float* numbers;
  const int16_t* whole;  // or null
  const float* factors;
};

// Unpacks a part's coefficients, and says what to multiply them with.
template <int TYPE>
PartMatrix prepare(const OneLayer& job, int part, const Digits* digits, LongBuffers& use) {
  const int width = 2 * job.num_joined * job.dim, count = job.counts[part];
  const float* matrix = job.matrix + (int64_t)part * width * width;
  int64_t limit = 0;
  if (TYPE != F32) {
    const int64_t sum = unpack_pairs(job, part, count, digits, use);
    limit = INT32_MAX / (sum ? sum : 1);
    limit = limit < INT16_MAX ? limit : INT16_MAX;
  }
  if (limit == INT16_MAX && job.whole)
    return {count, matrix, job.whole[part], job.factors + (int64_t)part * width};
  // With fewer bits the matrix would be too coarse.
  if (limit > INT16_MAX / 4) {
    round_matrix(matrix, width, count, limit, use.whole, use.factors);
    return {count, matrix, use.whole, use.factors};
  }
  unpack_part(job, part, count, digits, use);
  return {count, matrix, nullptr, nullptr};
}

// Writes the columns of one head of some groups of 16 rows.
void multiply_head(const PartMatrix& matrix, const OneLayer& job, int head, int64_t first,
                   const vf* scale, const float* mean, const HeadRows& rows,
                   LongBuffers& use) {
  const int dim = job.dim, width = 2 * job.num_joined * dim;
  const int count = matrix.count, even = count + count % 2, begin = head * dim;
  if (!matrix.whole) {
    multiply_panel(matrix.numbers + (int64_t)begin * width, width, dim,
                   use.panels + first * count, count, scale, mean + begin, use.columns);
    return;
  }
  for (int n = 0; n < dim; n += NUM_SUMS) {
    rows.fetch(n, n + NUM_SUMS, dim);
    const int number = begin + n;
    const int16_t* whole = matrix.whole +
                           (int64_t)(number / NUM_WHOLE) * NUM_WHOLE * even +
                           number % NUM_WHOLE * 2;
    multiply_pairs(whole, dim, even, (int16_t*)use.panels + first * even, scale,
                   matrix.factors + number, mean + number, use.columns + n * LANES);
  }
}

template <int TYPE>
void restore_part(const OneLayer& job, int part, const Digits* digits, LongBuffers& use) {
  const int width = 2 * job.num_joined * job.dim;
  const float* mean = job.mean + (int64_t)part * width;
  const PartMatrix matrix = prepare<TYPE>(job, part, digits, use);
  const int at_once = (matrix.whole ? NUM_GROUPS : 1) * LANES;
  for (int64_t first = 0; first < job.num_rows; first += at_once) {
    const int64_t left = job.num_rows - first;
    const int count = left < at_once ? left : at_once;
    alignas(64) float scales[NUM_GROUPS * LANES] = {};
    memcpy(scales, job.scales + part * job.num_rows + first, count * 4);
    vf scale[NUM_GROUPS * LANES / VW];
    memcpy(scale, scales, sizeof scale);
    for (int head = 0; head < 2 * job.num_joined; head++) {
      char* row = first_row(job, part, head) + first * job.row_stride;
      const HeadRows rows = {row, job.row_stride, count, job.dim * (TYPE == F32 ? 4 : 2)};
      multiply_head(matrix, job, head, first, scale, mean, rows, use);
      for (int g = 0; g < count; g += LANES) {
        float* columns = use.columns + g * job.dim;
        if (head < job.num_joined) turn(job, first + g, columns);
        const int some = count - g < LANES ? count - g : LANES;
        write_columns<TYPE>(job, row + g * job.row_stride, some, columns, use);
      }
    }
  }
}

template <int TYPE> int restore_long(const Long& job) {
  LongBuffers use(job);
  Digits* digits = (Digits*)malloc(job.num_streams * sizeof(Digits));
  if (use.memory && digits) {
    for (int i = 0; i < job.num_streams; i++) make_digits(job.streams[i], digits[i]);
    for (int number = 0; number < job.num_layers; number++) {
      const OneLayer layer(job, number);
      for (int part = 0; part < job.num_parts; part++)
        restore_part<TYPE>(layer, part, digits, use);
    }
  }
  const bool has_failed = !use.memory || !digits;
  free(digits);
  return has_failed;
}

int multiply_rows(const Product& job) {
  const int64_t size = (int64_t)job.width * 4;
  char* memory = (char*)aligned_alloc(64, 2 * (LANES + 1) * size);
  if (!memory) return 1;
  float* panel = (float*)memory;
  float* columns = panel + LANES * job.width;
  float* zero = columns + LANES * job.width;
  char* spare = (char*)(zero + job.width);
  memset(zero, 0, size);
  vf one[LANES / VW];
  for (vf& each : one) each = splat(1);
  for (int64_t first = 0; first < job.num_rows; first += LANES) {
    const int64_t left = job.num_rows - first;
    const int count = left < LANES ? left : LANES;
    char* rows[LANES];
    point(rows, (char*)job.rows + first * size, size, count);
    rows_to_columns<uint32_t>(rows, job.width, (uint32_t*)panel);
    multiply_panel(job.matrix, job.width, job.width, panel, job.width, one, zero, columns);
    point(rows, (char*)job.out + first * size, size, count);
    for (int r = count; r < LANES; r++) rows[r] = spare;
    columns_to_rows<uint32_t>((const uint32_t*)columns, job.width, rows);
  }
  free(memory);
  return 0;
}

}  // namespace

#define BY_TYPE(call) \
  (job->dtype == F32 ? call<F32> : job->dtype == F16 ? call<F16> : call<BF16>)

EXPORT int JOIN(turboquant_decode_, ISA)(const Job* job) {
  if (BY_TYPE(decode_by_row)(*job)) return 0;
  auto decode = BY_TYPE(decode_group);
  return for_each_group(*job, [&](int head, int64_t first, int count, Buffers& use) {
    decode(*job, head, first, count, use);
  });
}

EXPORT int JOIN(turboquant_encode_, ISA)(const Job* job) {
  if (BY_TYPE(encode_by_row)(*job)) return 0;
  auto encode = BY_TYPE(encode_group);
  return for_each_group(*job, [&](int head, int64_t first, int count, Buffers& use) {
    encode(*job, head, first, count, use);
  });
}

EXPORT int JOIN(turboquant_sum_, ISA)(const Job* job, float* sums) {
  BY_TYPE(add_all)(*job, sums);
  return 0;
}

EXPORT int JOIN(turboquant_split_, ISA)(const Bytes* job) {
  (job->itemsize == 2 ? move_bytes<2, true> : move_bytes<4, true>)(*job);
  return 0;
}

EXPORT int JOIN(turboquant_join_, ISA)(const Bytes* job) {
  (job->itemsize == 2 ? move_bytes<2, false> : move_bytes<4, false>)(*job);
  return 0;
}

EXPORT int JOIN(turboquant_restore_, ISA)(const Long* job) {
  return BY_TYPE(restore_long)(*job);
}

EXPORT int JOIN(turboquant_multiply_, ISA)(const Product* job) {
  return multiply_rows(*job);
}

EXPORT int JOIN(turboquant_round_, ISA)(const Rounding* job) {
  round_matrix(job->matrix, job->width, job->count, INT16_MAX, job->whole, job->factors);
  return 0;
}
