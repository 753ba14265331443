// Checked views of the five arrays that two ragged batches and their result come in, and what is computed of them.
#pragma once

#include <string>

#include "overlap.h"
#include "tensor_view.h"

namespace vcr1 {

constexpr int64_t kBoxWidth = 4;
constexpr int64_t kIntervalWidth = 2;

// DLPack's numbering of streams: 0 is forbidden there as ambiguous, 1 is the legacy default stream.
inline int64_t dlpack_stream(int64_t stream) { return stream == 0 ? 1 : stream; }

inline void check_same_device(const char* name, int32_t got, int32_t wanted) {
  if (got != wanted) fail(name, "device index", std::to_string(got), std::to_string(wanted));
}

// N answers, P predicted rows, Q true rows; `out` [N] takes one overlap an answer.
struct Batch {
  Batch(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
        const py::object& truth_offsets, const char* out_name, const py::object& out_array, int64_t width,
        int32_t device, int64_t stream)
      : out(out_name, out_array, {kAnyDim}, device, stream),
        predicted_rows("predicted", predicted, {kAnyDim, width}, device, stream),
        predicted_starts("predicted_offsets", predicted_offsets, {out.dim(0) + 1}, device, stream),
        truth_rows("truth", truth, {kAnyDim, width}, device, stream),
        truth_starts("truth_offsets", truth_offsets, {out.dim(0) + 1}, device, stream),
        row_width(width) {
    check_same_device("predicted", predicted_rows.device_id(), out.device_id());
    check_same_device("predicted_offsets", predicted_starts.device_id(), out.device_id());
    check_same_device("truth", truth_rows.device_id(), out.device_id());
    check_same_device("truth_offsets", truth_starts.device_id(), out.device_id());
  }
  int64_t num_lists() const { return out.dim(0); }
  Ragged predicted() const {
    return {predicted_rows.data(), predicted_starts.data(), predicted_rows.dim(0), row_width};
  }
  Ragged truth() const { return {truth_rows.data(), truth_starts.data(), truth_rows.dim(0), row_width}; }

  TensorView<double> out;
  TensorView<double> predicted_rows;
  TensorView<int64_t> predicted_starts;
  TensorView<double> truth_rows;
  TensorView<int64_t> truth_starts;
  int64_t row_width;
};

inline IntervalKind interval_kind(const std::string& kind) {
  if (kind == "set") return IntervalKind::kSetIou;
  if (kind == "hull") return IntervalKind::kHullIou;
  if (kind == "iop") return IntervalKind::kSetIop;
  fail("kind", "value", "'" + kind + "'", "'set', 'hull' or 'iop'");
}

inline int64_t checked_first_box(int64_t first_box) {
  if (first_box < 0) fail("first_box", "value", std::to_string(first_box), "0 or more");
  return first_box;
}

}  // namespace vcr1
