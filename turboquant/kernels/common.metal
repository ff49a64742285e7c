// What the bodies of the kernels share: Metal, which by the few macros in gpu.py is CUDA
// too, and by those in tests/turboquant/shim.h C++.
//
// Every sum and product is rounded by itself, in the order of numpy.py: ADD and MUL are
// never contracted, so that codes, norms and rows are the same bytes on any device.
// A device that takes subnormal numbers for zero differs where all of a row is as small.

// As in kernel.h.
enum { F32 = 0, F16 = 1, BF16 = 2 };

FUNCTION float widen(uint bits, int dtype) {
  return dtype == F32 ? as_type<float>(bits)
       : dtype == F16 ? FROM_HALF(bits) : as_type<float>(bits << 16);
}

// The bits of a number in a dtype; one beyond it becomes the largest finite one.
FUNCTION uint narrow(float x, int dtype) {
  const bool is_nan = (as_type<uint>(x) & 0x7fffffff) > 0x7f800000;
  // One NaN for all: devices make different ones.
  if (dtype == BF16) {
    const float most = 3.3895313892515355e38f;
    const uint u = as_type<uint>(x > most ? most : x < -most ? -most : x);
    return is_nan ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  if (dtype == F16) {
    const float most = 65504.0f;
    return is_nan ? 0x7e00 : TO_HALF(x > most ? most : x < -most ? -most : x);
  }
  const float most = 3.4028234663852886e38f;
  return is_nan ? 0x7fc00000 : as_type<uint>(x > most ? most : x < -most ? -most : x);
}

// The buffer of one of up to 16 layers, by number. Selected, not indexed: an array of
// pointers would lie in slower memory.
#define OF_2(i, a, b) ((i) & 1 ? b : a)
#define OF_4(i, a, b, c, d) ((i) & 2 ? OF_2(i, c, d) : OF_2(i, a, b))
#define OF_8(i, a, b, c, d, e, f, g, h) ((i) & 4 ? OF_4(i, e, f, g, h) : OF_4(i, a, b, c, d))
#define BUFFER(i) \
  ((const DEVICE uchar*)((i) & 8 ? OF_8(i, x8, x9, x10, x11, x12, x13, x14, x15) \
                                 : OF_8(i, x0, x1, x2, x3, x4, x5, x6, x7)))

// The Walsh-Hadamard transform of a row: lane l has the coordinates l, l + 32, l + 64, …
// Each power of two in dim is a block of its own, the largest first, so that a step of
// `reach` is one of all coordinates below the last whole multiple of 2 * reach.
#define TRANSFORM(x) \
  UNROLL for (int reach = 16 * R; reach >= 32; reach /= 2) \
    UNROLL for (int i = 0; i < R; i++) \
      if (!(i & reach / 32) && 32 * i < (dim & -2 * reach)) { \
        const float a = x[i], b = x[(i + reach / 32) % R]; \
        x[i] = ADD(a, b); \
        x[(i + reach / 32) % R] = ADD(a, -b); \
      } \
  UNROLL for (int reach = 16; reach > 0; reach /= 2) { \
    /* The product is exact, so that only the sum is rounded. */ \
    const float sign = lane & reach ? -1.0f : 1.0f; \
    if (dim == 32 * R) { \
      UNROLL for (int i = 0; i < R; i++) \
        x[i] = FMA(x[i], sign, simd_shuffle_xor(x[i], ushort(reach))); \
    } else { \
      UNROLL for (int i = 0; i < R; i++) { \
        const float sum = FMA(x[i], sign, simd_shuffle_xor(x[i], ushort(reach))); \
        if (lane + 32 * i < (dim & -2 * reach)) x[i] = sum; \
      } \
    } \
  }
