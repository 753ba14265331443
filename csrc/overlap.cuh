// Launchers of the CUDA half. No CUDA header, so that the bindings compile with the host compiler alone.
// Every pointer inside is a device pointer. One launch a call, on `stream` (a cudaStream_t as an integer) of device
// `device_id`; returns at once, nothing is synchronised. Offsets lie on the device, so they are checked by the kernel:
// an answer whose offsets are out of bounds, or whose intervals are not sorted by start, gets NaN. A group whose
// offsets are out of bounds is not written.
#pragma once

#include <cstdint>

#include "overlap.h"
#include "reward_groups.h"

namespace vcr1 {

// Where and in which order the launch runs.
struct Launch {
  int32_t device_id;
  int64_t stream;
};

void overlap_cuda(const IntervalOverlap& overlap, int64_t num_lists, double* out, Launch launch);
void overlap_cuda(const TrackOverlap& overlap, int64_t num_lists, double* out, Launch launch);

void group_advantages_cuda(const RewardGroups& groups, Launch launch);

}  // namespace vcr1
