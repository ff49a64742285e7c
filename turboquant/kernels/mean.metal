// The mean row of each head, as float16: one thread for each coordinate of a head.
const int at = thread_position_in_grid.x;
if (at >= num_heads * dim) return;
const wide first = wide(at / dim) * num_rows * dim + at % dim;
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
((DEVICE ushort*)mean)[at] = TO_HALF(sum);
