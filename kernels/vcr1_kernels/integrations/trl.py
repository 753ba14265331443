"""TRL 1.16: one call makes its trainers score tokens with our head.

    import vcr1_kernels.integrations.trl as vcr1_trl
    vcr1_trl.use_fused_head(trainer)
    trainer.train()

TRL's policy, reference and asynchronous trainers all score tokens through one symbol,
`trl.trainer.utils._ChunkedLogProbFunction`; that symbol is replaced. Calls that ask for something our head does not
compute (a bias, a soft cap, ...) go to TRL's own function, one by one, with one warning per reason.

Shape letters: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..backend import Backend
from ..linear_logprob import Keep, check_head_options
from .peer_version import check_version
from .score_tokens import score_tokens, unsupported_dtype

TESTED = ("1.16", "1.17")
OUR_OUTPUTS = {"log_probs", "entropy"}
PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class FusedHead(AbstractContextManager["FusedHead"]):
    """Stands where TRL's `ChunkedLogProbFunction` stood: TRL calls `.apply`. Undone by `.undo()` or `with`.

    Attributes: fused_calls, how often our head ran; trl_calls, reason -> how often TRL's own function ran.
    """

    def __init__(self, original: Any, options: dict[str, Any]) -> None:
        self._original, self._options = original, options
        self.fused_calls = 0
        self.trl_calls: dict[str, int] = {}

    def apply(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        temperature: float,
        chunk_size: int,
        *head: Any,
    ) -> PerToken:
        """TRL's protocol. `head` is (final_logit_softcapping, logit_scale, outputs).

        Returns (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), None for what was not asked for.
        """
        softcap, logit_scale, outputs = head
        reason = self._why_not(weight_VD, bias_V, softcap, logit_scale, outputs) or unsupported_dtype(hidden_ND)
        if reason is not None:
            if reason not in self.trl_calls:
                warnings.warn(f"TRL's own head scores these tokens: {reason}", stacklevel=2)
            self.trl_calls[reason] = self.trl_calls.get(reason, 0) + 1
            return self._original.apply(hidden_ND, weight_VD, bias_V, target_N, temperature, chunk_size, *head)
        self.fused_calls += 1
        logprob_N, entropy_N = score_tokens(hidden_ND, weight_VD, target_N, temperature / logit_scale, self._options)
        return logprob_N, entropy_N if "entropy" in outputs else None, None, None, None

    @staticmethod
    def _why_not(
        weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]
    ) -> str | None:
        if bias_V is not None:
            return "the head has a bias"
        if softcap is not None:
            return "the model soft-caps its logits"
        if not logit_scale > 0:
            return f"logit_scale is {logit_scale}"
        if not OUR_OUTPUTS.issuperset(outputs):
            return f"{', '.join(sorted(set(outputs) - OUR_OUTPUTS))} asked for"
        if hasattr(weight_VD, "ds_id"):
            return "DeepSpeed ZeRO-3 shards the head, and only TRL's function gathers it again for backward"
        return None

    def undo(self) -> None:
        """Puts TRL's own function back."""
        symbols: Any = importlib.import_module("trl.trainer.utils")
        if symbols._ChunkedLogProbFunction is self:
            symbols._ChunkedLogProbFunction = self._original

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fused_head(
    trainer: Any = None,
    *,
    keep: Keep = "auto",
    entropy_grad: bool | None = None,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> FusedHead:
    """Make TRL's trainers in this process score tokens with `fused_linear_logprob`, before or after they are built.

    Args:
        trainer: a GRPOTrainer. It only says whether the loss has an entropy bonus; without it gradients flow through
            the entropy wherever TRL asks for one, which is always right and costs the short cut of a frozen head (2
            matrix products instead of 3) and kept probabilities (3 instead of 4).
        keep: as in `fused_linear_logprob`: by default 3 matrix products where 2 N V bytes, in bfloat16, fit.
        entropy_grad: says it outright, instead of `trainer`.
        chunk_rows, backend: as in `fused_linear_logprob`.

    Returns: the handle: `.undo()`, or `with use_fused_head(trainer): ...`; `.fused_calls` says it is really used.

    Differs from TRL's head in rounding only: logits of bfloat16 inputs are float32 here and bfloat16 there. Under
    autocast with float32 weights the weight's gradient is rounded to bfloat16 once, as in every other linear layer.

    Raises: ImportError for a TRL that is not 1.16; ValueError for options that the head does not have, and where the
    gradient of an entropy bonus would be lost.
    """
    check_version("trl", *TESTED)
    check_head_options(chunk_rows, backend, keep)
    symbols: Any = importlib.import_module("trl.trainer.utils")
    bonus = getattr(trainer, "_entropy_bonus_enabled", None)  # None: no GRPOTrainer, so nothing is known
    if entropy_grad is None:
        entropy_grad = bonus is not False
    if bonus and not entropy_grad:
        raise ValueError("entropy_grad is False and the trainer has an entropy bonus, which would lose its gradient")
    if entropy_grad and keep == "probs":
        known = "the trainer has an entropy bonus" if bonus else "nothing says that the loss has no entropy bonus"
        raise ValueError(
            f"keep='probs' carries no gradient of the entropy, and {known}: use keep='auto', or pass a GRPOTrainer "
            "without entropy bonus, or entropy_grad=False"
        )
    previous = symbols._ChunkedLogProbFunction
    if isinstance(previous, FusedHead):
        previous.undo()
        previous = symbols._ChunkedLogProbFunction
    options = {"keep": keep, "entropy_grad": entropy_grad, "chunk_rows": chunk_rows, "backend": backend}
    handle = FusedHead(previous, options)
    symbols._ChunkedLogProbFunction = handle
    return handle
