"""GPU memory of a rollout engine, as sums over the sizes of its model. Part of the plan in memory_sums.py."""

from __future__ import annotations

from vcr1_fast.learner.model_size import ModelSize
from vcr1_fast.rollout.sgl import memory as sglang_memory
from vcr1_fast.settings.config import RolloutConfig


def lends_memory(config: RolloutConfig) -> bool:
    """Whether the engine has none while the learner updates."""
    return config.engine == "sglang" and config.sglang.release_memory


def engine_bytes(config: RolloutConfig, size: ModelSize, width: int) -> dict[str, float]:
    """Of the learner's GPU, unless `lends_memory`. `width`: bytes of a weight of the engine."""
    if config.engine == "local":
        return {"rollout engine": width * size.params}
    is_here = config.sglang.placement == "colocated"
    num_bytes = sglang_memory.engine_bytes(config.sglang, size, width) if is_here else None
    return {"SGLang, weights and KV cache": config.sglang.num_workers * (num_bytes or 0)}


def prompts_at_once(config: RolloutConfig, prompt: int, group: int, new_tokens: int) -> int:
    """What `rollout.batches.in_batches` puts together."""
    return max(1, min(config.max_batch_rows // group, config.max_batch_tokens // (prompt + group * new_tokens)))


def generation_bytes(size: ModelSize, prompt: int, prompts: int, group: int, new_tokens: int) -> dict[str, float]:
    """KV cache: each prompt once, new tokens per completion. Prefill: one layer over all prompts, 8 D + 6 I a token."""
    return {
        "KV cache": size.kv_bytes_per_token * prompts * (prompt + group * new_tokens),
        "prefill": prompts * prompt * (8 * size.hidden + 6 * size.mlp),
    }
