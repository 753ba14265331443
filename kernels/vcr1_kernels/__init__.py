"""Building blocks of GRPO training of language models: torch only, usable without vcr1_fast.

`losses` holds the policy-loss formulas, `reference` every op in plain torch, `prefix_attention` the attention of a row
`[prompt | c_1 | ... | c_G]` whose completions share one prompt.
"""

from . import losses, reference
from .prefix_attention import PrefixGroup, PrefixLayout, prefix_attention

__all__ = ["PrefixGroup", "PrefixLayout", "losses", "prefix_attention", "reference"]
