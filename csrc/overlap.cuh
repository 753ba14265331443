// Launchers of the CUDA half. No CUDA header, so that module.cpp compiles with the host compiler alone.
// Every pointer inside is a device pointer. One launch a call, on `stream` (a cudaStream_t as an integer) of device
// `device_id`; returns at once, nothing is synchronised. Offsets lie on the device, so they are checked by the kernel:
// an answer whose offsets are out of bounds, or whose intervals are not sorted by start, gets NaN.
#pragma once

#include <cstdint>

#include "overlap.h"

namespace vcr1 {

void interval_iou_cuda(const Ragged& predicted, const Ragged& truth, bool hull, int64_t num_lists, double* out,
                       int32_t device_id, int64_t stream);
void track_iou_cuda(const Ragged& predicted, const Ragged& truth, int64_t first_box, int64_t num_lists, double* out,
                    int32_t device_id, int64_t stream);

}  // namespace vcr1
