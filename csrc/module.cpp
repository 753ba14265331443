// The compiled module vcr1_fast._native. Names, arguments and docstrings are in the *_bindings.cpp files.
#include "bindings.h"
#include "parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Rewards of a batch of answers: readers of text, overlaps, advantages. Definitions: vcr1_fast.tasks.overlap, "
      "reward_groups, answer_format, glue_format, choice_format.";
#ifdef VCR1_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  vcr1::bind_overlap(m);
  vcr1::bind_reward_groups(m);
  vcr1::bind_answers(m);
  m.def("thread_limit", &vcr1::thread_limit, "The most threads that one call may use.");
  m.def(
      "set_thread_limit",
      [](int64_t count) {
        if (count < 1 || count > vcr1::kMaxThreads) {
          vcr1::fail("count", "value", std::to_string(count), "1 to " + std::to_string(vcr1::kMaxThreads));
        }
        vcr1::set_thread_limit(static_cast<int32_t>(count));
      },
      py::arg("count"),
      "For this process. At first: the cores it may run on, at most 8. Results do not depend on it. Raises "
      "ValueError.");
}
