"""What the row functions of the language-model head give for each row, whoever computes it.

Shape letters: C rows (tokens of one chunk), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of ids that are never drawn. exp of it is 0 beside any other one, in float64, too; -inf would make p z NaN
SUPPRESSED_LOGIT = -1e4


class RowStats(NamedTuple):
    """Per-row results, [C] float32 (float64 for float64 logits). s = 1 / temperature; c is the row's offset."""

    logprob: Tensor
    entropy: Tensor  # nats
    offset: Tensor  # c, a raw logit: the target's, or the row's maximum where that lies more than GUARD above
    inv_total: Tensor  # 1 / sum_v exp(s (z_v - c))
    others: Tensor  # sum over v != target of exp(s (z_v - c)); times inv_total it is 1 - p_target without cancellation


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
