// Overlap of a whole batch of answers with their ground truths, on the CPU. No Python in here.
#pragma once

#include <cstdint>

#include "overlap_math.h"

namespace vcr1 {

// A ragged batch: list n is rows offsets[n] .. offsets[n + 1] of `rows`; `width` float64 a row (2: interval, 4: box).
struct Ragged {
  const double* rows;
  const int64_t* offsets;  // [N + 1]
  int64_t num_rows;
  int64_t width;
};

// The overlap of answer n, for the CPU loops and the kernels: the batches have been checked before.
struct IntervalOverlap {
  Ragged predicted, truth;
  IntervalKind kind;

  VCR1_HD static Intervals list_of(const Ragged& batch, int64_t n) {
    return {batch.rows + 2 * batch.offsets[n], batch.offsets[n + 1] - batch.offsets[n]};
  }
  VCR1_HD double operator()(int64_t n) const {
    return interval_overlap(list_of(predicted, n), list_of(truth, n), kind);
  }
};
struct TrackOverlap {
  Ragged predicted, truth;
  int64_t first_box;

  VCR1_HD double operator()(int64_t n) const {
    const int64_t p = predicted.offsets[n], t = truth.offsets[n];
    return track_overlap(predicted.rows + 4 * p, predicted.offsets[n + 1] - p, truth.rows + 4 * t,
                         truth.offsets[n + 1] - t, first_box);
  }
};

// All throw std::invalid_argument (message starting with `name`) before anything is read out of bounds.
void check_offsets(const char* name, const int64_t* offsets, int64_t num_lists, int64_t num_rows);
void check_sorted_by_start(const char* name, const Ragged& intervals, int64_t num_lists);
void check(const IntervalOverlap& overlap, int64_t num_lists);
void check(const TrackOverlap& overlap, int64_t num_lists);

// out [N], one value an answer; large batches on several threads.
void overlap_cpu(const IntervalOverlap& overlap, int64_t num_lists, double* out);
void overlap_cpu(const TrackOverlap& overlap, int64_t num_lists, double* out);

}  // namespace vcr1
