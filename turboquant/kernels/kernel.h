// What native.py asks of the kernels. Its class `_Job` has the same fields.

#pragma once

#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum { F32 = 0, F16 = 1, BF16 = 2 };

struct Job {
  int32_t dim;   // of a row: a multiple of 8
  int32_t bits;  // of a coordinate: 1 to 8
  int32_t dtype;
  int32_t num_heads;
  int64_t num_rows;    // of each head
  int64_t row_stride;  // bytes from a row to the next of its head
  char* const* heads;  // the first row of each head
  // Contiguous: (num_heads, num_rows, dim * width / 8).
  uint8_t* const* planes;
  // The bytes of float32, least significant first; strides in bytes.
  uint8_t* norms;
  int64_t norm_byte_stride;
  int64_t norm_row_stride;
  const float* mean;        // (num_heads, dim), or null; no infinity, one kind of NaN
  const float* levels;      // by index for encoding, by symbol for decoding
  const float* boundaries;  // 2**bits - 1
  const float* signs;       // dim
  const float* factors;     // dim: what makes the transform orthonormal
};

// Numbers of 2 or 4 bytes, and the planes of their bytes, least significant first.
struct Bytes {
  int32_t itemsize;
  int32_t num_heads;
  int64_t count;         // numbers of a head, which lie side by side
  int64_t plane_stride;  // from a head's first byte in a plane to the next one's
  char* const* heads;
  uint8_t* const* planes;
};

// How coefficients lie in bytes.
struct Stream {
  int32_t limit;     // the largest magnitude of what stands in a byte
  int32_t per_byte;  // 1 to 3 coefficients, the first in the lowest place
  int32_t low_bits;  // how many lie apart, a plane for each
  const uint8_t* packed;  // the first coefficient's bytes
  int64_t packed_stride;  // from a coefficient to the next
  const uint8_t* low;     // its first plane
  int64_t low_stride;
  int64_t plane_stride;  // from a plane to the next
};

// Stands for a stream where a coefficient has none: all of its numbers are zero.
constexpr int NO_STREAM = 255;

// What takes the coefficients of one layer to its rows. They have a width of
// 2 * num_joined * dim numbers.
struct LongLayer {
  // (num_parts, width): of each coefficient its stream, and which one of that it is.
  const uint8_t* kinds;
  const int32_t* ranks;
  const int32_t* counts;  // from which coefficient of a part on none has a stream
  const float* matrix;    // (num_parts, width, width): a row for each number
  const float* mean;      // (num_parts, width)
  // What `round` makes of each part's matrix, or null.
  const int16_t* const* whole;
  const float* factors;  // (num_parts, width), or null
};

// Rows of some heads joined, as integers in a basis.
struct Long {
  int32_t num_layers;
  int32_t num_parts;  // of a layer, each with as many heads
  int32_t num_joined;
  int32_t dim;             // of a head: a multiple of 8
  int32_t num_pairs;       // of numbers of a key that its position turns
  int32_t is_traditional;  // whether those are neighbours
  int32_t dtype;
  int32_t num_streams;
  int64_t num_rows;
  int64_t row_stride;
  // The first row of each: of each layer all keys, then all values.
  char* const* heads;
  const Stream* streams;
  const LongLayer* layers;
  const float* scales;  // (num_layers, num_parts, num_rows)
  const float* cos;     // of a layer (ceil(num_rows / 16), num_pairs, 16)
  const float* sin;
  int64_t turn_stride;  // floats from a layer's to the next layer's, or 0
};

// Rows times a matrix.
struct Product {
  int64_t num_rows;
  int32_t width;        // a multiple of 16
  const float* rows;    // (num_rows, width)
  const float* matrix;  // (width, width): a row for each number of a row that is made
  float* out;           // (num_rows, width)
};

// A matrix, rounded to integers.
struct Rounding {
  int32_t width;        // a multiple of 16
  int32_t count;        // how many numbers of each row
  const float* matrix;  // (width, width)
  // (width / 8, ceil(count / 2), 8, 2): of 8 rows at a time the numbers two by two.
  int16_t* whole;
  float* factors;  // width: what the integers of each row count
};
