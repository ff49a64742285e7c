// Enough of Metal's language to run the body of a kernel on a CPU: a SIMD group is 32
// fibers, each of which stops at a shuffle or a barrier until all have come to it. Lanes
// that part ways are an error, as they are on a GPU where nothing reports it.

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <ucontext.h>

#define DEVICE
#define AT(place) (data + (place))
#define FUNCTION static inline
#define UNROLL
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
#define FMA(a, b, c) fmaf(a, b, c)
#define SQRT(x) sqrtf(x)
#define FROM_HALF(bits) shim::from_half(bits)
#define TO_HALF(x) shim::to_half(x)
#define threadgroup static
#define BARRIER shim::stop(__LINE__)
#define simd_shuffle_xor(x, mask) shim::shuffle(x, mask, __LINE__)
#define thread_position_in_grid shim::Position{shim::first + shim::lane, shim::second}
#define thread_position_in_threadgroup shim::Position{(shim::first + shim::lane) % 128, 0}
#define thread_index_in_simdgroup shim::lane

typedef uint8_t uchar;
typedef int64_t wide;
template <class To, class From> To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

namespace shim {

constexpr uint LANES = 32;
constexpr size_t STACK = 64 << 10;
struct Position { uint x, y; };
uint first, second, lane;  // of the fiber that runs
ucontext_t caller, fibers[LANES];
char stacks[LANES][STACK];
int where[LANES];  // the line a lane stopped at, or 0 where it has ended
uint32_t slots[2][LANES];
uint turns[LANES];
void (*body)();

// As hardware converts them, ties to even.
float from_half(uint bits) {
  const uint magnitude = bits & 0x7fff;
  const float x = magnitude < 0x7c00 ? as_type<float>(magnitude << 13) * 0x1p112f
                                     : as_type<float>(magnitude << 13 | 0x7f800000);
  return bits & 0x8000 ? -x : x;
}

uint to_half(float x) {
  const uint u = as_type<uint>(fabsf(x)), sign = signbit(x) ? 0x8000 : 0;
  if (u >= 0x38800000) return sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
  return sign | as_type<uint>(fabsf(x) + 0.5f) - 0x3f000000;
}

void stop(int line) {
  const uint me = lane;
  where[me] = line;
  swapcontext(&fibers[me], &caller);
}

template <class X> X shuffle(X x, int mask, int line) {
  // Two slots by turns: no lane is more than one shuffle ahead.
  const uint me = lane, turn = turns[me]++ % 2;
  slots[turn][me] = as_type<uint32_t>(x);
  stop(line);
  return as_type<X>(slots[turn][me ^ mask]);
}

void begin() {
  body();
  const uint me = lane;
  where[me] = 0;
  swapcontext(&fibers[me], &caller);
}

// Runs one SIMD group; 1 where its lanes parted ways.
int run_group(uint thread, void (*kernel)()) {
  first = thread;
  body = kernel;
  for (uint i = 0; i < LANES; i++) {
    turns[i] = 0;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i];
    fibers[i].uc_stack.ss_size = STACK;
    makecontext(&fibers[i], begin, 0);
  }
  do {
    for (lane = 0; lane < LANES; lane++) swapcontext(&caller, &fibers[lane]);
    for (uint i = 1; i < LANES; i++)
      if (where[i] != where[0]) return 1;
  } while (where[0]);
  return 0;
}

}  // namespace shim
