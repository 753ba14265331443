// The names, arguments and docstrings of vcr1_fast._native. Formulas are in overlap_math.h.
#include <pybind11/pybind11.h>

#include "overlap.h"
#include "tensor_view.h"
#ifdef VCR1_WITH_CUDA
#include "overlap.cuh"
#endif

namespace py = pybind11;

namespace vcr1 {
namespace {

constexpr int64_t kBoxWidth = 4;
constexpr int64_t kIntervalWidth = 2;

// The five arrays of one call, checked against each other. N answers, P predicted rows, Q true rows.
struct Batch {
  Batch(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
        const py::object& truth_offsets, const py::object& out_array, int64_t width, int32_t device, int64_t stream)
      : out("out", out_array, {kAnyDim}, device, stream),
        predicted_rows("predicted", predicted, {kAnyDim, width}, device, stream),
        predicted_starts("predicted_offsets", predicted_offsets, {out.dim(0) + 1}, device, stream),
        truth_rows("truth", truth, {kAnyDim, width}, device, stream),
        truth_starts("truth_offsets", truth_offsets, {out.dim(0) + 1}, device, stream),
        row_width(width) {
    const auto same_device = [this](const char* name, int32_t id) {
      if (id != out.device_id()) fail(name, "device index", std::to_string(id), std::to_string(out.device_id()));
    };
    same_device("predicted", predicted_rows.device_id());
    same_device("predicted_offsets", predicted_starts.device_id());
    same_device("truth", truth_rows.device_id());
    same_device("truth_offsets", truth_starts.device_id());
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

void check_first_box(int64_t first_box) {
  if (first_box < 0) fail("first_box", "value", std::to_string(first_box), "0 or more");
}

void interval_iou(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                  const py::object& truth_offsets, bool hull, const py::object& out) {
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, out, kIntervalWidth, kCpu, 0);
  const py::gil_scoped_release release;
  check_offsets("predicted_offsets", batch.predicted(), batch.num_lists());
  check_offsets("truth_offsets", batch.truth(), batch.num_lists());
  check_sorted_by_start("predicted", batch.predicted(), batch.num_lists());
  check_sorted_by_start("truth", batch.truth(), batch.num_lists());
  interval_iou_cpu(batch.predicted(), batch.truth(), hull, batch.num_lists(), batch.out.data());
}

void track_iou(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
               const py::object& truth_offsets, int64_t first_box, const py::object& out) {
  check_first_box(first_box);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, out, kBoxWidth, kCpu, 0);
  const py::gil_scoped_release release;
  check_offsets("predicted_offsets", batch.predicted(), batch.num_lists());
  check_offsets("truth_offsets", batch.truth(), batch.num_lists());
  track_iou_cpu(batch.predicted(), batch.truth(), first_box, batch.num_lists(), batch.out.data());
}

constexpr const char* kIntervalDoc =
    "IoU of N answers with their ground truths, intervals in seconds, written to out.\n\n"
    "predicted [P, 2] and truth [Q, 2] float64 rows (start_s, end_s); answer n owns rows offsets[n] to offsets[n + 1] "
    "of\n"
    "each; offsets [N + 1] int64; each list sorted by start; out [N] float64. Contiguous CPU arrays with __dlpack__.\n"
    "hull False: |A and B| / |A or B| as sets of instants. hull True: shared length over the smallest interval that "
    "holds\n"
    "both (VideoChat-R1's reward). Runs without the GIL. Raises ValueError \"name: what got G, wanted W\".";
constexpr const char* kTrackDoc =
    "Mean box IoU of N predicted tracks with the true ones over boxes first_box.., written to out.\n\n"
    "predicted [P, 4] and truth [Q, 4] float64 rows (x0, y0, x1, y1); track n owns rows offsets[n] to offsets[n + 1] "
    "of\n"
    "each; offsets [N + 1] int64; out [N] float64. Contiguous CPU arrays with __dlpack__. A track with another number "
    "of\n"
    "boxes than the truth gets 0. Runs without the GIL. Raises ValueError \"name: what got G, wanted W\".";

#ifdef VCR1_WITH_CUDA

// DLPack's numbering of streams: 0 is forbidden there as ambiguous, 1 is the legacy default stream.
int64_t dlpack_stream(int64_t stream) { return stream == 0 ? 1 : stream; }

void interval_iou_on_cuda(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                          const py::object& truth_offsets, bool hull, const py::object& out, int64_t stream) {
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, out, kIntervalWidth, kCuda,
                    dlpack_stream(stream));
  const py::gil_scoped_release release;
  interval_iou_cuda(batch.predicted(), batch.truth(), hull, batch.num_lists(), batch.out.data(), batch.out.device_id(),
                    stream);
}

void track_iou_on_cuda(const py::object& predicted, const py::object& predicted_offsets, const py::object& truth,
                       const py::object& truth_offsets, int64_t first_box, const py::object& out, int64_t stream) {
  check_first_box(first_box);
  const Batch batch(predicted, predicted_offsets, truth, truth_offsets, out, kBoxWidth, kCuda, dlpack_stream(stream));
  const py::gil_scoped_release release;
  track_iou_cuda(batch.predicted(), batch.truth(), first_box, batch.num_lists(), batch.out.data(),
                 batch.out.device_id(), stream);
}

constexpr const char* kCudaDoc =
    "The same with CUDA tensors (anything with __dlpack__ on a CUDA device; no requires_grad), in one kernel "
    "launch.\n\n"
    "stream: the raw handle, torch.cuda.current_stream().cuda_stream. Returns before the result is there. Offsets are\n"
    "read on the device, so a broken answer (offsets out of bounds, intervals not sorted) gets NaN instead of an "
    "error.";

#endif

}  // namespace
}  // namespace vcr1

PYBIND11_MODULE(_native, m) {
  m.doc() = "Batch overlap of intervals and box tracks. Definitions: vcr1_fast.tasks.overlap.";
  m.def("interval_iou", &vcr1::interval_iou, py::arg("predicted"), py::arg("predicted_offsets"), py::arg("truth"),
        py::arg("truth_offsets"), py::arg("hull"), py::arg("out"), vcr1::kIntervalDoc);
  m.def("track_iou", &vcr1::track_iou, py::arg("predicted"), py::arg("predicted_offsets"), py::arg("truth"),
        py::arg("truth_offsets"), py::arg("first_box"), py::arg("out"), vcr1::kTrackDoc);
#ifdef VCR1_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("interval_iou_cuda", &vcr1::interval_iou_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("hull"), py::arg("out"), py::arg("stream"), vcr1::kCudaDoc);
  m.def("track_iou_cuda", &vcr1::track_iou_on_cuda, py::arg("predicted"), py::arg("predicted_offsets"),
        py::arg("truth"), py::arg("truth_offsets"), py::arg("first_box"), py::arg("out"), py::arg("stream"),
        vcr1::kCudaDoc);
#else
  m.attr("has_cuda") = false;
#endif
}
