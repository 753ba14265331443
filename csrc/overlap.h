// Overlap of a whole batch of answers with their ground truths, on the CPU. No Python in here.
#pragma once

#include <cstdint>

namespace vcr1 {

// A ragged batch: list n is rows offsets[n] .. offsets[n + 1] of `rows`; `width` float64 a row (2: interval, 4: box).
struct Ragged {
  const double* rows;
  const int64_t* offsets;  // [N + 1]
  int64_t num_rows;
  int64_t width;
};

// Both throw std::invalid_argument (message starting with `name`) before anything is read out of bounds.
void check_offsets(const char* name, const Ragged& batch, int64_t num_lists);
void check_sorted_by_start(const char* name, const Ragged& intervals, int64_t num_lists);

void interval_iou_cpu(const Ragged& predicted, const Ragged& truth, bool hull, int64_t num_lists, double* out);
void track_iou_cpu(const Ragged& predicted, const Ragged& truth, int64_t first_box, int64_t num_lists, double* out);

}  // namespace vcr1
