// One thread an answer: the lists are a handful of rows, so there is too little work in an answer to split it further.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "overlap.cuh"

namespace vcr1 {

namespace {

constexpr int kThreads = 128;
constexpr int kGroupThreads = 32;   // one block a group of 8 or 16 answers
constexpr int kBatchThreads = 256;  // the only block, where all rewards share one standard deviation
constexpr int kMaxBlocks = 65535;

void check_status(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches on the device that holds the data and gives the caller its current device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id) {
    check_status(cudaGetDevice(&previous_), "cudaGetDevice");
    check_status(cudaSetDevice(device_id), "cudaSetDevice");
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

__device__ bool in_bounds(const Ragged& batch, int64_t n) {
  const int64_t begin = batch.offsets[n], end = batch.offsets[n + 1];
  return 0 <= begin && begin <= end && end <= batch.num_rows;
}

__device__ bool is_sorted(const Ragged& batch, int64_t n) {
  const Intervals list = IntervalOverlap::list_of(batch, n);
  for (int64_t i = 1; i < list.count; ++i) {
    if (!(list.start(i - 1) <= list.start(i))) return false;
  }
  return true;
}

__device__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

__device__ bool is_sound(const IntervalOverlap& overlap, int64_t n) {
  return in_bounds(overlap.predicted, n) && in_bounds(overlap.truth, n) && is_sorted(overlap.predicted, n) &&
         is_sorted(overlap.truth, n);
}
__device__ bool is_sound(const TrackOverlap& overlap, int64_t n) {
  return in_bounds(overlap.predicted, n) && in_bounds(overlap.truth, n);
}

template <class Overlap>
__device__ double checked(const Overlap& overlap, int64_t n) {
  return is_sound(overlap, n) ? overlap(n) : not_a_number();
}

template <class Overlap>
__global__ void overlap_kernel(Overlap overlap, int64_t num_lists, double* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n < num_lists) out[n] = checked(overlap, n);
}

__device__ bool group_bounds(const RewardGroups& groups, int64_t g, int64_t& begin, int64_t& end) {
  begin = groups.group_offsets[g];
  end = groups.group_offsets[g + 1];
  return 0 <= begin && begin <= end && end <= groups.num_answers;
}

// One block a group: one thread adds its rewards up in the CPU's order, every thread writes.
__global__ void group_kernel(RewardGroups groups) {
  __shared__ Moments group;
  for (int64_t g = blockIdx.x; g < groups.num_groups; g += gridDim.x) {
    int64_t begin, end;
    if (!group_bounds(groups, g, begin, end)) continue;  // the same for the whole block
    if (threadIdx.x == 0) group = moments(groups.rewards + begin, end - begin);
    __syncthreads();
    const double divisor = divisor_of(groups, group, 0.0);
    for (int64_t s = begin + threadIdx.x; s < end; s += blockDim.x) {
      groups.advantages[s] = advantage(groups.rewards[s], group, divisor);
    }
    __syncthreads();  // `group` is free again
  }
}

// One block for everything, since all answers share one standard deviation; a thread per group.
__global__ void batch_kernel(RewardGroups groups) {
  __shared__ double batch_std;
  if (threadIdx.x == 0) batch_std = moments(groups.rewards, groups.num_answers).std;
  __syncthreads();
  for (int64_t g = threadIdx.x; g < groups.num_groups; g += blockDim.x) {
    int64_t begin, end;
    if (!group_bounds(groups, g, begin, end)) continue;
    const Moments group = moments(groups.rewards + begin, end - begin);
    const double divisor = divisor_of(groups, group, batch_std);
    for (int64_t s = begin; s < end; ++s) groups.advantages[s] = advantage(groups.rewards[s], group, divisor);
  }
}

template <class Overlap>
void launch_overlap(const Overlap& overlap, int64_t num_lists, double* out, Launch launch) {
  if (num_lists == 0) return;  // a grid of 0 blocks is a launch error
  const DeviceGuard guard(launch.device_id);
  const auto num_blocks = static_cast<unsigned int>((num_lists + kThreads - 1) / kThreads);
  overlap_kernel<<<num_blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(launch.stream)>>>(overlap, num_lists, out);
  check_status(cudaGetLastError(), "overlap_cuda");
}

}  // namespace

void overlap_cuda(const IntervalOverlap& overlap, int64_t num_lists, double* out, Launch launch) {
  launch_overlap(overlap, num_lists, out, launch);
}

void overlap_cuda(const TrackOverlap& overlap, int64_t num_lists, double* out, Launch launch) {
  launch_overlap(overlap, num_lists, out, launch);
}

void group_advantages_cuda(const RewardGroups& groups, Launch launch) {
  if (groups.num_answers == 0 || groups.num_groups == 0) return;
  const DeviceGuard guard(launch.device_id);
  const auto stream = reinterpret_cast<cudaStream_t>(launch.stream);
  if (groups.scale == AdvantageScale::kBatch) {
    batch_kernel<<<1, kBatchThreads, 0, stream>>>(groups);
  } else {
    const auto num_blocks = static_cast<unsigned int>(groups.num_groups < kMaxBlocks ? groups.num_groups : kMaxBlocks);
    group_kernel<<<num_blocks, kGroupThreads, 0, stream>>>(groups);
  }
  check_status(cudaGetLastError(), "group_advantages_cuda");
}

}  // namespace vcr1
