// Runs the kernels of one instruction set over the cases that check_kernels.py wrote,
// and counts those in which a byte differs from NumPy's. Linked with the kernels.

#include "../turboquant/kernels/kernel.h"

#include <stdio.h>
#include <string.h>

#include <vector>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
EXPORT int JOIN(turboquant_encode_, ISA)(const Job*);
EXPORT int JOIN(turboquant_decode_, ISA)(const Job*);
EXPORT int JOIN(turboquant_sum_, ISA)(const Job*, float*);

typedef std::vector<char> Data;

// A number of 8 bytes, and so many bytes.
static Data read(FILE* file) {
  int64_t size = 0;
  if (fread(&size, 8, 1, file) != 1) return {};
  Data data(size + 64);  // tables may be read beyond their end
  if (fread(data.data(), 1, size, file) != (size_t)size) return {};
  data.resize(size);
  return data;
}

static std::vector<char*> point(Data& data, int64_t count, int64_t step) {
  std::vector<char*> found;
  for (int64_t i = 0; i < count; i++) found.push_back(data.data() + i * step);
  return found;
}

static bool differs(const char* what, const Job& job, const Data& a, const Data& b) {
  if (a == b) return false;
  printf("%s differ: dim %d, %d bits, dtype %d\n", what, job.dim, job.bits, job.dtype);
  return true;
}

static bool run_case(FILE* file, const Data& head) {
  int32_t n[5];
  memcpy(n, head.data(), sizeof n);
  Job job = {n[0], n[1], n[2], n[3], n[4]};
  Data rows = read(file), mean = read(file), levels = read(file), symbols = read(file),
       boundaries = read(file), signs = read(file), scales = read(file),
       unscales = read(file), sums = read(file), norms = read(file),
       decoded = read(file);
  std::vector<Data> planes, made;
  for (int width = 8; width; width /= 2)
    if (job.bits & width) planes.push_back(read(file));
  made = planes;
  for (Data& plane : made) plane.assign(plane.size(), 0);
  const int64_t size = job.dtype == F32 ? 4 : 2;
  std::vector<char*> heads = point(rows, job.num_heads, job.num_rows * job.dim * size);
  std::vector<uint8_t*> to;
  for (Data& plane : made) to.push_back((uint8_t*)plane.data());
  Data new_norms(norms.size()), new_sums(sums.size()), new_rows(decoded.size());
  job.row_stride = job.dim * size;
  job.heads = heads.data();
  job.planes = to.data();
  job.norms = (uint8_t*)new_norms.data();
  job.norm_byte_stride = 1;
  job.norm_row_stride = 4;
  job.mean = mean.empty() ? nullptr : (const float*)mean.data();
  job.levels = (const float*)levels.data();
  job.boundaries = (const float*)boundaries.data();
  job.signs = (const float*)signs.data();
  job.factors = (const float*)scales.data();
  JOIN(turboquant_sum_, ISA)(&job, (float*)new_sums.data());
  JOIN(turboquant_encode_, ISA)(&job);
  bool is_bad = differs("norms", job, norms, new_norms);
  is_bad |= differs("sums", job, sums, new_sums);
  for (size_t i = 0; i < planes.size(); i++)
    is_bad |= differs("codes", job, planes[i], made[i]);
  heads = point(new_rows, job.num_heads, job.num_rows * job.dim * size);
  job.heads = heads.data();
  job.norms = (uint8_t*)norms.data();
  job.levels = (const float*)symbols.data();
  job.factors = (const float*)unscales.data();
  JOIN(turboquant_decode_, ISA)(&job);
  return is_bad | differs("rows", job, decoded, new_rows);
}

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  int num_cases = 0, num_bad = 0;
  for (Data head = read(file); !head.empty(); head = read(file), num_cases++)
    num_bad += run_case(file, head);
  printf("%d cases, %d bad\n", num_cases, num_bad);
  return num_bad != 0 || num_cases == 0;
}
