"""Building blocks of GRPO training of language models: Triton and torch only, usable without vcr1_fast.

Every op takes CUDA tensors (its Triton kernel runs) and CPU tensors (its torch twin runs). `reference` holds each op in
plain torch, `losses` the policy-loss formulas. `unavailable_reason()` says why kernels cannot run on a GPU here.
"""

from . import losses, reference
from .backend import unavailable_reason
from .linear_logprob import fused_linear_logprob
from .linear_policy_loss import fused_linear_policy_loss
from .losses import PolicyLoss, TokenVectors
from .patchify import patchify
from .policy_loss import logprob_of_logits, policy_loss
from .prefix_attention import (
    AttentionChoice,
    PrefixGroup,
    PrefixLayout,
    attention_backend,
    layout_to_tensor,
    prefix_attention,
)
from .rotary import rotary

__all__ = [
    "AttentionChoice",
    "PolicyLoss",
    "PrefixGroup",
    "PrefixLayout",
    "TokenVectors",
    "attention_backend",
    "fused_linear_logprob",
    "fused_linear_policy_loss",
    "layout_to_tensor",
    "logprob_of_logits",
    "losses",
    "patchify",
    "policy_loss",
    "prefix_attention",
    "reference",
    "rotary",
    "unavailable_reason",
]
