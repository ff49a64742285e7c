// One array of a layer as its cache owns it, (heads, capacity, dim): one SIMD group for
// each row, R coordinates in each lane. A row lies in a segment; gpu.py says what the
// numbers of one are.
const int head = thread_position_in_grid.y;
const int token = thread_position_in_grid.x / 32;
const int lane = thread_index_in_simdgroup;
if (token >= capacity) return;
const wide row = wide(head) * capacity + token;
const DEVICE wide* segment = (const DEVICE wide*)segments + 10 * which[token];
DEVICE ushort* out2 = (DEVICE ushort*)out + row * dim;
DEVICE uint* out4 = (DEVICE uint*)out + row * dim;

const int bits = segment[0];
const wide in_head = segment[1], all = segment[2];
const wide from = wide(layer * num_heads + head) * in_head + segment[3] + token;
if (bits <= 0) {
  // Exact rows: as they are, or their low bytes and their high ones, or none at all.
  const DEVICE ushort* raw2 = (const DEVICE ushort*)AT(segment[4]) + from * dim;
  const DEVICE uint* raw4 = (const DEVICE uint*)AT(segment[4]) + from * dim;
  for (int c = lane; c < dim; c += 32) {
    uint u = 0;
    if (bits == -1) u = dtype == F32 ? raw4[c] : raw2[c];
    if (bits == -2) {
      const int num_low = dtype == F32 ? 3 : 1;
      for (int k = 0; k < num_low; k++) u |= uint(AT(segment[4])[(all * k + from) * dim + c]) << 8 * k;
      u |= uint(AT(segment[5])[from * dim + c]) << 8 * num_low;
    }
    if (dtype == F32) out4[c] = u; else out2[c] = u;
  }
  return;
}
uint symbols[R];
float numbers_[R];
UNROLL for (int i = 0; i < R; i++) symbols[i] = 0;
int shift = bits, place = 4;
for (int width = 8; width > 0; width /= 2) {
  if (!(bits & width)) continue;
  const int length = dim * width / 8;
  const uint mask = (1 << width) - 1;
  const DEVICE uchar* plane = AT(segment[place]) + from * length;
  place++;
  shift -= width;
  // Where in the plane a coordinate lies, and how high in its byte.
  int at = lane, up = 0;
  UNROLL for (int i = 0; i < R; i++) {
    while (at >= length) {
      at -= length;
      up += width;
    }
    if (lane + 32 * i < dim) symbols[i] |= (uint(plane[at]) >> up & mask) << shift;
    at += 32;
  }
}
UNROLL for (int i = 0; i < R; i++) numbers_[i] = tables[(1 << bits) + symbols[i]];
TRANSFORM(numbers_)
uint u = 0;
for (int k = 0; k < 4; k++) u |= uint(AT(segment[7])[k * all + from]) << 8 * k;
if ((u & 0x7f800000) == 0x7f800000) u = 0x7fc00000;
const float norm = as_type<float>(u);
const bool is_centred = segment[8] >= 0;
const DEVICE ushort* mean = (const DEVICE ushort*)AT(is_centred ? segment[8] : segment[4]) + wide(layer * num_heads + head) * dim;
UNROLL for (int i = 0; i < R; i++) {
  const int c = lane + 32 * i;
  if (c < dim) {
    float value = MUL(MUL(numbers_[i], tables[512 + c]), norm);
    if (is_centred) value = ADD(value, (mean[c] & 0x7c00) == 0x7c00 ? as_type<float>(0x7fc00000u) : FROM_HALF(mean[c]));
    symbols[i] = narrow(value, dtype);
  }
}
// Written last: whatever is read is read before, all at once.
UNROLL for (int i = 0; i < R; i++) {
  const int c = lane + 32 * i;
  if (c < dim && dtype == F32) out4[c] = symbols[i];
  if (c < dim && dtype != F32) out2[c] = symbols[i];
}
