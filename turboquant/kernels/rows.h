// Codes of 2 to 4 bits row by row, for vectors of 16 floats and rows of 64, 128 or 256: a
// row is in registers, 16 coordinates in each, and nothing is transposed. Stages of the
// transform and sums that cross lanes keep the order that kernel.cpp has for columns.
// Included by kernel.cpp.

// Every pair of lanes that are HALF apart, exchanged.
template <int HALF> INLINE vf exchange(vf x) {
  const __m512 y = (__m512)x;
  if constexpr (HALF == 8) return (vf)_mm512_shuffle_f32x4(y, y, 0x4e);
  if constexpr (HALF == 4) return (vf)_mm512_shuffle_f32x4(y, y, 0xb1);
  if constexpr (HALF == 2) return (vf)_mm512_permute_ps(y, 0x4e);
  return (vf)_mm512_permute_ps(y, 0xb1);
}

// The sum of such a pair in its first lane, and the difference in its second. The product
// with 1 or -1 is exact, so that there is one rounding.
template <int HALF> INLINE vf cross(vf x) {
  constexpr float SIGN[2] = {1, -1};
#define LANE(i) SIGN[(i) / HALF & 1]
  constexpr vf signs = {LANE(0),  LANE(1),  LANE(2),  LANE(3),  LANE(4),  LANE(5),
                        LANE(6),  LANE(7),  LANE(8),  LANE(9),  LANE(10), LANE(11),
                        LANE(12), LANE(13), LANE(14), LANE(15)};
#undef LANE
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)signs, (__m512)exchange<HALF>(x));
}

// The stages of `transform`, in its order.
template <int N> INLINE void transform_row(vf* x) {
  butterflies<N>(x);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) x[i] = cross<1>(cross<2>(cross<4>(cross<8>(x[i]))));
}

// Calls `run` for each plane of the codes, the widest first: its number, its width, and
// where its bits stand in a symbol.
template <int BITS, class F> INLINE void for_each_plane(F run) {
  int shift = BITS, plane = 0;
#pragma GCC unroll 4
  for (int width = 8; width; width /= 2)
    if (BITS & width) run(plane++, width, shift -= width);
}

struct Row {
  char* numbers;
  int64_t number;      // among all rows of all heads
  const float* mean;   // its head's, or null
  uint8_t* planes[2];  // its part of each: no more for 2 to 4 bits
};

template <int BITS, int D> INLINE Row row_at(const Job& job, int head, int64_t t) {
  Row row;
  row.numbers = job.heads[head] + t * job.row_stride;
  row.number = head * job.num_rows + t;
  row.mean = job.mean ? job.mean + (int64_t)head * D : nullptr;
  for_each_plane<BITS>([&](int plane, int width, int) __attribute__((always_inline)) {
    row.planes[plane] = job.planes[plane] + row.number * (D * width / 8);
  });
  return row;
}

// Calls `run` with up to 16 rows of a head at a time.
template <int BITS, int D, class F> INLINE void for_some_rows(const Job& job, F run) {
  for (int head = 0; head < job.num_heads; head++)
    for (int64_t first = 0; first < job.num_rows; first += LANES) {
      const int64_t left = job.num_rows - first;
      const int count = left < LANES ? left : LANES;
      Row rows[LANES];
      for (int r = 0; r < count; r++) rows[r] = row_at<BITS, D>(job, head, first + r);
      run(rows, count);
    }
}

// --- Decoding ---

// The symbols of 16 coordinates, from the planes of one row.
template <int BITS, int D> INLINE vi symbols_at(uint8_t* const* planes, int d) {
  vi symbols = {};
  for_each_plane<BITS>([&](int plane, int width, int shift)
                           __attribute__((always_inline)) {
    const int len = D * width / 8;
    vi field = load_bytes(planes[plane] + d % len) >> (d / len * width);
    symbols |= (field & ((1 << width) - 1)) << shift;
  });
  return symbols;
}

typedef uint16_t u16x32 __attribute__((vector_size(64)));

