"""transformers' repetition penalty inside SGLang: a "custom logit processor" that counts the prompt's tokens, too.

SGLang's own penalty (sampling/penaltylib/repetition_penalty.py) looks at the answer alone. This one is called by
SGLang's sampler in its own process, before temperature, top_k and top_p; what was drawn so far it reads from the
request that SGLang puts among the parameters. With overlapped scheduling that is one token behind, so an engine that
penalises is started without it (`ENGINE_ARGS`). Only the standard library and torch are imported.

Shape letters: B answers of a batch, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ENGINE_ARGS: Mapping[str, Any] = {"enable_custom_logit_processor": True, "disable_overlap_schedule": True}


class RepetitionPenalty:
    """Divides the logits of tokens in prompt or answer by the penalty where positive, multiplies where negative.

    Source: CTRL (1909.05858), as transformers' RepetitionPenaltyLogitsProcessor has it.
    """

    def __call__(self, logits_BV: Tensor, parameters: Sequence[dict[str, Any]]) -> Tensor:
        seen_BV = torch.stack([_seen(each, logits_BV) for each in parameters])
        penalty_B1 = torch.tensor([each["penalty"] for each in parameters], device=logits_BV.device).unsqueeze(1)
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        return torch.where(seen_BV, penalised_BV, logits_BV).to(logits_BV.dtype)


def _seen(parameters: dict[str, Any], logits_BV: Tensor) -> Tensor:
    """[V] bool of one answer. Kept with the request's parameters, so that a step adds one token."""
    seen_V = parameters.get("seen_V")
    if seen_V is None:
        seen_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
        seen_V[parameters["prompt_ids"]] = True
        parameters |= {"seen_V": seen_V, "num_counted": 0}
    drawn = list(parameters["__req__"].output_ids[parameters["num_counted"] :])
    if drawn:
        seen_V[drawn] = True
        parameters["num_counted"] += len(drawn)
    return seen_V


def request_arguments(penalty: float, prompt_ids_L: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of `Engine.async_generate`, sampling parameters) of a request; both empty for a penalty of 1."""
    if penalty == 1:
        return {}, {}
    import dill  # SGLang depends on it  # pyright: ignore[reportMissingImports]

    processor = json.dumps({"callable": dill.dumps(RepetitionPenalty).hex()})
    custom = {"penalty": penalty, "prompt_ids": prompt_ids_L.unique().tolist()}
    return {"custom_logit_processor": processor}, {"custom_params": custom}
