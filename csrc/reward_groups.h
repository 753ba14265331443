// Rewards -> advantages relative to the group of answers to the same prompt. The formulas, for the CPU and for CUDA;
// each does the float64 operations of the Python definition in vcr1_fast/tasks/reward_groups.py in order.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace vcr1 {

// By what (reward - group mean) is divided: the unbiased standard deviation of the group or of all rewards, +
// kStdFloor; or by 1. In Python "group", "batch", "none".
enum class AdvantageScale : int32_t { kGroup, kBatch, kNone };

constexpr double kStdFloor = 1e-4;  // STD_FLOOR in Python

struct RewardGroups {
  const double* rewards;         // [S]
  const int64_t* group_offsets;  // [G + 1], answers of group g are group_offsets[g] .. group_offsets[g + 1]
  int64_t num_answers, num_groups;
  AdvantageScale scale;
  double* advantages;  // [S], written
};

struct Moments {
  double mean, std;  // std is unbiased
  bool are_equal;    // fewer than two rewards, or all the same: rounding of the mean must not become an advantage
};

VCR1_HD Moments moments(const double* rewards, int64_t count) {
  bool are_equal = true;
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    total += rewards[i];
    are_equal = are_equal && rewards[i] == rewards[0];
  }
  if (are_equal || count < 2) return {count > 0 ? rewards[0] : 0.0, 0.0, true};
  const double mean = total / static_cast<double>(count);
  double squares = 0.0;
  for (int64_t i = 0; i < count; ++i) squares += product(rewards[i] - mean, rewards[i] - mean);
  return {mean, sqrt(squares / static_cast<double>(count - 1)), false};
}

VCR1_HD double advantage(double reward, const Moments& group, double divisor) {
  return group.are_equal ? 0.0 : (reward - group.mean) / divisor;
}

// batch_std counts for scale batch only.
VCR1_HD double divisor_of(const RewardGroups& groups, const Moments& group, double batch_std) {
  if (groups.scale == AdvantageScale::kNone) return 1.0;
  return (groups.scale == AdvantageScale::kBatch ? batch_std : group.std) + kStdFloor;
}

// Fills advantages from rewards. A thousand groups of 8 take some 20 microseconds: one thread.
inline void group_advantages_cpu(const RewardGroups& groups) {
  const bool is_batch = groups.scale == AdvantageScale::kBatch;
  const double batch_std = is_batch ? moments(groups.rewards, groups.num_answers).std : 0.0;
  for (int64_t g = 0; g < groups.num_groups; ++g) {
    const int64_t begin = groups.group_offsets[g], end = groups.group_offsets[g + 1];
    const Moments group = moments(groups.rewards + begin, end - begin);
    const double divisor = divisor_of(groups, group, batch_std);
    for (int64_t s = begin; s < end; ++s) groups.advantages[s] = advantage(groups.rewards[s], group, divisor);
  }
}

}  // namespace vcr1
