// One thread an answer: the lists are a handful of rows, so there is too little work in an answer to split it further.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "overlap.cuh"
#include "overlap_math.h"

namespace vcr1 {

namespace {

constexpr int kThreads = 128;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches on the device that holds the data and gives the caller its current device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device_id), "cudaSetDevice");
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

__device__ bool in_bounds(const Ragged& batch, int64_t n) {
  const int64_t begin = batch.offsets[n], end = batch.offsets[n + 1];
  return 0 <= begin && begin <= end && end <= batch.num_rows;
}

__device__ bool list_of(const Ragged& batch, int64_t n, Intervals& list) {
  if (!in_bounds(batch, n)) return false;
  list = {batch.rows + 2 * batch.offsets[n], batch.offsets[n + 1] - batch.offsets[n]};
  for (int64_t i = 1; i < list.count; ++i) {
    if (!(list.start(i - 1) <= list.start(i))) return false;
  }
  return true;
}

__device__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

__global__ void interval_iou_kernel(Ragged predicted, Ragged truth, bool hull, int64_t num_lists, double* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= num_lists) return;
  Intervals p{nullptr, 0}, t{nullptr, 0};
  if (!list_of(predicted, n, p) || !list_of(truth, n, t)) {
    out[n] = not_a_number();
    return;
  }
  out[n] = hull ? hull_iou(p, t) : set_iou(p, t);
}

__global__ void track_iou_kernel(Ragged predicted, Ragged truth, int64_t first_box, int64_t num_lists, double* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= num_lists) return;
  if (!in_bounds(predicted, n) || !in_bounds(truth, n)) {
    out[n] = not_a_number();
    return;
  }
  const int64_t p = predicted.offsets[n], t = truth.offsets[n];
  out[n] = mean_track_iou(predicted.rows + 4 * p, predicted.offsets[n + 1] - p, truth.rows + 4 * t,
                          truth.offsets[n + 1] - t, first_box);
}

unsigned int num_blocks(int64_t num_lists) { return static_cast<unsigned int>((num_lists + kThreads - 1) / kThreads); }

}  // namespace

void interval_iou_cuda(const Ragged& predicted, const Ragged& truth, bool hull, int64_t num_lists, double* out,
                       int32_t device_id, int64_t stream) {
  if (num_lists == 0) return;  // a grid of 0 blocks is a launch error
  const DeviceGuard guard(device_id);
  interval_iou_kernel<<<num_blocks(num_lists), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      predicted, truth, hull, num_lists, out);
  check(cudaGetLastError(), "interval_iou_cuda");
}

void track_iou_cuda(const Ragged& predicted, const Ragged& truth, int64_t first_box, int64_t num_lists, double* out,
                    int32_t device_id, int64_t stream) {
  if (num_lists == 0) return;
  const DeviceGuard guard(device_id);
  track_iou_kernel<<<num_blocks(num_lists), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      predicted, truth, first_box, num_lists, out);
  check(cudaGetLastError(), "track_iou_cuda");
}

}  // namespace vcr1
