// The device code of csrc/overlap.cu against the CPU half, bit for bit, on random batches.
//   compare ROUNDS NUM_ANSWERS SKIPPED_BARRIER    prints "values N, fractions F, different D"
// F of the values lie strictly between 0 and 1: an agreement of zeros would say nothing.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "overlap.cuh"

namespace {

using namespace vcr1;

constexpr Launch kLaunch{0, 0};

struct Count {
  int64_t values = 0, fractions = 0, different = 0;
  void add(double got, double wanted) {
    ++values;
    fractions += 0.0 < wanted && wanted < 1.0;
    different += std::memcmp(&got, &wanted, sizeof(got)) != 0;
  }
  void add(const std::vector<double>& got, const std::vector<double>& wanted) {
    for (size_t i = 0; i < wanted.size(); ++i) add(got[i], wanted[i]);
  }
};

class Draw {
 public:
  int64_t below(int64_t bound) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(bound)); }

  // Mostly few and coarse, so that ends meet; else any size up to 1e150, whose products are finite, and both zeros.
  double number() {
    const double coarse = static_cast<double>(below(40)) / static_cast<double>(1 + below(7));
    const int64_t what = below(40);
    if (what == 0) return -0.0;
    if (what == 1) return 5e-324;
    if (what == 2) return below(2) == 0 ? 1e150 : -1e150;
    if (what == 3) return std::ldexp(coarse + 0.1, static_cast<int>(below(900)) - 450);
    return what < 8 ? -coarse : coarse;
  }

 private:
  std::mt19937_64 generator_{1};
};

// Lists of 0 to 5 rows. Intervals: sorted by start. Boxes: mostly with their corners in order.
struct Lists {
  Lists(Draw& draw, int64_t num_lists, int64_t width) : row_width(width) {
    for (int64_t n = 0; n < num_lists; ++n) {
      std::vector<std::array<double, 4>> list(static_cast<size_t>(draw.below(6)));
      for (auto& row : list) {
        for (double& value : row) value = draw.number();
        const bool is_ordered = draw.below(8) != 0;
        const size_t half = static_cast<size_t>(width) / 2;
        for (size_t i = 0; i < half; ++i) {
          if (is_ordered && row[i + half] < row[i]) std::swap(row[i], row[i + half]);
        }
      }
      if (width == 2) std::stable_sort(list.begin(), list.end(), [](auto& a, auto& b) { return a[0] < b[0]; });
      for (const auto& row : list) rows.insert(rows.end(), row.begin(), row.begin() + width);
      offsets.push_back(static_cast<int64_t>(rows.size()) / width);
    }
  }
  Ragged view() const { return {rows.data(), offsets.data(), offsets.back(), row_width}; }

  std::vector<double> rows;
  std::vector<int64_t> offsets{0};
  int64_t row_width;
};

template <class Overlap>
void compare_overlap(const Overlap& overlap, int64_t num_answers, Count& count) {
  std::vector<double> got(static_cast<size_t>(num_answers), 7.0), wanted(got);
  overlap_cuda(overlap, num_answers, got.data(), kLaunch);
  check(overlap, num_answers);
  overlap_cpu(overlap, num_answers, wanted.data());
  count.add(got, wanted);
}

void compare_advantages(Draw& draw, int64_t num_answers, Count& count) {
  std::vector<double> rewards;
  std::vector<int64_t> offsets{0};
  while (offsets.back() < num_answers) {  // groups of 0, of 1, and of more answers than a block has threads
    const bool are_equal = draw.below(4) == 0;
    offsets.push_back(std::min(num_answers, offsets.back() + draw.below(draw.below(16) == 0 ? 80 : 10)));
    const double shared = draw.number();
    while (static_cast<int64_t>(rewards.size()) < offsets.back()) rewards.push_back(are_equal ? shared : draw.number());
  }
  for (const auto scale : {AdvantageScale::kGroup, AdvantageScale::kBatch, AdvantageScale::kNone}) {
    std::vector<double> got(rewards.size(), 7.0), wanted(got);
    const auto num_groups = static_cast<int64_t>(offsets.size()) - 1;
    RewardGroups groups{rewards.data(), offsets.data(), num_answers, num_groups, scale, got.data()};
    group_advantages_cuda(groups, kLaunch);
    groups.advantages = wanted.data();
    group_advantages_cpu(groups);
    count.add(got, wanted);
  }
}

// What the CPU half refuses by an error: NaN for the answer alone, and a group that is left as it was.
void compare_unsound(Count& count) {
  const auto nan_or = [](double value) { return std::isnan(value) ? -1.0 : value; };
  const std::vector<double> rows{0, 2, 1, 3, 0, 1};  // the start of row 2 lies before that of row 1
  const std::vector<int64_t> starts{0, 1, 3, 2, 9}, truth_starts{0, 1, 1, 1, 1};
  const Ragged predicted{rows.data(), starts.data(), 3, 2}, truth{rows.data(), truth_starts.data(), 1, 2};
  std::vector<double> got(4, 7.0);
  overlap_cuda(IntervalOverlap{predicted, truth, IntervalKind::kSetIou}, 4, got.data(), kLaunch);
  for (size_t i = 0; i < 4; ++i) count.add(nan_or(got[i]), i == 0 ? 1.0 : -1.0);

  const Ragged boxes{rows.data(), starts.data(), 1, 4};
  overlap_cuda(TrackOverlap{boxes, boxes, 0}, 2, got.data(), kLaunch);
  count.add(nan_or(got[0]), 1.0);
  count.add(nan_or(got[1]), -1.0);

  const std::vector<double> rewards{0, 1, 2, 5, 6};
  const std::vector<int64_t> offsets{0, 3, 99, 5};
  for (const auto scale : {AdvantageScale::kNone, AdvantageScale::kBatch}) {
    std::vector<double> advantages(5, 7.0);
    group_advantages_cuda({rewards.data(), offsets.data(), 5, 3, scale, advantages.data()}, kLaunch);
    const double divisor = scale == AdvantageScale::kNone ? 1.0 : std::sqrt(6.7) + kStdFloor;  // of all five
    count.add(std::round(1e9 * advantages[2] * divisor), 1e9);
    for (size_t i = 3; i < 5; ++i) count.add(advantages[i], 7.0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  skipped_barrier = std::atoi(argv[3]);
  Draw draw;
  Count count;
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    const int64_t num_answers = round == 0 ? 0 : std::atoi(argv[2]) - round;  // mostly not a multiple of a block
    const Lists intervals(draw, num_answers, 2), truths(draw, num_answers, 2);
    for (const auto kind : {IntervalKind::kSetIou, IntervalKind::kHullIou, IntervalKind::kSetIop}) {
      compare_overlap(IntervalOverlap{intervals.view(), truths.view(), kind}, num_answers, count);
    }
    const Lists tracks(draw, num_answers, 4);
    Lists true_tracks(tracks);  // of the same lengths, else there is nothing to compare
    for (double& corner : true_tracks.rows) corner = draw.below(3) == 0 ? draw.number() : corner;
    compare_overlap(TrackOverlap{tracks.view(), true_tracks.view(), round % 2}, num_answers, count);
    compare_advantages(draw, 8 * num_answers, count);  // 300 groups of 260 answers: more than a block has threads
  }
  compare_unsound(count);
  std::printf("values %lld, fractions %lld, different %lld\n", static_cast<long long>(count.values),
              static_cast<long long>(count.fractions), static_cast<long long>(count.different));
  return 0;
}
