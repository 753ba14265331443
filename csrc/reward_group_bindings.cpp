// Rewards and advantages of a batch in Python, alone or with the overlap in the same call. Formulas: reward_groups.h.
#include "bindings.h"
#include "overlap_batch.h"
#include "reward_groups.h"
#ifdef VCR1_WITH_CUDA
#include "overlap.cuh"
#endif

namespace vcr1 {
namespace {

// What turns reward parts into advantages, as Python hands it over.
struct GroupArguments {
  const py::object &parts, &weights, &group_offsets;
  const std::string& scale;
  double std_floor;
  const py::object &rewards, &advantages;
};

AdvantageScale advantage_scale(const std::string& scale) {
  if (scale == "group") return AdvantageScale::kGroup;
  if (scale == "batch") return AdvantageScale::kBatch;
  if (scale == "none") return AdvantageScale::kNone;
  fail("scale", "value", "'" + scale + "'", "'group', 'batch' or 'none'");
}

double checked_floor(double std_floor) {
  if (!(std_floor > 0.0)) fail("std_floor", "value", std::to_string(std_floor), "more than 0");
  return std_floor;
}

// The arrays, checked against each other. K parts, S answers, G groups; num_overlaps: 1 where an overlap is weighted
// too.
struct GroupBatch {
  GroupBatch(const GroupArguments& arguments, int64_t num_overlaps, int32_t device, int64_t stream)
      : scale(advantage_scale(arguments.scale)),
        std_floor(checked_floor(arguments.std_floor)),
        advantages("advantages", arguments.advantages, {kAnyDim}, device, stream),
        rewards("rewards", arguments.rewards, {advantages.dim(0)}, device, stream),
        parts("parts", arguments.parts, {kAnyDim, advantages.dim(0)}, device, stream),
        weights("weights", arguments.weights, {parts.dim(0) + num_overlaps}, device, stream),
        group_starts("group_offsets", arguments.group_offsets, {kAnyDim}, device, stream) {
    if (group_starts.dim(0) == 0) fail("group_offsets", "dim 0", "0", "the number of groups + 1");
    check_same_device("rewards", rewards.device_id(), advantages.device_id());
    check_same_device("parts", parts.device_id(), advantages.device_id());
    check_same_device("weights", weights.device_id(), advantages.device_id());
    check_same_device("group_offsets", group_starts.device_id(), advantages.device_id());
  }
  RewardGroups view() const {
    return {
        parts.data(), weights.data(), group_starts.data(), parts.dim(0),     advantages.dim(0), group_starts.dim(0) - 1,
        scale,        std_floor,      rewards.data(),      advantages.data()};
  }
  void check_groups() const {
    check_offsets("group_offsets", group_starts.data(), group_starts.dim(0) - 1, advantages.dim(0));
  }

