"""Tokens and memory of a run as sums over the sizes of its model: what takes how many bytes, in the worst case.

Only `config.json` of the checkpoint is read; where `model.path` does not exist, the public sizes of Qwen2.5-VL-3B or
-7B stand in. Everything is the worst case the settings allow: the longest video, all completions at full length. Left
out: the CUDA context (about 1 GB), fragmentation (allow 5 to 10 %), NCCL's buffers, and where NVDEC decodes, clips read
ahead (2 GB at most) and frames being decoded (1 GB for each of 4 threads at worst).

GB are 1e9 bytes. Letters: D hidden size, I MLP width, K key and value width, H head width x heads, V vocabulary,
d, i width and MLP width of the vision tower, P parameters, N GPUs, T tokens of a packed row, G completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.learner.families import require_known
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.run.model_folder import CONFIG_FILE, read_json
from vcr1_fast.settings.config import Config, ConfigError, LoRAConfig, RolloutConfig, VideoConfig
from vcr1_fast.video.resolution import FACTOR_PX, max_pixels_per_frame

GPUS_GB = {"80 GB (A100, H100)": 80.0, "141 GB (H200)": 141.0}
TEXT_TOKENS = 256  # system message, question and options; the longest of NExT-GQA takes about 180
PATCHES_PER_TOKEN = 4
PATCH_VALUES = 3 * 2 * 14 * 14  # channels x frames x rows x columns
HEAD_CHUNK_BYTES = 4 << 30  # vcr1_kernels.head_chunks.CHUNK_BYTES; the tests hold the two equal


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths of a Qwen2.5-VL, and the parameter counts that follow."""

    source: str  # where the numbers are from
    hidden: int
    mlp: int
    layers: int
    heads_width: int  # H
    key_width: int  # K, of the keys; the values have as many
    vocab: int
    is_tied: bool
    tower_depth: int
    tower_width: int
    tower_mlp: int

    @property
    def layer_params(self) -> int:
        """q, k, v with bias, o, gate, up, down, two norms: 2DH + H + 2(DK + K) + 3DI + 2D."""
        d, h, k = self.hidden, self.heads_width, self.key_width
        return 2 * d * h + h + 2 * (d * k + k) + 3 * d * self.mlp + 2 * d

    @property
    def tower_block_params(self) -> int:
        """qkv and projection 4d(d + 1), three MLP matrices with bias 3di + 2i + d, two norms 2d."""
        d, i = self.tower_width, self.tower_mlp
        return 4 * d * (d + 1) + 3 * d * i + 2 * i + d + 2 * d

    @property
    def tower_params(self) -> int:
        """Patch embedding 1176 d, blocks, and the merger: norm d, then (4d)^2 + 4d + 4dD + D."""
        d, merged = self.tower_width, PATCHES_PER_TOKEN * self.tower_width
        merger = d + merged * merged + merged + merged * self.hidden + self.hidden
        return PATCH_VALUES * d + self.tower_depth * self.tower_block_params + merger

    @property
    def root_params(self) -> int:
        """What FSDP2 keeps gathered from forward to backward: embedding, head, last norm, ends of the tower."""
        words = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return words + self.hidden + self.tower_params - self.tower_depth * self.tower_block_params

    @property
    def params(self) -> int:
        return self.root_params + self.layers * self.layer_params + self.tower_depth * self.tower_block_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bfloat16: 2 x 2 bytes x layers x K."""
        return 4 * self.layers * self.key_width


def read_model_config(path: str) -> tuple[dict[str, Any], str]:
    """config.json of the checkpoint at `path` (`tiny`: the packaged one), or one of a public size where there is no
    such folder; and which it is, in words.

    Raises ConfigError when it cannot be read or is of an architecture not known here.
    """
    folder = Path(__file__).parents[1] / "tiny" if path == "tiny" else Path(path).expanduser()
    file = folder / CONFIG_FILE
    if not folder.exists():
        name = "Qwen2.5-VL-3B" if "3b" in Path(path).name.lower() else "Qwen2.5-VL-7B"
        return whole_config(PUBLIC_SIZES[name]), f"{name}, assumed because model.path {path!r} does not exist here"
    config = read_json(file)
    require_known(config.get("model_type"), file)
    try:
        model_size(config, str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} does not describe a model ({type(error).__name__}: {error})") from None
    return config, str(file)


def read_model_size(path: str) -> ModelSize:
    """The sizes in `read_model_config`, and what it raises."""
    return model_size(*read_model_config(path))


def model_size(config: Mapping[str, Any], source: str) -> ModelSize:
    """Newer files nest the decoder's numbers under text_config, the published ones do not."""
    text, tower = config.get("text_config") or config, config["vision_config"]
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    head_width = int(text.get("head_dim") or hidden // heads)
    is_tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelSize(
        source=source,
        hidden=hidden,
        mlp=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads_width=heads * head_width,
        key_width=int(text["num_key_value_heads"]) * head_width,
        vocab=int(text["vocab_size"]),
        is_tied=is_tied,
        tower_depth=int(tower.get("depth", 32)),
        tower_width=int(tower.get("hidden_size", 1280)),
        tower_mlp=int(tower.get("intermediate_size", 3420)),
    )


def video_tokens(num_frames: int, config: VideoConfig) -> int:
    """Most tokens of a video of so many frames: frame pairs x floor(pixels of a frame / 28^2).

    Frames smaller than video.min_frame_pixels are scaled up and may come out a few tokens larger.
    """
    return num_frames // 2 * math.floor(max_pixels_per_frame(num_frames, config) / FACTOR_PX**2)


def clip_tokens(duration_s: float, config: VideoConfig) -> int:
    """Most tokens of a clip: its frames at video.fps, held between min_frames and max_frames, even."""
    num_frames = min(max(duration_s * config.fps, config.min_frames), config.max_frames)
    return video_tokens(math.floor(num_frames / 2) * 2, config)


def max_video_tokens(config: VideoConfig) -> int:
    """Of all lengths. More than total_pixels / 28^2 where many frames meet min_frame_pixels: 768 frames of 16 tokens a
    pair are 6,144, not 3,584."""
    return max(video_tokens(n, config) for n in range(config.min_frames, config.max_frames + 1, 2))


@dataclass(frozen=True)
class TokenPlan:
    """Worst-case tokens of a step."""

    prompt: int
    completion: int
    group: int  # [prompt | c_1 | ... | c_G], the last token of each completion is not fed
    unshared_group: int  # the same as G separate rows
    groups_per_gpu: int  # per update
    groups_per_row: int
    row: int  # T
    scored_rows: int  # rows of the head in one micro-batch


def plan_tokens(config: Config, num_gpus: int) -> TokenPlan:
    """Groups go into rows of at most train.tokens_per_microbatch; a larger group has a row of its own."""
    size, completion = config.rollout.group_size, config.rollout.max_new_tokens
    prompt = max_video_tokens(config.video) + TEXT_TOKENS
    group = prompt + size * (completion - 1)
    per_gpu = config.train.prompts_per_step // config.algorithm.minibatches_per_rollout // num_gpus
    per_row = min(max(1, config.train.tokens_per_microbatch // group), per_gpu)
    return TokenPlan(
        prompt=prompt,
        completion=completion,
        group=group,
        unshared_group=size * (prompt + completion - 1),
        groups_per_gpu=per_gpu,
        groups_per_row=per_row,
        row=per_row * group,
        scored_rows=per_row * size * completion,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """GB on each GPU, by what takes them; a phase is the sum of what is there at the same time."""

    static: dict[str, float]
    update: dict[str, float]
    rollout: dict[str, float]
    evaluation: dict[str, float]

    def by_phase(self) -> dict[str, dict[str, float]]:
        """What is there at the same time, for each phase that has something of its own."""
        parts = {"update": self.update, "rollout": self.rollout, "evaluation": self.evaluation}
        return {name: {**self.static, **part} for name, part in parts.items() if part}


def trained_params(config: Config, size: ModelSize) -> int:
    """P'."""
    if config.model.lora.rank:
        return size.layers * adapter_params(size, config.model.lora)
    return size.params - (size.tower_params if config.model.freeze_vision else 0)


def reduces_once(config: Config, size: ModelSize, num_gpus: int, gpu_gb: float) -> bool:
    """Whether gradients wait, whole, for an update's last row (train.reduce_gradients).

    They cost nothing where an update has one row. A tenth of the GPU is left for what the sums do not know.
    """
    if config.train.reduce_gradients != "auto":
        return config.train.reduce_gradients == "once"
    tokens = plan_tokens(config, num_gpus)
    if num_gpus == 1 or tokens.groups_per_gpu <= tokens.groups_per_row:
        return True
    update = plan_memory(config, size, tokens, num_gpus).by_phase()["update"]
    return sum(update.values()) + 4 * trained_params(config, size) / 1e9 <= 0.9 * gpu_gb


def plan_memory(
    config: Config, size: ModelSize, tokens: TokenPlan, num_gpus: int, has_whole_gradients: bool = False
) -> MemoryPlan:
    """Float32 masters and moments sharded by FSDP2 over N GPUs; the rollout engine keeps a whole copy on each GPU.

    SGLang has a pool of its own for weights, KV cache and prefill: nothing of it is on this GPU when it runs elsewhere.

    weights 4 P / N, reference c P / N (beta > 0; 4 P on one GPU), AdamW 8 P' / N, gradients 4 P' / N, engine c P
    gathered  c (root + 2 blocks) + (c + 4) blocks of gradients; on one GPU: autocast's copies c P instead
    c: bytes of compute_dtype, 2 for bfloat16; P': trainable. A frozen tower is kept in c bytes
    has_whole_gradients: of several rows, kept until the last one (`reduces_once`): 4 P' more
    LoRA: weights c P / N + 4 P' / N, no reference, gradients of blocks are adapters, no copies on one GPU
    """
    width = 4 if config.model.compute_dtype == "float32" else 2
    adapters, has_lora = adapter_params(size, config.model.lora), config.model.lora.rank > 0
    frozen_tower = size.tower_params if config.model.freeze_vision else 0
    trainable = trained_params(config, size)
    weights = width * size.params + 4 * trainable if has_lora else 4 * trainable + width * frozen_tower
    reference = 0 if has_lora or not config.algorithm.beta else (4 if num_gpus == 1 else width) * size.params
    block = max(size.layer_params, size.tower_block_params)
    gathered = width * (size.root_params + 2 * block) + (width + 4) * (adapters if has_lora else block)
    if num_gpus == 1:  # float32 masters are used as they are, frozen weights are kept in compute_dtype
        gathered = 0 if width == 4 or has_lora else width * size.params
    head = min(HEAD_CHUNK_BYTES, tokens.scored_rows * size.vocab * (width + 4)) + 4 * size.vocab * size.hidden
    per_gpu, group = config.train.prompts_per_step // num_gpus, config.rollout.group_size
    prompts = min(per_gpu, prompts_at_once(config.rollout, tokens.prompt, group, tokens.completion))
    eval_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    videos = prompts_at_once(config.rollout, tokens.prompt, 1, eval_tokens) if config.data.eval else 0
    rollout = _generation_bytes(size, tokens.prompt, prompts, group, tokens.completion)
    evaluation = _generation_bytes(size, tokens.prompt, videos, 1, eval_tokens)
    return MemoryPlan(
        static=_gb(
            {
                "frozen weights and adapters" if has_lora else "weights, float32": weights / num_gpus,
                "AdamW, float32": 8 * trainable / num_gpus,
                "reference": reference / num_gpus,
                **engine_bytes(config.rollout, width * size.params),
            }
        ),
        update=_gb(
            {
                "gradients, float32": 4 * trainable / num_gpus,
                "whole gradients until the last row": 4 * trainable if has_whole_gradients else 0,
                "gathered blocks": gathered,
                "decoder activations": decoder_bytes(size, tokens.row, config.model.gradient_checkpointing),
                "tower activations": tower_bytes(size, tokens, config),
                "head chunk": head,
            }
        ),
        rollout={} if config.rollout.engine == "sglang" else _gb(rollout),
        evaluation={} if config.rollout.engine == "sglang" else _gb(evaluation),
    )


def adapter_params(size: ModelSize, config: LoRAConfig) -> int:
    """Of one decoder layer: rank x (inputs + outputs) of each matrix that has one; by default all have."""
    d, h, k, i = size.hidden, size.heads_width, size.key_width, size.mlp
    sides = {"q_proj": d + h, "k_proj": d + k, "v_proj": d + k, "o_proj": h + d}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), d + i)
    return config.rank * sum(sides.get(target, 0) for target in config.targets or sides)


def engine_bytes(config: RolloutConfig, weight_bytes: int) -> dict[str, float]:
    """Of the learner's GPU. SGLang's share is of what is free when it starts; here of the smallest GPU, all of it."""
    if config.engine == "local":
        return {"rollout engine": weight_bytes}
    share = config.sglang.mem_fraction if config.sglang.placement == "colocated" else 0.0
    smallest = min(GPUS_GB.values())
    return {f"SGLang, {share:g} of {smallest:g} GB": share * smallest * 1e9}


def decoder_bytes(size: ModelSize, num_tokens: int, is_checkpointed: bool) -> int:
    """What backward needs of the decoder, in bfloat16, per token:

        layer = 20 D + 2 H + 4 K + 8 I       two norms (float32 input 4D, scaled 2D, output 2D), q and attention output,
                                             keys and values, four MLP products; the residual is the norm's input
        all   = layers x layer;  checkpointed = layers x 2 D + one layer

    An estimate from the operators' saved tensors; on one GPU the residual is float32 and takes 2 D more a layer.
    """
    d = size.hidden
    layer = 16 * d + 4 * size.heads_width + 4 * size.key_width + 8 * size.mlp
    per_token = size.layers * 2 * d + layer if is_checkpointed else size.layers * layer
    return num_tokens * per_token


def tower_bytes(size: ModelSize, tokens: TokenPlan, config: Config) -> int:
    """What backward needs of the tower, per patch (4 to a video token, all videos of a row at once), in bfloat16:

        block = 30 d + 8 i                   as in the decoder, with q, k, v kept whole and attention output kept twice
        all   = 2352 + depth x block;  checkpointed = 2352 + depth x 2 d + one block;  frozen: one block

    2352 bytes are the pixels of a patch, which the gradient of the patch embedding needs.
    """
    num_patches = tokens.groups_per_row * max_video_tokens(config.video) * PATCHES_PER_TOKEN
    d, block = size.tower_width, 30 * size.tower_width + 8 * size.tower_mlp
    if config.model.is_tower_frozen:
        return num_patches * block
    is_checkpointed = config.model.gradient_checkpointing
    kept = size.tower_depth * 2 * d + block if is_checkpointed else size.tower_depth * block
    return num_patches * (2 * PATCH_VALUES + kept)


def prompts_at_once(config: RolloutConfig, prompt: int, group: int, new_tokens: int) -> int:
    """What `rollout.batches.in_batches` puts together."""
    return max(1, min(config.max_batch_rows // group, config.max_batch_tokens // (prompt + group * new_tokens)))


def _generation_bytes(size: ModelSize, prompt: int, prompts: int, group: int, new_tokens: int) -> dict[str, float]:
    """KV cache: each prompt once, new tokens per completion. Prefill: one layer over all prompts, 8 D + 6 I a token."""
    return {
        "KV cache": size.kv_bytes_per_token * prompts * (prompt + group * new_tokens),
        "prefill": prompts * prompt * (8 * size.hidden + 6 * size.mlp),
    }


def _gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: num_bytes / 1e9 for name, num_bytes in parts.items() if num_bytes}
