#include "overlap.h"

#include <stdexcept>
#include <string>

#include "parallel.h"

namespace vcr1 {

namespace {

// 64 tracks of 8 boxes take 4 microseconds on one thread, argument checks included, less than waking a second one; a
// thread of its own pays off from some hundred microseconds on.
constexpr int64_t kMinRowsPerThread = 32768;

template <class Overlap>
void overlap_all(const Overlap& overlap, int64_t num_lists, double* out) {
  const int64_t work = num_lists + overlap.predicted.num_rows + overlap.truth.num_rows;
  parallel_ranges(num_lists, work, kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) out[n] = overlap(n);
  });
}

}  // namespace

void check_offsets(const char* name, const int64_t* offsets, int64_t num_lists, int64_t num_rows) {
  const auto fail = [name](int64_t index, int64_t got, const std::string& wanted) {
    throw std::invalid_argument(std::string(name) + ": offset " + std::to_string(index) + " got " +
                                std::to_string(got) + ", wanted " + wanted);
  };
  if (offsets[0] != 0) fail(0, offsets[0], "0");
  for (int64_t n = 0; n < num_lists; ++n) {
    if (offsets[n + 1] < offsets[n]) fail(n + 1, offsets[n + 1], "at least " + std::to_string(offsets[n]));
  }
  if (offsets[num_lists] != num_rows) {
    fail(num_lists, offsets[num_lists], std::to_string(num_rows) + " (the number of rows)");
  }
}

void check_sorted_by_start(const char* name, const Ragged& intervals, int64_t num_lists) {
  for (int64_t n = 0; n < num_lists; ++n) {
    for (int64_t i = intervals.offsets[n] + 1; i < intervals.offsets[n + 1]; ++i) {
      if (intervals.rows[2 * i - 2] <= intervals.rows[2 * i]) continue;
      throw std::invalid_argument(std::string(name) + ": row " + std::to_string(i) +
                                  " got a start before that of the row above, wanted each list sorted by start");
    }
  }
}

void check(const IntervalOverlap& overlap, int64_t num_lists) {
  check_offsets("predicted_offsets", overlap.predicted.offsets, num_lists, overlap.predicted.num_rows);
  check_offsets("truth_offsets", overlap.truth.offsets, num_lists, overlap.truth.num_rows);
  check_sorted_by_start("predicted", overlap.predicted, num_lists);
  check_sorted_by_start("truth", overlap.truth, num_lists);
}

void check(const TrackOverlap& overlap, int64_t num_lists) {
  check_offsets("predicted_offsets", overlap.predicted.offsets, num_lists, overlap.predicted.num_rows);
  check_offsets("truth_offsets", overlap.truth.offsets, num_lists, overlap.truth.num_rows);
}

void overlap_cpu(const IntervalOverlap& overlap, int64_t num_lists, double* out) {
  overlap_all(overlap, num_lists, out);
}

void overlap_cpu(const TrackOverlap& overlap, int64_t num_lists, double* out) { overlap_all(overlap, num_lists, out); }

}  // namespace vcr1
