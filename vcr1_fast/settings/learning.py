"""Settings of rollout, objective and optimizer: sections of `vcr1_fast.settings.config`, to be imported from there.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from vcr1_fast.rollout.addresses import read_addresses, show
from vcr1_fast.settings.error import ConfigError, require, require_above_0, require_least
from vcr1_fast.types import SamplingParams

ENGINE_ARGS_REFUSED = {  # what would break the engine or make its log-probs wrong without a word
    "rl_on_policy_target": "SGLang then gives the tokens of a video the positions of text",
    **dict.fromkeys(("tp_size", "pp_size", "dp_size"), "use more workers, or rollout.sglang.tp_size"),
    **dict.fromkeys(("model_path", "load_format"), "weights come from the learner"),
    **dict.fromkeys(("custom_weight_loader", "skip_tokenizer_init"), "the worker needs its own"),
    "enable_lora": "adapters are added to the weights, see model.lora",
}


MAX_BACKOFF_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SGLangConfig:
    """SGLang as the rollout engine, in processes of its own."""

    python: str | None = None
    """Interpreter of the environment that has SGLang, such as .venv-sglang/bin/python. Default: the current one."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """colocated: each rank starts its own worker on its own GPU, which the two share. disaggregated: workers that
    `vcr1-fast serve` has started elsewhere, at rollout.sglang.addresses; learner and engines have a GPU to themselves.
    """
    addresses: tuple[str, ...] = ()
    """Of those workers, such as [node-2:29800-29807] for eight on one node. Rank r takes every world-size-th from r."""
    key_file: str = "~/.config/vcr1-fast/rollout.key"
    """Secret that trainers and those workers share, made by `vcr1-fast serve`: copy it to the trainer's nodes, mode
    600. The environment variable VCR1_ROLLOUT_KEY goes before it."""
    num_workers: int = 1
    """Processes with an engine each: of each rank, or on a node without GPUs of `vcr1-fast serve` (with GPUs it starts
    one on each)."""
    tp_size: int = 1
    """GPUs of one engine (tensor parallelism), for models that one does not hold. More than 1: for the workers of
    `vcr1-fast serve` alone, which then starts fewer of them."""
    memory_gb: float | None = None
    """GB (1e9 bytes) of each engine, all its GPUs together, for weights and KV cache; activations and CUDA graphs come
    on top. Default: colocated the weights and 131,072 tokens (24 for 7B), else 0.85 of what is free on its GPU."""
    bucket_mb: int = 512
    """Weights are handed over in pieces of this size; cuda_ipc and broadcast take twice as much of the learner's
    memory."""
    weights: Literal["auto", "shared_memory", "cuda_ipc", "broadcast"] = "auto"
    """How they are handed over. shared_memory: through host memory, or TCP. cuda_ipc: in place, to a worker on the
    learner's GPU. broadcast: by NCCL, on a CPU by gloo. auto: cuda_ipc where the GPU is shared, broadcast to other
    GPUs, shared_memory without a GPU."""
    weights_address: str | None = None
    """Address of this machine for the broadcast. Default: the one from which workers elsewhere are reached."""
    keep_host_copy: bool = True
    """Keep the weights in host memory, too (16.6 GB for 7B in bfloat16, shared out among the ranks of a node), to start
    a lost worker again. False: the loss of a worker ends the run."""
    release_memory: bool = False
    """Workers on the learner's GPU give their memory back during the update. Every weight is then pushed each time."""
    max_inflight: int = 64
    """Prompts that one worker has at once; bounds the pixels it holds."""
    timeout_s: float = 1800.0
    """Longest time for all answers to one prompt, waiting in the worker included, and for one bucket of weights. A
    worker that takes longer is started again."""
    start_timeout_s: float = 600.0
    """Longest start of a worker."""
    max_attempts: int = 3
    """Times that the answers to one prompt may fail before the run stops."""
    max_restarts: int = 3
    """Workers started again in a row, without one answer between, before the run stops."""
    backoff_s: float = 1.0
    """Pause before a worker is started again; doubles each time in a row, up to 30 s."""
    engine_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of sglang.Engine, such as {attention_backend: triton, max_total_tokens: 65536}."""

    def __post_init__(self) -> None:
        section = "rollout.sglang"
        require_least(self, section, 1, "num_workers", "tp_size", "bucket_mb", "max_inflight", "max_attempts")
        require_least(self, section, 0, "max_restarts", "backoff_s")
        require_above_0(self, section, "timeout_s", "start_timeout_s", "memory_gb")
        require(
            self.tp_size == 1 or self.placement == "disaggregated",
            f"rollout.sglang.tp_size is {self.tp_size} and its placement colocated, where each rank has an engine on "
            "its own GPU: leave it at 1, or start engines with `vcr1-fast serve` and set placement to disaggregated",
        )
        for name in self.engine_args:
            reason = ENGINE_ARGS_REFUSED.get(name)
            require(reason is None, f"rollout.sglang.engine_args sets {name}: {reason}; leave it out")
        try:
            read_addresses(self.addresses)
        except ValueError as error:
            raise ConfigError(f"rollout.sglang.addresses: {error}") from None

    def of_rank(self, rank: int, world_size: int) -> Self:
        """With the addresses of one rank alone. Raises ConfigError when there are fewer than ranks."""
        self.check_world_size(world_size)
        own = tuple(show(address) for address in read_addresses(self.addresses)[rank::world_size])
        return replace(self, addresses=own)

    def pause_s(self, num_failures: int) -> float:
        """Before the next start of a worker that failed so many times in a row."""
        return min(self.backoff_s * 2 ** (num_failures - 1), MAX_BACKOFF_S)

    def check_world_size(self, world_size: int) -> None:
        """Raises ConfigError when disaggregated workers are fewer than ranks."""
        num_workers = len(read_addresses(self.addresses))
        require(
            self.placement == "colocated" or num_workers >= world_size,
            f"rollout.sglang.addresses names {num_workers} workers, but there are {world_size} ranks, and each needs "
            "one of its own: start more with `vcr1-fast serve`, or use fewer ranks",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are drawn for training."""

    engine: Literal["local", "sglang"] = "local"
    """local: the Hugging Face model in this process. sglang: SGLang in processes of its own, see rollout.sglang."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Settings of engine sglang."""
    group_size: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs everywhere are taken at this temperature."""
    top_p: float = 1.0
    """Nucleus sampling. Below 1 the log-probs are still those of all ids, see top_k."""
    top_k: int = 0
    """Draw only from the k most likely tokens, before top_p; 0: from all. As with top_p, log-probs stay log-softmax of
    logits / temperature over all ids but those of pictures, which are never drawn, engine's and learner's: answers come
    from the distribution renormalised over what is kept, ratio and gradient are those of the whole one, a bias of the
    size of the mass left out. Engine local keeps what equals the k-th. With top_p below 1 as well, sglang counts
    its mass before top_k, local after it, as transformers does."""
    max_new_tokens: int = 1024
    """Longest completion."""
    max_batch_rows: int = 256
    """Most completions decoded together."""
    max_batch_tokens: int = 65536
    """Tokens in the KV cache of one batch, prompts (once for each group) and longest completions: bounds its memory. A
    7B model takes 13 GB for the default: 4 for the cache, 9 to fill it. A single group is always answered."""
    cuda_graph: bool = False
    """Engine local on CUDA: record the step of a token as a CUDA graph, anew after 64 tokens and when finished answers
    are dropped, and replay it. Compared with the step itself whenever it is recorded. Not tried on a GPU yet."""
    num_ground_truth: int = 0
    """1: the last answer of each group is the annotated one instead of a sampled one (TempSamp-R1)."""
    max_resample_rounds: int = 0
    """Rounds in which groups whose rewards are all equal are replaced by answers to further prompts (DAPO)."""
    max_logprob_gap: float | None = None
    """Most that engine and learner may differ before the first step, mean |difference| of a short answer's log-probs.
    Default: 1e-3 in float32, 0.1 in bfloat16."""
    max_policy_lag: int = 0
    """Updates that answers may be behind the learner. 0: a step's answers are drawn by the newest weights, and learner
    and engine take turns. k: those of the next k steps are drawn while the learner works."""
    interrupt: bool = False
    """New weights do not wait for answers under way: these are cut short and gone on with by the new weights."""
    over_provision: float = 0.0
    """Groups begun beyond those that a step needs, as a share of them, 0.2 for example: a step ends when it has enough,
    and groups not finished by then go on in the next one. The longest answers no longer decide how long a step takes;
    their first tokens are one update older."""

    @property
    def most_updates_behind(self) -> int:
        """Between the weights that drew a token and those that learn from it."""
        return self.max_policy_lag + (self.over_provision > 0)

    def __post_init__(self) -> None:
        require_least(self, "rollout", 1, "group_size", "max_new_tokens", "max_batch_rows", "max_batch_tokens")
        require(
            self.temperature > 0,
            f"rollout.temperature is {self.temperature}, wanted > 0 (greedy rollouts have no group variance)",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}, wanted in (0, 1]")
        require(
            self.top_k == 0 or self.top_k >= 2,
            f"rollout.top_k is {self.top_k}, wanted 0 (all tokens) or >= 2 (greedy rollouts have no group variance)",
        )
        require(self.num_ground_truth in (0, 1), f"rollout.num_ground_truth is {self.num_ground_truth}, wanted 0 or 1")
        require(
            0 <= self.max_resample_rounds <= 100,
            f"rollout.max_resample_rounds is {self.max_resample_rounds}, wanted 0 .. 100",
        )
        require_above_0(self, "rollout", "max_logprob_gap")
        require(
            0 <= self.max_policy_lag <= 64,
            f"rollout.max_policy_lag is {self.max_policy_lag}, wanted 0 .. 64 (updates)",
        )
        require(0 <= self.over_provision <= 1, f"rollout.over_provision is {self.over_provision}, wanted 0 .. 1")

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(self.group_size, self.max_new_tokens, self.temperature, self.top_p, seed, self.top_k)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The GRPO objective (formulas in vcr1_kernels.losses)."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = "grpo"
    """grpo, dr_grpo, dapo: clipped per token, averaged per sequence then over sequences, over a constant length, over
    all tokens. gspo: the ratio of the whole sequence is clipped. cispo: clipped weights on log-probs. sapo: a smooth
    gate instead of a clip."""
    scale_advantages: Literal["group", "batch", "none", "task"] = "group"
    """Divide (reward - group mean) by the group's standard deviation, the step's, nothing, or a moving average of the
    task's."""
    scale_decay: float = 0.99
    """Decay of that moving average per step."""
    clip_low: float = 0.2
    """Ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of ratio x |advantage| where the advantage is negative, such as 3.0; none: no bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy, which is raised by it."""
    beta: float = 0.0
    """Weight of the KL to the starting weights; 0 loads no reference model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL from sampled tokens."""
    minibatches_per_rollout: int = 1
    """Optimizer updates per rollout. At 1 the ratio is exactly 1 and engine log-probs are not needed."""
    mask_truncated: bool = False
    """Leave completions that hit max_new_tokens out of the loss."""
    sampling_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Importance weights for what the engine drew with other numerics or older weights: rho, the learner's probability
    of a token, or the product over the answer, over the engine's, cut at the bounds below, or 0 outside of them."""
    sampling_cap: float | None = None
    """Upper bound of rho, such as 2.0."""
    sampling_floor: float | None = None
    """Lower bound of rho, such as 0.5."""

    def __post_init__(self) -> None:
        require(0 <= self.scale_decay < 1, f"algorithm.scale_decay is {self.scale_decay}, wanted in [0, 1)")
        require(0 <= self.clip_low < 1, f"algorithm.clip_low is {self.clip_low}, wanted in [0, 1)")
        require_least(self, "algorithm", 0, "clip_high", "beta")
        require_least(self, "algorithm", 1, "minibatches_per_rollout")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on float32 master weights."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments of 8 bits instead of float32, 2 bytes a trained weight instead of 8 (torchao, an extra).
    Updates are no longer exact: moments are rounded in blocks of 256. Checkpoints are the same."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    vision_learning_rate: float | None = None
    """Of the vision tower and its projector; the schedule's shape is the same. Default: learning_rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Linear rise from 0."""
    weight_decay: float = 0.0
    """Applied to matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_skipped_updates: int = 20
    """Updates in a row with a gradient that is not finite, which are skipped, before the run ends; 0: no limit."""

    def __post_init__(self) -> None:
        require_above_0(self, "optimizer", "learning_rate", "vision_learning_rate", "max_grad_norm")
        require_least(self, "optimizer", 0, "max_skipped_updates", note=" (0: no limit)")
        require_least(self, "optimizer", 0, "warmup_steps")
