// The overlap formulas, once, for the CPU loops and the CUDA kernels. Each line does the same float64 operations in the
// same order as the Python definition in vcr1_fast/tasks/overlap.py, so all three agree bit for bit.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vcr1 {

// What is computed of two sets of intervals; the names in Python are beside the values.
enum class IntervalKind : int32_t { kSetIou, kHullIou, kSetIop };  // "set", "hull", "iop"

// count intervals (start, end), row after row; see the Python definition for what the results mean.
struct Intervals {
  const double* rows;
  int64_t count;
  VCR1_HD double start(int64_t i) const { return rows[2 * i]; }
  VCR1_HD double end(int64_t i) const { return rows[2 * i + 1]; }
};

// Walks the union of one or two lists sorted by start, one connected piece at a time, without scratch memory.
struct UnionWalk {
  Intervals a, b;
  int64_t i = 0, j = 0;
  double lo = 0.0, hi = 0.0;  // the current piece

  VCR1_HD UnionWalk(Intervals first, Intervals second) : a(first), b(second) {}

  // The next non-empty interval by start; false at the end of both lists.
  VCR1_HD bool peek(double& start, double& end, bool& from_a) {
    while (i < a.count && !(a.start(i) < a.end(i))) ++i;
    while (j < b.count && !(b.start(j) < b.end(j))) ++j;
    if (i == a.count && j == b.count) return false;
    from_a = j == b.count || (i < a.count && a.start(i) <= b.start(j));
    start = from_a ? a.start(i) : b.start(j);
    end = from_a ? a.end(i) : b.end(j);
    return true;
  }
  VCR1_HD bool next() {
    double start, end;
    bool from_a;
    if (!peek(start, end, from_a)) return false;
    lo = start;
    hi = end;
    (from_a ? i : j) += 1;
    while (peek(start, end, from_a) && start <= hi) {
      hi = greater(hi, end);
      (from_a ? i : j) += 1;
    }
    return true;
  }
  // The length of all pieces together; ends the walk.
  VCR1_HD double total_s() {
    double total = 0.0;
    while (next()) total += hi - lo;
    return total;
  }
};

// The length of what two sets of instants share.
VCR1_HD double shared_length_s(Intervals predicted, Intervals truth) {
  UnionWalk p(predicted, {nullptr, 0}), t(truth, {nullptr, 0});
  double shared_s = 0.0;
  bool more = p.next() && t.next();
  while (more) {
    const double overlap_s = lesser(p.hi, t.hi) - greater(p.lo, t.lo);
    if (overlap_s > 0.0) shared_s += overlap_s;
    more = p.hi < t.hi ? p.next() : t.next();
  }
  return shared_s;
}

// |A and B| / |A or B| of two sets of instants; 0 when either is empty.
VCR1_HD double set_iou(Intervals predicted, Intervals truth) {
  const double shared_s = shared_length_s(predicted, truth);
  if (!(shared_s > 0.0)) return 0.0;
  return lesser(1.0, shared_s / UnionWalk(predicted, truth).total_s());
}

// |A and B| / |A|, A the predicted set; of a set without length, the share of its instants that lie in B.
VCR1_HD double set_iop(Intervals predicted, Intervals truth) {
  UnionWalk pieces(predicted, {nullptr, 0});
  const double predicted_s = pieces.total_s();
  if (predicted_s > 0.0) {
    const double shared_s = shared_length_s(predicted, truth);
    return shared_s > 0.0 ? lesser(1.0, shared_s / predicted_s) : 0.0;
  }
  int64_t num_covered = 0;
  for (int64_t i = 0; i < predicted.count; ++i) {
    const double instant = predicted.start(i);
    bool is_covered = false;
    for (int64_t j = 0; j < truth.count && !is_covered; ++j) {
      is_covered = truth.start(j) <= instant && instant <= truth.end(j);
    }
    num_covered += is_covered ? 1 : 0;
  }
  return predicted.count > 0 ? static_cast<double>(num_covered) / static_cast<double>(predicted.count) : 0.0;
}

// The paper's: shared length / length of the smallest interval that holds both lists; 1 when that length is <= 0.
VCR1_HD double hull_iou(Intervals predicted, Intervals truth) {
  if (predicted.count == 0 || truth.count == 0) return 0.0;
  double p_lo = predicted.start(0), p_hi = predicted.end(0), t_lo = truth.start(0), t_hi = truth.end(0);
  for (int64_t i = 1; i < predicted.count; ++i) {
    p_lo = lesser(p_lo, predicted.start(i));
    p_hi = greater(p_hi, predicted.end(i));
  }
  for (int64_t i = 1; i < truth.count; ++i) {
    t_lo = lesser(t_lo, truth.start(i));
    t_hi = greater(t_hi, truth.end(i));
  }
  const double hull_s = greater(p_hi, t_hi) - lesser(p_lo, t_lo);
  if (hull_s <= 0.0) return 1.0;
  const double shared_s = lesser(p_hi, t_hi) - greater(p_lo, t_lo);
  return shared_s > 0.0 ? shared_s / hull_s : 0.0;
}

VCR1_HD double interval_overlap(Intervals predicted, Intervals truth, IntervalKind kind) {
  if (kind == IntervalKind::kHullIou) return hull_iou(predicted, truth);
  return kind == IntervalKind::kSetIop ? set_iop(predicted, truth) : set_iou(predicted, truth);
}

// Boxes are (x0, y0, x1, y1). 0 when the boxes do not meet, or one is reversed, or the union is not positive.
VCR1_HD double box_iou(const double* a, const double* b) {
  const double width = lesser(a[2], b[2]) - greater(a[0], b[0]);
  const double height = lesser(a[3], b[3]) - greater(a[1], b[1]);
  if (!(width > 0.0) || !(height > 0.0)) return 0.0;
  const double shared = product(width, height);
  const double union_area = product(a[2] - a[0], a[3] - a[1]) + product(b[2] - b[0], b[3] - b[1]) - shared;
  if (!(union_area > 0.0)) return 0.0;
  const double iou = shared / union_area;
  return iou >= 0.0 ? lesser(1.0, iou) : 0.0;  // infinity / infinity is NaN and counts 0
}

// Mean box overlap over boxes first_box.. of two tracks; 0 when the counts differ or no box is left.
VCR1_HD double track_overlap(const double* predicted, int64_t num_predicted, const double* truth, int64_t num_truth,
                             int64_t first_box) {
  if (num_predicted != num_truth || num_truth <= first_box) return 0.0;
  double total = 0.0;
  for (int64_t i = first_box; i < num_truth; ++i) total += box_iou(predicted + 4 * i, truth + 4 * i);
  return total / static_cast<double>(num_truth - first_box);
}

}  // namespace vcr1