// As `narrow` does it, two vectors at a time.
template <int TYPE> INLINE void narrow_pair(char* to, vf x, vf y) {
  if constexpr (TYPE != BF16) {
    narrow<TYPE>(to, x);
    narrow<TYPE>(to + LANES * sizeof(typename Element<TYPE>::E), y);
  } else {
    vu a = (vu)x, b = (vu)y;
    a = a + 0x7fff + (a >> 16 & 1);
    b = b + 0x7fff + (b >> 16 & 1);
    store(to, SHUFFLE(u16x32, (u16x32)a, (u16x32)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55,
                      57, 59, 61, 63));
  }
}

template <int TYPE, int BITS, int D>
INLINE void decode_row(const Job& job, const Row& row) {
  constexpr int N = D / LANES, SIZE = sizeof(typename Element<TYPE>::E);
  const vf most = splat(largest<TYPE>()), norm = splat(read_norm(job, row.number));
  vf x[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; i++)
    x[i] = look_up<BITS>(job.levels, symbols_at<BITS, D>(row.planes, i * LANES));
  transform_row<N>(x);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    x[i] = x[i] * load<vf>(job.factors + i * LANES) * norm;
    if (row.mean) x[i] = x[i] + load<vf>(row.mean + i * LANES);
    x[i] = clamp(x[i], most);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 2)
    narrow_pair<TYPE>(row.numbers + i * LANES * SIZE, x[i], x[i + 1]);
}

template <int TYPE, int BITS, int D> struct DecodeRows {
  static void run(const Job& job) {
    for (int head = 0; head < job.num_heads; head++)
      for (int64_t t = 0; t < job.num_rows; t++)
        decode_row<TYPE, BITS, D>(job, row_at<BITS, D>(job, head, t));
  }
};

// --- Encoding ---

// The sum of what `term` gives for each of N vectors, in the order of `fold_8` and `fold`.
template <int N, class F> INLINE auto fold_vectors(F term) {
  if constexpr (N == 4) {
    return (term(0) + term(2)) + (term(1) + term(3));
  } else if constexpr (N == 8) {
    return fold_8(term);
  } else {
    return fold_8([&](int k) __attribute__((always_inline)) { return term(2 * k); }) +
           fold_8([&](int k) __attribute__((always_inline)) { return term(2 * k + 1); });
  }
}

INLINE float fold_lanes(vf x) {
  x = x + exchange<8>(x);
  x = x + exchange<4>(x);
  x = x + exchange<2>(x);
  return (x + exchange<1>(x))[0];
}

// The boundaries of each step of a bisection, where its index finds them: the index grows
// from its highest bit down.
template <int BITS> struct Bounds {
  vf steps[BITS] = {};
  explicit Bounds(const float* boundaries) {
    for (int step = 0; step < BITS; step++)
      for (int i = 0; i < 1 << BITS; i += 2 << (BITS - 1 - step))
        steps[step][i] = boundaries[i + (1 << (BITS - 1 - step)) - 1];
  }

  // How many boundaries are not above x.
  __attribute__((always_inline)) vi nearest(vf x) const {
    __m512i index = {};
#pragma GCC unroll 4
    for (int step = 0; step < BITS; step++) {
      const __m512 bound = _mm512_permutexvar_ps(index, (__m512)steps[step]);
      const __mmask16 is_above = _mm512_cmp_ps_mask((__m512)x, bound, _CMP_GE_OQ);
      const __m512i bit = _mm512_set1_epi32(1 << (BITS - 1 - step));
      index = _mm512_mask_or_epi32(index, is_above, index, bit);
    }
    return (vi)index;
  }
};

template <int BITS, int D> INLINE void pack_row(const vi* symbols, uint8_t* const* planes) {
  for_each_plane<BITS>([&](int plane, int width, int shift)
                           __attribute__((always_inline)) {
    const int len = D * width / 8;
#pragma GCC unroll 16
    for (int j = 0; j < len; j += LANES) {
      vi bytes = {};
      for (int place = 0; place < 8 / width; place++) {
        const vi field = symbols[(place * len + j) / LANES] >> shift;
        bytes |= (field & ((1 << width) - 1)) << (place * width);
      }
      store_bytes(planes[plane] + j, bytes);
    }
  });
}

// Rows that are encoded one after the other. Each step is done for all of them, so that
// none waits for the sum over another's numbers.
template <int D> struct Rotated {
  alignas(64) float numbers[LANES][D];
  alignas(64) float lengths[LANES], sums[LANES], squares[LANES], scales[LANES];
  int32_t peaks[LANES];
};

