// The mean row of each head of a block, as float16: one thread for each coordinate of it.
// The rows lie as encode.metal says, and so do the means.
const int layer = thread_position_in_grid.y;
const int at = thread_position_in_grid.x;
const int per_layer = num_heads * dim;
const int block = at / per_layer, in_layer = at % per_layer;
if (block >= num_blocks) return;
const wide row = wide(in_layer / dim) * capacity + begin + wide(block) * num_rows;
const wide first = row * dim + in_layer % dim;
const DEVICE uchar* x = BUFFER(layer);
float sum = 0;
for (int t = 0; t < num_rows; t++) {
  const wide from = first + wide(t) * dim;
  const uint bits = dtype == F32 ? ((const DEVICE uint*)x)[from] : ((const DEVICE ushort*)x)[from];
  sum = t ? ADD(sum, widen(bits, dtype)) : widen(bits, dtype);
}
sum = DIV(sum, float(num_rows));
// A coordinate with NaN or an infinity in it is not centred.
if ((as_type<uint>(sum) & 0x7f800000) == 0x7f800000) sum = 0;
sum = sum > 65504.0f ? 65504.0f : sum < -65504.0f ? -65504.0f : sum;
((DEVICE ushort*)mean)[(wide(block) * num_layers + layer) * per_layer + in_layer] = TO_HALF(sum);
