"""The model's two ends, embedding and head, as modules whose forward holds every use of their weight.

FSDP has a weight whole while the forward of its module runs, and adds its gradient up over ranks once the gradients of
that forward's inputs are there. So the fused head runs inside of the head's forward, and the embedding's forward lets
the video's features through: token ids have no gradient, and without one the embedding, 2.2 GB of float32 gradients
for 7B, would wait for the end of the tower's backward and be added up with nothing beside it.

Shape letters: N scored tokens, T packed tokens, M video tokens, D hidden size, V vocabulary, W width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


class PassingEmbedding(nn.Embedding):
    """forward(ids) as ever; forward(ids, features) -> (embeddings, the features as they came)."""

    def forward(self, input: Tensor, features_MW: Tensor | None = None) -> Any:
        embeds = super().forward(input)
        return embeds if features_MW is None else (embeds, features_MW)


class ScoringHead(nn.Linear):
    """forward(hidden) as ever; forward(hidden, score) -> score(hidden, weight)."""

    def forward(self, input: Tensor, score: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        return super().forward(input) if score is None else score(input, self.weight)


def use_ends(hf: Any) -> None:
    """Give a Hugging Face model these two in place: their weights, names and stock calls stay what they are."""
    hf.get_input_embeddings().__class__ = PassingEmbedding
    hf.get_output_embeddings().__class__ = ScoringHead


def embedded(hf: Any, token_ids_T: Tensor, features_MW: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [T, D], and the features, by which the embedding's gradient is known to be complete."""
    return hf.get_input_embeddings()(token_ids_T, features_MW)


def scored(hf: Any, hidden_ND: Tensor, score: Callable[[Tensor, Tensor], T], *, needs_weight_again: bool) -> T:
    """score(hidden_ND, weight_VD). needs_weight_again: in backward, where FSDP else has it in pieces."""
    head: Any = hf.get_output_embeddings()
    is_sharded = isinstance(head, FSDPModule)
    if is_sharded:
        head.set_unshard_in_backward(needs_weight_again)
    return head(hidden_ND, score)
