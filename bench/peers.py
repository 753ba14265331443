"""Other projects' implementations, loaded as alone as they allow, so that one missing package does not hide a kernel.

Every loader returns a function or raises; `load_all` turns that into functions and reasons. Packages whose `__init__`
imports what a kernel does not need (Ray, datasets, ...) are entered below their top: empty modules stand for the parent
packages.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.harness import Absent, reason_of

LogprobFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden_TD, weight_VD, target_T) -> logprob_T
F = TypeVar("F")

TRL_VOCAB_CHUNK = 32768  # what TRL's own trainer passes


def load_all(loaders: Mapping[str, Callable[[], F]]) -> tuple[dict[str, F], list[Absent]]:
    """Those that can be loaded here, and the others with their reasons."""
    loaded, absent = {}, []
    for name, loader in loaders.items():
        try:
            loaded[name] = loader()
        except Exception as error:  # whatever another project's import raises is a reason to report, not to stop
            absent.append(Absent(name, reason_of(error)))
    return loaded, absent


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it. Raises ModuleNotFoundError."""
    for entry in sys.path:
        folder = Path(entry or ".") / name
        if (folder / "__init__.py").is_file():
            return folder
    raise ModuleNotFoundError(f"{name} is not installed")


def import_below(module: str) -> types.ModuleType:
    """Import `a.b.c` without running `a/__init__.py` and `a/b/__init__.py`, unless `a` is imported already."""
    top, *rest = module.split(".")
    folder = package_folder(top)
    if top not in sys.modules:
        parents = [".".join([top, *rest[:i]]) for i in range(len(rest))]
        for parent in parents:
            stand_in = types.ModuleType(parent)
            stand_in.__path__ = [str(folder.joinpath(*parent.split(".")[1:]))]
            stand_in.__spec__ = importlib.machinery.ModuleSpec(parent, None, is_package=True)  # find_spec() wants one
            sys.modules[parent] = stand_in
    return importlib.import_module(module)


def trl_chunked_logprob() -> LogprobFunction:
    """TRL's ChunkedLogProbFunction. Its backward asks trl.trainer.utils for a DeepSpeed ZeRO-3 context; a context that
    does nothing stands for it, as there is no ZeRO here."""
    kernel = import_below("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    if "trl.trainer.utils" not in sys.modules:
        for name in ("trl.trainer", "trl.trainer.utils"):
            sys.modules.setdefault(name, types.ModuleType(name))
        nothing: Any = sys.modules["trl.trainer.utils"]
        nothing.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()

    def logprob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        chunk = min(TRL_VOCAB_CHUNK, weight_VD.shape[0])
        return kernel.apply(hidden_TD, weight_VD, None, target_T, 1.0, chunk, None, 1.0, ("entropy",))[0]

    return logprob


def trl_selective_logprob() -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's logits-level kernel: (logits_TV, target_T) -> logprob_T."""
    kernel = import_below("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    return lambda logits_TV, target_T: kernel(logits_TV, target_T)[0]


def verl_linear_cross_entropy() -> LogprobFunction:
    """verl's Triton head. It runs on CUDA only."""
    package_folder("verl")
    if not torch.cuda.is_available():
        raise RuntimeError("verl's Triton head runs on CUDA tensors only")
    kernel = import_below("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda hidden_TD, weight_VD, target_T: kernel(hidden_TD, weight_VD, target_T, 1.0, "none", None)[0]


def liger_scaled_cross_entropy() -> LogprobFunction:
    """Liger's fused scaled cross-entropy: on sm_90 its CuTe kernel (needs nvidia-cutlass-dsl), else chunked torch."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    if torch.cuda.is_available():
        module._resolve_implementation(torch.device("cuda"))  # raises here when the CuTe kernel cannot be imported
    return lambda hidden_TD, weight_VD, target_T: -_first(function.apply(hidden_TD, weight_VD, target_T, 1.0))


def liger_scaled_cross_entropy_fallback() -> LogprobFunction:
    """The torch version of the same, 512 rows at a time, which Liger takes on other devices than sm_90."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module._FusedLinearPPOFallbackFunction
    return lambda hidden_TD, weight_VD, target_T: (
        -_first(function.apply(hidden_TD, weight_VD, target_T, 1.0, -100, False))
    )


def liger_grpo_loss() -> Callable[..., Tensor]:
    """(hidden_GRD, weight_VD, target_GR, advantage_G) -> loss. Without torch.compile of its loss formula: compiling for
    each size would cost more seconds than the whole benchmark may take."""
    loss_class = importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    loss = loss_class(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo", temperature=1.0)

    def run(hidden_GRD: Tensor, weight_VD: Tensor, target_GR: Tensor, advantage_G: Tensor) -> Tensor:
        mask_GR = torch.ones_like(target_GR)
        return _first(loss(hidden_GRD, weight_VD, target_GR, mask_GR, advantage_G))

    return run


def liger_logits_grpo_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(logits_GLV with L = R + 1, target_GR, advantage_G) -> loss; its backward writes into the logits."""
    kernel = importlib.import_module("liger_kernel.ops.grpo_loss").GrpoLossFunction
    if not torch.cuda.is_available():
        raise RuntimeError("Liger's logits-level kernel is Triton alone: it needs a CUDA device")

    def run(logits_GLV: Tensor, target_GR: Tensor, advantage_G: Tensor) -> Tensor:
        mask_GR = torch.ones_like(target_GR)
        arguments = (None, None, target_GR, advantage_G, mask_GR, 1.0, 0.0, 0.2, 0.2, True, "grpo")
        return _first(kernel.apply(logits_GLV, *arguments))

    return run


def cce(filter_eps: str | None) -> Callable[[], LogprobFunction]:
    """Loader of cut-cross-entropy; filter_eps None is exact, "high" drops small probabilities (its default)."""

    def loader() -> LogprobFunction:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        if not torch.cuda.is_available():
            raise RuntimeError("CCE's kernels are Triton alone: they need a CUDA device")
        return lambda hidden_TD, weight_VD, target_T: (
            -function(hidden_TD, weight_VD, target_T, reduction="none", filter_eps=filter_eps)
        )

    return loader


def torch_logprob(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Plain torch: logits in the inputs' dtype, float32 log-softmax over all of them."""
    logits_TV = (hidden_TD @ weight_VD.T).float()
    return torch.log_softmax(logits_TV, -1).gather(1, target_T[:, None])[:, 0]


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple | list) else result
