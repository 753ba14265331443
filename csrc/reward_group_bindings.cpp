// Advantages of a batch in Python. Formulas are in reward_groups.h.
#include "bindings.h"
#include "overlap_batch.h"
#include "reward_groups.h"
#ifdef VCR1_WITH_CUDA
#include "overlap.cuh"
#endif

namespace vcr1 {
namespace {

AdvantageScale advantage_scale(const std::string& scale) {
  if (scale == "group") return AdvantageScale::kGroup;
  if (scale == "batch") return AdvantageScale::kBatch;
  if (scale == "none") return AdvantageScale::kNone;
  fail("scale", "value", "'" + scale + "'", "'group', 'batch' or 'none'");
}

// The arrays of S answers in G groups, checked against each other.
struct GroupBatch {
  GroupBatch(const py::object& rewards_array, const py::object& offsets_array, const std::string& scale_name,
             const py::object& advantages_array, int32_t device, int64_t stream)
      : scale(advantage_scale(scale_name)),
        advantages("advantages", advantages_array, {kAnyDim}, device, stream),
        rewards("rewards", rewards_array, {advantages.dim(0)}, device, stream),
        group_starts("group_offsets", offsets_array, {kAnyDim}, device, stream) {
    if (group_starts.dim(0) == 0) fail("group_offsets", "dim 0", "0", "the number of groups + 1");
    check_same_device("rewards", rewards.device_id(), advantages.device_id());
    check_same_device("group_offsets", group_starts.device_id(), advantages.device_id());
  }
  RewardGroups view() const {
    const int64_t num_groups = group_starts.dim(0) - 1;
    return {rewards.data(), group_starts.data(), rewards.dim(0), num_groups, scale, advantages.data()};
  }

  AdvantageScale scale;
  TensorView<double> advantages;
  TensorView<double> rewards;
  TensorView<int64_t> group_starts;
};

void group_advantages_on_cpu(const py::object& rewards, const py::object& group_offsets, const std::string& scale,
                             const py::object& advantages) {
  const GroupBatch batch(rewards, group_offsets, scale, advantages, kCpu, 0);
  const py::gil_scoped_release release;
  const RewardGroups groups = batch.view();
  check_offsets("group_offsets", groups.group_offsets, groups.num_groups, groups.num_answers);
  group_advantages_cpu(groups);
}

constexpr const char* kGroupDoc =
    "Advantages of S answers in G groups, written to advantages.\n\n"
    "rewards and advantages [S] float64, group_offsets [G + 1] int64; advantage = (reward - group mean) / (std +\n"
    "1e-4), std unbiased, of the group (scale 'group') or of all rewards ('batch'); / 1 for 'none'. Equal\n"
    "rewards give exactly 0. Contiguous CPU arrays with __dlpack__. Runs without the GIL. Raises ValueError\n"
    "\"name: what got G, wanted W\".";

#ifdef VCR1_WITH_CUDA

void group_advantages_on_cuda(const py::object& rewards, const py::object& group_offsets, const std::string& scale,
                              const py::object& advantages, int64_t stream) {
  const GroupBatch batch(rewards, group_offsets, scale, advantages, kCuda, dlpack_stream(stream));
  const py::gil_scoped_release release;
  group_advantages_cuda(batch.view(), {batch.advantages.device_id(), stream});
}

constexpr const char* kCudaDoc =
    "The same with CUDA tensors, in one kernel launch on `stream` (torch.cuda.current_stream().cuda_stream).\n\n"
    "Returns before the results are there. A group whose offsets are out of bounds is not written.";

#endif

}  // namespace

void bind_reward_groups(py::module_& m) {
  m.def("group_advantages", &group_advantages_on_cpu, py::arg("rewards"), py::arg("group_offsets"), py::arg("scale"),
        py::arg("advantages"), kGroupDoc);
#ifdef VCR1_WITH_CUDA
  m.def("group_advantages_cuda", &group_advantages_on_cuda, py::arg("rewards"), py::arg("group_offsets"),
        py::arg("scale"), py::arg("advantages"), py::arg("stream"), kCudaDoc);
#endif
}

}  // namespace vcr1
