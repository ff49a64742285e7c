// What the bodies of the kernels share: Metal, which by the few macros in gpu.py is CUDA
// too, and by those in tests/turboquant/shim.h C++.
//
// Every sum and product is rounded by itself, in the order of numpy.py: ADD and MUL are
// never contracted, so that codes, norms and rows are the same bytes on any device.
// A device that takes subnormal numbers for zero differs where all of a row is as small.

// As in kernel.h.
enum { F32 = 0, F16 = 1, BF16 = 2 };

FUNCTION float half_to_float(uint bits) {
  const uint magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  if (magnitude < 0x400) return as_type<float>(sign | as_type<uint>(MUL(float(magnitude), 5.9604644775390625e-8f)));
  return as_type<float>(sign | (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23));
}

// A finite number within float16, to the nearest, ties to even.
FUNCTION uint float_to_half(float x) {
  const uint bits = as_type<uint>(x), sign = bits >> 16 & 0x8000, u = bits & 0x7fffffff;
  if (u >= 0x38800000) return sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
  // Below the normal numbers the addition rounds at the right place.
  return sign | as_type<uint>(ADD(as_type<float>(u), 0.5f)) - 0x3f000000;
}

FUNCTION float widen(uint bits, int dtype) {
  return dtype == F32 ? as_type<float>(bits)
       : dtype == F16 ? half_to_float(bits) : as_type<float>(bits << 16);
}

// The bits of a number in a dtype; one beyond it becomes the largest finite one.
FUNCTION uint narrow(float x, int dtype) {
  const uint magnitude = as_type<uint>(x) & 0x7fffffff;
  // One NaN for all: devices make different ones.
  if (magnitude > 0x7f800000) return dtype == F32 ? 0x7fc00000 : dtype == F16 ? 0x7e00 : 0x7fc0;
  const float most = dtype == F32 ? 3.4028234663852886e38f : dtype == F16 ? 65504.0f : 3.3895313892515355e38f;
  x = x > most ? most : x < -most ? -most : x;
  const uint u = as_type<uint>(x);
  return dtype == F32 ? u : dtype == F16 ? float_to_half(x) : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// The Walsh-Hadamard transform of a row: lane l has the coordinates l, l + 32, l + 64, …
// Each power of two in dim is a block of its own, the largest first, so that a step of
// `reach` is one of all coordinates below the last whole multiple of 2 * reach.
#define TRANSFORM(x) \
  UNROLL for (int reach = 16 * R; reach >= 32; reach /= 2) \
    UNROLL for (int i = 0; i < R; i++) \
      if (!(i & reach / 32) && 32 * i < dim - dim % (2 * reach)) { \
        const float a = x[i], b = x[(i + reach / 32) % R]; \
        x[i] = ADD(a, b); \
        x[(i + reach / 32) % R] = ADD(a, -b); \
      } \
  UNROLL for (int reach = 16; reach > 0; reach /= 2) \
    UNROLL for (int i = 0; i < R; i++) { \
      const float other = simd_shuffle_xor(x[i], ushort(reach)); \
      const float sum = lane & reach ? ADD(other, -x[i]) : ADD(x[i], other); \
      if (lane + 32 * i < dim - dim % (2 * reach)) x[i] = sum; \
    }
