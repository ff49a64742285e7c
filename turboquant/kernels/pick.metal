// Rows of each block as they are, some of them: one thread for each coordinate.
// They lie as encode.metal says.
const int layer = thread_position_in_grid.y;
const int at = thread_position_in_grid.x;
const int per_head = num_picked * dim, per_layer = num_heads * per_head;
const int block = at / per_layer, in_layer = at % per_layer;
if (block >= num_blocks) return;
const int head = in_layer / per_head, in_head = in_layer % per_head;
const int picked_row = first + in_head / dim * step;
const wide row = wide(head) * capacity + begin + wide(block) * num_rows + picked_row;
const wide from = row * dim + in_head % dim;
const wide place = (wide(block) * num_layers + layer) * per_layer + in_layer;
const DEVICE uchar* x = BUFFER(layer);
if (dtype == F32) ((DEVICE uint*)picked)[place] = ((const DEVICE uint*)x)[from];
else ((DEVICE ushort*)picked)[place] = ((const DEVICE ushort*)x)[from];
