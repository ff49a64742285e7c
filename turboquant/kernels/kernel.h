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
