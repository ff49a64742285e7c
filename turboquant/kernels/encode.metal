// Rows to codes and norms: one SIMD group for each row, R coordinates in each lane. The
// rows lie in a buffer for each layer, those of blocks one behind the other in each head;
// what is made of them lies by block, layer, head and row.
threadgroup float memory[4][32 * R];
threadgroup uchar packed[4][32 * R];
const int layer = thread_position_in_grid.y;
const int at = thread_position_in_grid.x / 32;
const int lane = thread_index_in_simdgroup;
const int group = thread_position_in_threadgroup.x / 32;
const int per_layer = num_heads * num_rows;
const int block = at / per_layer, in_layer = at % per_layer;
if (block >= num_blocks) return;
const int part = block * num_layers + layer, head = in_layer / num_rows;
const wide row = wide(head) * capacity + begin + wide(block) * num_rows + in_layer % num_rows;
const wide place = wide(part) * per_layer + in_layer;
const DEVICE uchar* x = BUFFER(layer);
const DEVICE float* levels = tables + (1 << bits);
const DEVICE float* boundaries = tables + 512 + (1 << bits);
const DEVICE float* signs = tables + 1024;
const DEVICE float* scales = signs + dim;
const float root = scales[dim];
float numbers_[R], rounded[R], sums[3];
uint peak = 0;
UNROLL for (int i = 0; i < R; i++) {
  const int c = lane + 32 * i;
  float value = 0;
  if (c < dim) {
    const wide from = row * dim + c;
    const uint u = dtype == F32 ? ((const DEVICE uint*)x)[from] : ((const DEVICE ushort*)x)[from];
    value = widen(u, dtype);
    if (is_centred) value = ADD(value, -FROM_HALF(((const DEVICE ushort*)mean)[wide(part * num_heads + head) * dim + c]));
  }
  const uint magnitude = as_type<uint>(value) & 0x7fffffff;
  peak = magnitude > peak ? magnitude : peak;
  numbers_[i] = value;
}
UNROLL for (int reach = 16; reach > 0; reach /= 2) {
  const uint other = simd_shuffle_xor(peak, ushort(reach));
  peak = other > peak ? other : peak;
}
// As quantizer.py has it: by a power of two to where squares neither overflow nor vanish.
const float most = as_type<float>(peak);
const float scale = most < 9.094947017729282e-13f ? 1.9342813113834067e25f
                  : most < 1099511627776.0f ? 1.0f : 5.169878828456423e-26f;
const bool is_finite = peak < 0x7f800000, is_kept = is_finite && peak >= 0x00800000;
UNROLL for (int i = 0; i < R; i++) {
  const int c = lane + 32 * i;
  const float sign = c < dim ? signs[c] : 0;
  numbers_[i] = MUL(is_kept ? MUL(numbers_[i], scale) : 0.0f, sign);
}
TRANSFORM(numbers_)
UNROLL for (int i = 0; i < R; i++) {
  const int c = lane + 32 * i;
  if (c < dim) numbers_[i] = MUL(numbers_[i], scales[c]);
}
// Three sums over the row, each folded in half until one is left.
for (int pass = 0; pass < 3; pass++) {
  UNROLL for (int i = 0; i < R; i++) {
    const float a = pass < 2 ? numbers_[i] : rounded[i], b = pass == 0 ? numbers_[i] : rounded[i];
    memory[group][lane + 32 * i] = MUL(a, b);
  }
  BARRIER;
  for (int left = dim; left > 1; left -= left / 2) {
    const int reach = left / 2;
    for (int c = lane; c < reach; c += 32) memory[group][c] = ADD(memory[group][c], memory[group][left - reach + c]);
    BARRIER;
  }
  sums[pass] = memory[group][0];
  BARRIER;
  if (pass > 0) continue;
  const float length = SQRT(sums[0]);
  const float stretch = DIV(root, length == 0 ? 1.0f : length);
  UNROLL for (int i = 0; i < R; i++) {
    const float spread = MUL(numbers_[i], stretch);
    int index = 0;
    for (int step = 1 << (bits - 1); step > 0; step /= 2)
      if (spread >= boundaries[index + step - 1]) index += step;
    rounded[i] = levels[index];
    if (bits % 2 && bits > 1) {
      // Of an odd width: the magnitude, and the sign in the lowest bit.
      const int mask = (1 << (bits - 1)) - 1, is_negative = 1 - (index >> (bits - 1));
      index = ((index ^ is_negative * mask) & mask) << 1 | is_negative;
    }
    packed[group][lane + 32 * i] = index;
  }
}
if (lane == 0) {
  float norm = DIV(MUL(DIV(sums[1], sums[2]), root), scale);
  if (norm > 3.4028234663852886e38f) norm = 3.4028234663852886e38f;
  const uint u = is_finite ? as_type<uint>(norm) : 0x7fc00000;
  // Of each block, all lowest bytes come first.
  for (int k = 0; k < 4; k++)
    ((DEVICE uchar*)norms)[place + wide(block * 3 + k) * num_layers * per_layer] = u >> (8 * k);
}
int shift = bits, number = 0;
for (int width = 8; width > 0; width /= 2) {
  if (!(bits & width)) continue;
  DEVICE uchar* plane = (DEVICE uchar*)(number == 0 ? codes : number == 1 ? codes1 : codes2);
  const int length = dim * width / 8;
  shift -= width;
  number++;
  for (int j = lane; j < length; j += 32) {
    uint octet = 0;
    for (int k = 0; k < 8 / width; k++)
      octet |= (packed[group][j + k * length] >> shift & ((1 << width) - 1)) << k * width;
    plane[place * length + j] = octet;
  }
}
