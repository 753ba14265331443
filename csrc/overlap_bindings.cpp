// Overlaps of a batch in Python. Formulas are in overlap_math.h.
#include "bindings.h"
#include "overlap_batch.h"
#ifdef VCR1_WITH_CUDA
#include "overlap.cuh"
#endif

namespace vcr1 {
namespace {

void interval_overlap_on_cpu(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                             const py::object& truth_offsets, const std::string& kind, const py::object& out) {
  const IntervalKind what = interval_kind(kind);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "out", out, kIntervalWidth, kCpu, 0);
  const py::gil_scoped_release release;
  const IntervalOverlap overlap{batch.predicted(), batch.truth(), what};
  check(overlap, batch.num_lists());
  overlap_cpu(overlap, batch.num_lists(), batch.out.data());
}

void track_overlap_on_cpu(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                          const py::object& truth_offsets, int64_t first_box, const py::object& out) {
  checked_first_box(first_box);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "out", out, kBoxWidth, kCpu, 0);
  const py::gil_scoped_release release;
  const TrackOverlap overlap{batch.predicted(), batch.truth(), first_box};
  check(overlap, batch.num_lists());
  overlap_cpu(overlap, batch.num_lists(), batch.out.data());
}

constexpr const char* kIntervalDoc =
    "Overlap of N answers with their ground truths, intervals in seconds, written to out.\n\n"
    "predicted [P, 2] and truth [Q, 2] float64 rows (start_s, end_s); answer n owns rows offsets[n] to offsets[n + 1]\n"
    "of each; offsets [N + 1] int64; each list sorted by start; out [N] float64. Contiguous CPU arrays with\n"
    "__dlpack__. kind 'set': |A and B| / |A or B| as sets of instants; 'iop': |A and B| / |A|, A the prediction; "
    "'hull':\n"
    "shared length over the smallest interval that holds both (VideoChat-R1's reward). Runs without the GIL, large\n"
    "batches on several threads. Raises ValueError \"name: what got G, wanted W\".";
constexpr const char* kTrackDoc =
    "Mean box overlap of N predicted tracks with the true ones over boxes first_box.., written to out.\n\n"
    "predicted [P, 4] and truth [Q, 4] float64 rows (x0, y0, x1, y1); track n owns rows offsets[n] to offsets[n + 1]\n"
    "of each; offsets [N + 1] int64; out [N] float64. Contiguous CPU arrays with __dlpack__. A track with\n"
    "another number of boxes than the truth gets 0. Runs without the GIL, large batches on several threads. Raises\n"
    "ValueError \"name: what got G, wanted W\".";

#ifdef VCR1_WITH_CUDA

void interval_overlap_on_cuda(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                              const py::object& truth_offsets, const std::string& kind, const py::object& out,
                              int64_t stream) {
  const IntervalKind what = interval_kind(kind);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "out", out, kIntervalWidth, kCuda,
                    dlpack_stream(stream));
  const py::gil_scoped_release release;
  overlap_cuda(IntervalOverlap{batch.predicted(), batch.truth(), what}, batch.num_lists(), batch.out.data(),
               {batch.out.device_id(), stream});
}

void track_overlap_on_cuda(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                           const py::object& truth_offsets, int64_t first_box, const py::object& out, int64_t stream) {
  checked_first_box(first_box);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, "out", out, kBoxWidth, kCuda,
                    dlpack_stream(stream));
  const py::gil_scoped_release release;
  overlap_cuda(TrackOverlap{batch.predicted(), batch.truth(), first_box}, batch.num_lists(), batch.out.data(),
               {batch.out.device_id(), stream});
}

constexpr const char* kCudaDoc =
    "The same with CUDA tensors (anything with __dlpack__ on a CUDA device; no requires_grad), in one kernel "
    "launch.\n\n"
    "stream: the raw handle, torch.cuda.current_stream().cuda_stream. Returns before the result is there. Offsets are\n"
    "read on the device, so a broken answer (offsets out of bounds, intervals not sorted) gets NaN instead of an "
    "error.";

#endif

}  // namespace

void bind_overlap(py::module_& m) {
  m.def("interval_overlap", &interval_overlap_on_cpu, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("kind"), py::arg("out"), kIntervalDoc);
  m.def("track_overlap", &track_overlap_on_cpu, py::arg("predicted"), py::arg("predicted_offsets"), py::arg("truth"),
        py::arg("truth_offsets"), py::arg("first_box"), py::arg("out"), kTrackDoc);
#ifdef VCR1_WITH_CUDA
  m.def("interval_overlap_cuda", &interval_overlap_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("kind"), py::arg("out"), py::arg("stream"), kCudaDoc);
  m.def("track_overlap_cuda", &track_overlap_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("first_box"), py::arg("out"), py::arg("stream"),
        kCudaDoc);
#endif
}

}  // namespace vcr1