template <int TYPE, int D>
INLINE void rotate_row(const Job& job, const Row& row, Rotated<D>& rotated, int r) {
  constexpr int N = D / LANES, SIZE = sizeof(typename Element<TYPE>::E);
  vf x[N];
  __m512i most = {};
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    x[i] = widen<TYPE>(row.numbers + i * LANES * SIZE);
    if (row.mean) x[i] = x[i] - load<vf>(row.mean + i * LANES);
    most = _mm512_max_epi32(most, (__m512i)((vi)x[i] & 0x7fffffff));
    x[i] = x[i] * load<vf>(job.signs + i * LANES);
  }
  const int32_t peak = _mm512_reduce_max_epi32(most);
  const float scale = middle_scale(peak);
  if (!is_codable(peak) || scale != 1)
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
      x[i] = is_codable(peak) ? x[i] * splat(scale)
                              : splat(0) * load<vf>(job.signs + i * LANES);
  transform_row<N>(x);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    x[i] = x[i] * load<vf>(job.factors + i * LANES);
    store(rotated.numbers[r] + i * LANES, x[i]);
  }
  rotated.lengths[r] = fold_lanes(fold_vectors<N>(
      [&](int i) __attribute__((always_inline)) { return x[i] * x[i]; }));
  rotated.peaks[r] = peak;
  rotated.scales[r] = scale;
}

template <int BITS, int D>
INLINE void quantize_row(const Job& job, const Row& row, const Bounds<BITS>& bounds,
                         float stretch, Rotated<D>& rotated, int r) {
  constexpr int N = D / LANES;
  vi symbols[N];
  const Pair sums = fold_vectors<N>([&](int i) __attribute__((always_inline)) {
    const vf x = load<vf>(rotated.numbers[r] + i * LANES);
    const vi index = bounds.nearest(x * splat(stretch));
    symbols[i] = to_symbol<BITS>(index);
    const vf level = look_up<BITS>(job.levels, index);
    return Pair{x * level, level * level};
  });
  pack_row<BITS, D>(symbols, row.planes);
  rotated.sums[r] = fold_lanes(sums.a);
  rotated.squares[r] = fold_lanes(sums.b);
}

template <int TYPE, int BITS, int D> struct EncodeRows {
  static void run(const Job& job) {
    const Bounds<BITS> bounds(job.boundaries);
    const float root = (float)sqrt((double)D);
    Rotated<D> rotated;
    for_some_rows<BITS, D>(job, [&](const Row* rows, int count) {
      for (int r = 0; r < count; r++) rotate_row<TYPE>(job, rows[r], rotated, r);
      float stretch[LANES];
      for (int r = 0; r < count; r++) {
        const float length = sqrtf(rotated.lengths[r]);
        stretch[r] = root / (length == 0 ? 1 : length);
      }
      for (int r = 0; r < count; r++)
        quantize_row(job, rows[r], bounds, stretch[r], rotated, r);
      for (int r = 0; r < count; r++)
        write_norm(job, rows[r].number, rotated.peaks[r],
                   rotated.sums[r] / rotated.squares[r] * root / rotated.scales[r]);
    });
  }
};

// --- Which rows are known ---

template <template <int, int, int> class Rows, int TYPE, int BITS>
bool run_for_dim(const Job& job) {
  // A plane of single bits has half a vector of bytes for 64 numbers.
  if constexpr (BITS % 2 == 0)
    if (job.dim == 64) return Rows<TYPE, BITS, 64>::run(job), true;
  if (job.dim == 128) return Rows<TYPE, BITS, 128>::run(job), true;
  if (job.dim == 256) return Rows<TYPE, BITS, 256>::run(job), true;
  return false;
}

template <template <int, int, int> class Rows, int TYPE> bool run_by_row(const Job& job) {
  switch (job.bits) {
    case 2: return run_for_dim<Rows, TYPE, 2>(job);
    case 3: return run_for_dim<Rows, TYPE, 3>(job);
    case 4: return run_for_dim<Rows, TYPE, 4>(job);
  }
  return false;
}
