"""How much of a GPU an engine takes: GB of weights and KV cache, and what SGLang is told so that it takes just that.

By itself SGLang takes a share of what is free when it starts, which beside a learner is another number at each start.
"""

from __future__ import annotations

from vcr1_fast.learner.model_size import ModelSize
from vcr1_fast.settings.error import require
from vcr1_fast.settings.learning import SGLangConfig

KV_TOKENS = 131_072  # beside a learner: nine groups of 8 answers of 1,024 tokens to the longest default video
# Of what is free when it starts, with a bound on the tokens; the rest stays free. SGLang sizes its cache as
# free after loading - (1 - share) x free before (mem_cache/kv_cache_configurator.py), so that with a small share a
# learner that holds its memory, and makes "free before" small, would leave nothing.
BOUNDED_SHARE = 0.98
UNBOUNDED_SHARE = 0.85  # on a GPU of its own: activations and CUDA graphs take the rest


def engine_bytes(config: SGLangConfig, size: ModelSize, item_bytes: int) -> int | None:
    """Weights and KV cache of one engine; None where it takes what it finds, on a GPU of its own.

    `item_bytes`: of a weight, 2 for bfloat16. Activations of prefills and CUDA graphs come on top.
    """
    if config.memory_gb is not None:
        return round(config.memory_gb * 1e9)
    if config.placement == "disaggregated":
        return None
    return item_bytes * size.params + KV_TOKENS * size.kv_bytes_per_token * item_bytes // 2


def memory_args(config: SGLangConfig, size: ModelSize, item_bytes: int) -> dict[str, float | int]:
    """Arguments of sglang.Engine. Raises ConfigError when `memory_gb` leaves nothing for the cache."""
    num_bytes = engine_bytes(config, size, item_bytes)
    if num_bytes is None:
        return {"mem_fraction_static": UNBOUNDED_SHARE}
    weights, per_token = item_bytes * size.params, size.kv_bytes_per_token * item_bytes // 2
    num_tokens = (num_bytes - weights) // per_token
    require(
        num_tokens > 0,
        f"rollout.sglang.memory_gb is {num_bytes / 1e9:g}, wanted more than the weights' {weights / 1e9:.1f} and "
        f"{per_token * 1e-3:.3g} GB for each million tokens of prompts and answers",
    )
    return {"mem_fraction_static": BOUNDED_SHARE, "max_total_tokens": num_tokens}