  AdvantageScale scale;
  double std_floor;
  TensorView<double> advantages;
  TensorView<double> rewards;
  TensorView<double> parts;
  TensorView<double> weights;
  TensorView<int64_t> group_starts;
};

template <class Overlap>
void advantages_cpu(const Overlap& overlap, const RewardGroups& groups, double* overlaps) {
  overlap_cpu(overlap, groups.num_answers, overlaps);
  const double weight = groups.weights[groups.num_parts];
  for (int64_t s = 0; s < groups.num_answers; ++s) {
    groups.rewards[s] = groups.reward(s) + product(weight, overlaps[s]);
  }
  group_advantages_cpu(groups);
}

void check_num_answers(const Batch& batch, const GroupBatch& groups) {
  const int64_t wanted = groups.advantages.dim(0);
  if (batch.num_lists() != wanted) {
    fail("overlaps", "dim 0", std::to_string(batch.num_lists()), std::to_string(wanted));
  }
  check_same_device("overlaps", batch.out.device_id(), groups.advantages.device_id());
}

void group_advantages(const py::object& parts, const py::object& weights, const py::object& group_offsets,
                      const std::string& scale, double std_floor, const py::object& rewards,
                      const py::object& advantages) {
  const GroupBatch batch({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 0, kCpu, 0);
  const py::gil_scoped_release release;
  batch.check_groups();
  const RewardGroups groups = batch.view();
  for (int64_t s = 0; s < groups.num_answers; ++s) groups.rewards[s] = groups.reward(s);
  group_advantages_cpu(groups);
}

void interval_advantages(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                         const py::object& truth_offsets, const std::string& kind, const py::object& parts,
                         const py::object& weights, const py::object& group_offsets, const std::string& scale,
                         double std_floor, const py::object& overlaps, const py::object& rewards,
                         const py::object& advantages) {
  const IntervalKind what = interval_kind(kind);
  const GroupBatch groups({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 1, kCpu, 0);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "overlaps", overlaps, kIntervalWidth, kCpu, 0);
  check_num_answers(batch, groups);
  const py::gil_scoped_release release;
  const IntervalOverlap overlap{batch.predicted(), batch.truth(), what};
  groups.check_groups();
  check(overlap, batch.num_lists());
  advantages_cpu(overlap, groups.view(), batch.out.data());
}

void track_advantages(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                      const py::object& truth_offsets, int64_t first_box, const std::string& kind,
                      const py::object& parts, const py::object& weights, const py::object& group_offsets,
                      const std::string& scale, double std_floor, const py::object& overlaps, const py::object& rewards,
                      const py::object& advantages) {
  const BoxKind what = box_kind(kind);
  checked_first_box(first_box);
  const GroupBatch groups({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 1, kCpu, 0);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "overlaps", overlaps, kBoxWidth, kCpu, 0);
  check_num_answers(batch, groups);
  const py::gil_scoped_release release;
  const TrackOverlap overlap{batch.predicted(), batch.truth(), first_box, what};
  groups.check_groups();
  check(overlap, batch.num_lists());
  advantages_cpu(overlap, groups.view(), batch.out.data());
}

constexpr const char* kGroupDoc =
    "Advantages of S answers in G groups from K reward parts, written to rewards [S] and advantages [S].\n\n"
    "parts [K, S] and weights [K] float64, group_offsets [G + 1] int64: reward_s = sum over k of weights[k] parts[k, "
    "s];\n"
    "advantage = (reward - group mean) / (std + std_floor), std unbiased, of the group (scale 'group') or of all "
    "rewards\n"
    "('batch'); / 1 for 'none'. Equal rewards give exactly 0. Contiguous CPU arrays with __dlpack__. Runs without the\n"
    "GIL. Raises ValueError \"name: what got G, wanted W\".";
constexpr const char* kFusedDoc =
    "Overlap, reward and advantage of S answers in one call, written to overlaps, rewards and advantages [S].\n\n"
    "Arguments of the overlap function, then those of group_advantages; weights [K + 1]: the last one is the "
    "overlap's.";

#ifdef VCR1_WITH_CUDA

void group_advantages_on_cuda(const py::object& parts, const py::object& weights, const py::object& group_offsets,
                              const std::string& scale, double std_floor, const py::object& rewards,
                              const py::object& advantages, int64_t stream) {
  const GroupBatch batch({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 0, kCuda,
                         dlpack_stream(stream));
  const py::gil_scoped_release release;
  advantages_cuda(batch.view(), {batch.advantages.device_id(), stream});
}

void interval_advantages_on_cuda(const py::object& predicted, const py::object& predicted_offsets,
                                 const py::object& truth, const py::object& truth_offsets, const std::string& kind,
                                 const py::object& parts, const py::object& weights, const py::object& group_offsets,
                                 const std::string& scale, double std_floor, const py::object& overlaps,
                                 const py::object& rewards, const py::object& advantages, int64_t stream) {
  const IntervalKind what = interval_kind(kind);
  const int64_t ready = dlpack_stream(stream);
  const GroupBatch groups({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 1, kCuda, ready);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "overlaps", overlaps, kIntervalWidth, kCuda,
                    ready);
  check_num_answers(batch, groups);
  const py::gil_scoped_release release;
  advantages_cuda(IntervalOverlap{batch.predicted(), batch.truth(), what}, groups.view(), batch.out.data(),
                  {batch.out.device_id(), stream});
}

void track_advantages_on_cuda(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                              const py::object& truth_offsets, int64_t first_box, const std::string& kind,
                              const py::object& parts, const py::object& weights, const py::object& group_offsets,
                              const std::string& scale, double std_floor, const py::object& overlaps,
                              const py::object& rewards, const py::object& advantages, int64_t stream) {
  const BoxKind what = box_kind(kind);
  checked_first_box(first_box);
  const int64_t ready = dlpack_stream(stream);
  const GroupBatch groups({parts, weights, group_offsets, scale, std_floor, rewards, advantages}, 1, kCuda, ready);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "overlaps", overlaps, kBoxWidth, kCuda, ready);
  check_num_answers(batch, groups);
  const py::gil_scoped_release release;
  advantages_cuda(TrackOverlap{batch.predicted(), batch.truth(), first_box, what}, groups.view(), batch.out.data(),
                  {batch.out.device_id(), stream});
}

constexpr const char* kCudaDoc =
    "The same with CUDA tensors, in one kernel launch on `stream` (torch.cuda.current_stream().cuda_stream).\n\n"
    "Returns before the results are there. An answer with broken offsets gets NaN, and so does its group; a group\n"
    "whose own offsets are out of bounds is not written.";

#endif

}  // namespace

void bind_reward_groups(py::module_& m) {
  m.def("group_advantages", &group_advantages, py::arg("parts"), py::arg("weights"), py::arg("group_offsets"),
        py::arg("scale"), py::arg("std_floor"), py::arg("rewards"), py::arg("advantages"), kGroupDoc);
  m.def("interval_advantages", &interval_advantages, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("kind"), py::arg("parts"), py::arg("weights"),
        py::arg("group_offsets"), py::arg("scale"), py::arg("std_floor"), py::arg("overlaps"), py::arg("rewards"),
        py::arg("advantages"), kFusedDoc);
  m.def("track_advantages", &track_advantages, py::arg("predicted"), py::arg("predicted_offsets"), py::arg("truth"),
        py::arg("truth_offsets"), py::arg("first_box"), py::arg("kind"), py::arg("parts"), py::arg("weights"),
        py::arg("group_offsets"), py::arg("scale"), py::arg("std_floor"), py::arg("overlaps"), py::arg("rewards"),
        py::arg("advantages"), kFusedDoc);
#ifdef VCR1_WITH_CUDA
  m.def("group_advantages_cuda", &group_advantages_on_cuda, py::arg("parts"), py::arg("weights"),
        py::arg("group_offsets"), py::arg("scale"), py::arg("std_floor"), py::arg("rewards"), py::arg("advantages"),
        py::arg("stream"), kCudaDoc);
  m.def("interval_advantages_cuda", &interval_advantages_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("kind"), py::arg("parts"), py::arg("weights"),
        py::arg("group_offsets"), py::arg("scale"), py::arg("std_floor"), py::arg("overlaps"), py::arg("rewards"),
        py::arg("advantages"), py::arg("stream"), kCudaDoc);
  m.def("track_advantages_cuda", &track_advantages_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("first_box"), py::arg("kind"), py::arg("parts"),
        py::arg("weights"), py::arg("group_offsets"), py::arg("scale"), py::arg("std_floor"), py::arg("overlaps"),
        py::arg("rewards"), py::arg("advantages"), py::arg("stream"), kCudaDoc);
#endif
}

}  // namespace vcr1
