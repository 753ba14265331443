"""Tokens and memory of a run as sums over the sizes of its model: what takes how many bytes, in the worst case.

Everything is the worst case the settings allow: the longest video, all completions at full length. Left
out: the CUDA context (about 1 GB), fragmentation (allow 5 to 10 %) and NCCL's buffers.

GB are 1e9 bytes. Letters: D hidden size, I MLP width, K key and value width, H head width x heads, V vocabulary,
d, i width and MLP width of the vision tower, P parameters, N GPUs, T tokens of a packed row, G completions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from vcr1_kernels.head_chunks import head_peak_bytes

from vcr1_fast.learner.adamw_8bit import MOMENT_BYTES
from vcr1_fast.learner.engine_sums import engine_bytes, generation_bytes, lends_memory, prompts_at_once
from vcr1_fast.learner.freezing import num_trained
from vcr1_fast.learner.model_size import ModelSize, read_model_size
from vcr1_fast.learner.recompute import RECOMPUTE, Recompute
from vcr1_fast.learner.sharding import TOWER_PARTS_TOGETHER
from vcr1_fast.settings.config import Config, ConfigError, LoRAConfig, VideoConfig
from vcr1_fast.video.formats import PATCHES_PER_TOKEN, QWEN2_5_VL
from vcr1_fast.video.gpu_decoding import decoding_bytes
from vcr1_fast.video.resolution import max_pixels_per_frame

GPUS_GB = {"80 GB (A100, H100)": 80.0, "141 GB (H200)": 141.0}
SMALLEST_GPU_GB = min(GPUS_GB.values())
USABLE_FRAC = 0.9  # of a GPU's memory: a tenth is left for what the sums do not know
ADVICE = {  # what makes a phase smaller
    "load": "more GPUs, or model.lora.rank",
    "export": "more GPUs, or model.lora.rank",
    "update": "model.gradient_checkpointing=full, a smaller train.tokens_per_microbatch, video.total_pixels or "
    "rollout.max_new_tokens, or more GPUs",
    "rollout": "a smaller rollout.max_batch_tokens, or more GPUs",
    "evaluation": "a smaller rollout.max_batch_tokens",
}
TEXT_TOKENS = 256  # system message, question and options; the longest of NExT-GQA takes about 180
TIME_TOKENS = 11  # "<1234.5 seconds>" with a digit a token, and the two ids around a pair of frames


def video_tokens(num_frames: int, config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px) -> int:
    """Most tokens of a video of so many frames: frame pairs x floor(pixels of a frame / factor_px^2).

    Frames smaller than video.min_frame_pixels are scaled up and may come out a few tokens larger.
    """
    return num_frames // 2 * math.floor(max_pixels_per_frame(num_frames, config) / factor_px**2)


def clip_tokens(duration_s: float, config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px) -> int:
    """Most tokens of a clip: its frames at video.fps, held between min_frames and max_frames, even."""
    num_frames = min(max(duration_s * config.fps, config.min_frames), config.max_frames)
    return video_tokens(math.floor(num_frames / 2) * 2, config, factor_px)


def max_video_tokens(config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px) -> int:
    """Of all lengths. More than total_pixels / factor_px^2 where many frames meet min_frame_pixels: 768 frames of 16
    tokens a pair are 6,144, not 3,584."""
    return max(video_tokens(n, config, factor_px) for n in range(config.min_frames, config.max_frames + 1, 2))


@dataclass(frozen=True)
class TokenPlan:
    """Worst-case tokens of a step."""

    video: int
    prompt: int  # text included
    eval_prompt: int  # as eval.video has it
    completion: int
    group: int  # [prompt | c_1 | ... | c_G], the last token of each completion is not fed
    unshared_group: int  # the same as G separate rows
    groups_per_gpu: int  # per update
    groups_per_row: int
    row: int  # T
    scored_rows: int  # rows of the head in one micro-batch


def plan_tokens(config: Config, num_gpus: int, factor_px: int = QWEN2_5_VL.factor_px) -> TokenPlan:
    """Groups go into rows of at most train.tokens_per_microbatch; a larger group has a row of its own. `factor_px`: of
    the model's `VideoFormat`."""
    size, completion = config.rollout.group_size, config.rollout.max_new_tokens
    video = max_video_tokens(config.video, factor_px)
    prompt = video + _text_tokens(config, config.video)
    group = prompt + size * (completion - 1)
    per_gpu = config.train.prompts_per_step // config.algorithm.minibatches_per_rollout // num_gpus
    per_row = min(max(1, config.train.tokens_per_microbatch // group), per_gpu)
    return TokenPlan(
        video=video,
        prompt=prompt,
        eval_prompt=max_video_tokens(config.eval_video, factor_px) + _text_tokens(config, config.eval_video),
        completion=completion,
        group=group,
        unshared_group=size * (prompt + completion - 1),
        groups_per_gpu=per_gpu,
        groups_per_row=per_row,
        row=per_row * group,
        scored_rows=per_row * size * completion,
    )


def _text_tokens(config: Config, video: VideoConfig) -> int:
    """Beside those of the video itself."""
    return TEXT_TOKENS + (TIME_TOKENS * video.max_frames // 2 if config.task.timestamps == "text" else 0)


@dataclass(frozen=True)
class MemoryPlan:
    """GB on each GPU, by what takes them; a phase is the sum of what is there at the same time."""

    static: dict[str, float]
    update: dict[str, float]  # at its largest moment: at the head, or in backward of a decoder layer or a tower block
    rollout: dict[str, float]
    evaluation: dict[str, float]

    def by_phase(self) -> dict[str, dict[str, float]]:
        """What is there at the same time, for each phase that has something of its own."""
        parts = {"update": self.update, "rollout": self.rollout, "evaluation": self.evaluation}
        return {name: {**self.static, **part} for name, part in parts.items() if part}


def trained_params(config: Config, size: ModelSize) -> int:
    """P'."""
    if config.model.freeze:
        return num_trained(config.model)
    if config.model.lora.rank:
        return size.layers * adapter_params(size, config.model.lora)
    return size.params - (size.tower_params if config.model.freeze_vision else 0)


def reduces_once(config: Config, size: ModelSize, num_gpus: int, gpu_gb: float) -> bool:
    """Whether gradients wait, whole, for an update's last row (train.reduce_gradients).

    They cost nothing where an update has one row.
    """
    if config.train.reduce_gradients != "auto":
        return config.train.reduce_gradients == "once"
    tokens = plan_tokens(config, num_gpus, size.video.factor_px)
    config = with_recompute(config, size, num_gpus, gpu_gb)
    if num_gpus == 1 or tokens.groups_per_gpu <= tokens.groups_per_row:
        return True
    update = plan_memory(config, size, tokens, num_gpus).by_phase()["update"]
    return sum(update.values()) + 4 * trained_params(config, size) / 1e9 <= USABLE_FRAC * gpu_gb


def with_recompute(config: Config, size: ModelSize, num_gpus: int, gpu_gb: float) -> Config:
    """`config` with what `model.gradient_checkpointing: auto` means on GPUs of so many GB: the first mode whose worst
    update fits, else the smallest one."""
    if config.model.gradient_checkpointing != "auto":
        return config
    tokens = plan_tokens(config, num_gpus, size.video.factor_px)
    modes = [replace(config, model=replace(config.model, gradient_checkpointing=mode)) for mode in RECOMPUTE]
    updates = (plan_memory(mode, size, tokens, num_gpus).by_phase()["update"] for mode in modes)
    fits = (sum(update.values()) <= USABLE_FRAC * gpu_gb for update in updates)
    return next((mode for mode, does_fit in zip(modes, fits, strict=True) if does_fit), modes[-1])


def check_memory(config: Config, num_gpus: int, gpu_gb: float) -> None:
    """Raises ConfigError when the worst case that the settings allow does not fit into GPUs of so many GB.

    A number in train.max_group_tokens is believed: what is larger is not run, and the rest is the user's to know.
    """
    size = read_model_size(config.model.path)
    tokens = plan_tokens(config, num_gpus, size.video.factor_px)
    config = with_recompute(config, size, num_gpus, gpu_gb)
    phases = plan_memory(config, size, tokens, num_gpus).by_phase()
    needed = {phase: sum(parts.values()) for phase, parts in phases.items()}
    if config.train.max_group_tokens is None and needed["update"] > USABLE_FRAC * gpu_gb:
        largest = largest_group(config, size, tokens, num_gpus, gpu_gb, tokens.group)
        what = f"a group of {tokens.group:,} tokens, the largest that video and rollout allow"
        what += f", in rows of {tokens.row:,}" if tokens.row > tokens.group else ""
        advice = ADVICE["update"] + (
            f"; or train.max_group_tokens={largest}, above which a group is left out and counted" if largest else ""
        )
        _raise_too_large("update", what, needed["update"], gpu_gb, advice)
    for phase in ("rollout", "evaluation"):
        if needed.get(phase, 0) > gpu_gb:
            _raise_too_large(phase, "the largest batch", needed[phase], gpu_gb, ADVICE[phase])


def _raise_too_large(phase: str, what: str, needed_gb: float, gpu_gb: float, advice: str) -> None:
    raise ConfigError(
        f"{phase} needs about {needed_gb:.0f} GB for {what}, but a GPU here has {gpu_gb:.0f}: set {advice}; "
        "`vcr1-fast train CONFIG --dry-run` shows what takes it"
    )


def largest_group(
    config: Config, size: ModelSize, tokens: TokenPlan, num_gpus: int, gpu_gb: float, most_tokens: int = 1_000_000
) -> int:
    """Tokens of the largest group that fits with a row of its own, in hundreds, up to `most_tokens`; 0 where none does.

    A group is never split, so this is a GPU's limit, however many there are. Larger ones than the settings allow have
    more video.
    """
    others, scored = tokens.group - tokens.video, config.rollout.group_size * tokens.completion

    def fits(hundreds: int) -> bool:
        row = 100 * hundreds
        video = max(min(tokens.video, row), row - others)
        alone = replace(tokens, groups_per_row=1, row=row, video=video, scored_rows=min(scored, row))
        update = plan_memory(config, size, alone, num_gpus).by_phase()["update"]
        return sum(update.values()) <= USABLE_FRAC * gpu_gb

    return 100 * (bisect.bisect_left(range(1, most_tokens // 100 + 1), True, key=lambda n: not fits(n)))


def plan_memory(
    config: Config,
    size: ModelSize,
    tokens: TokenPlan,
    num_gpus: int,
    *,
    has_whole_gradients: bool = False,
) -> MemoryPlan:
    """Float32 masters and moments sharded by FSDP2 over N GPUs; the rollout engine keeps a whole copy on each GPU.

    SGLang has a pool of its own for weights, KV cache and prefill: nothing of it is on this GPU when it runs elsewhere.

    weights 4 P / N, reference c P / N (beta > 0; 4 P on one GPU), AdamW 8 P' / N (2.03 P' / N with 8 bits), gradients
    4 P' / N, engine c P. N: GPUs that share one copy, all of them unless train.replicate says otherwise
    gathered  c 2 units + (c + 4) gradients of one; on one GPU: autocast's copies c P' instead
    c: bytes of compute_dtype, 2 for bfloat16; P': trainable. What is frozen is kept in c bytes
    at the head: its peak (vcr1_kernels.head_chunks); gradients of earlier rows only. In a block: its activations
    has_whole_gradients: of several rows, kept until the last one (`reduces_once`): 4 P' more
    LoRA: weights c P / N + 4 P' / N, no reference, gradients of blocks are adapters, no copies on one GPU
    """
    width = 4 if config.model.compute_dtype == "float32" else 2
    has_lora = config.model.lora.rank > 0
    trainable, shards = trained_params(config, size), num_gpus // config.train.replicate
    weights = 4 * trainable + width * (size.params if has_lora else size.params - trainable)
    reference = 0 if has_lora or not config.algorithm.beta else (4 if num_gpus == 1 else width) * size.params
    gathered: float | None = None
    if num_gpus == 1:  # float32 masters are used as they are, frozen weights are kept in compute_dtype
        gathered = 0.0 if width == 4 or has_lora else width * trainable
    moments, kind = (MOMENT_BYTES, "8 bit") if config.optimizer.name == "adamw_8bit" else (8, "float32")
    whole = 4 * trainable if has_whole_gradients else 0
    per_gpu, group = config.train.prompts_per_step // num_gpus, config.rollout.group_size
    prompts = min(per_gpu, prompts_at_once(config.rollout, tokens.prompt, group, tokens.completion))
    eval_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    videos = prompts_at_once(config.rollout, tokens.eval_prompt, 1, eval_tokens) if config.data.eval else 0
    rollout = generation_bytes(size, tokens.prompt, prompts, group, tokens.completion)
    evaluation = generation_bytes(size, tokens.eval_prompt, videos, 1, eval_tokens)
    engine, lends = engine_bytes(config.rollout, size, width), lends_memory(config.rollout)
    return MemoryPlan(
        static=_gb(
            {
                "frozen weights and adapters" if has_lora else "weights, float32": weights / shards,
                f"AdamW, {kind}": moments * trainable / shards,
                "reference": reference / shards,
                **({} if lends else engine),
                **video_bytes(config),
            }
        ),
        update=_gb(_update_bytes(config, size, tokens, gathered, 4 * trainable / shards, whole)),
        rollout=_gb((engine if lends else {}) if config.rollout.engine == "sglang" else rollout),
        evaluation={} if config.rollout.engine == "sglang" else _gb(evaluation),
    )


def adapter_params(size: ModelSize, config: LoRAConfig) -> int:
    """Of one decoder layer: rank x (inputs + outputs) of each matrix that has one; by default all have."""
    d, h, k, i = size.hidden, size.heads_width, size.key_width, size.mlp
    sides = {"q_proj": d + h, "k_proj": d + k, "v_proj": d + k, "o_proj": h + d}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), d + i)
    return config.rank * sum(sides.get(target, 0) for target in config.targets or sides)


def video_bytes(config: Config) -> dict[str, float]:
    """Of the process beside a rank that decodes on its GPU, where the settings allow for one."""
    return {"video decoding": decoding_bytes(config.video)}


def _update_bytes(
    config: Config, size: ModelSize, tokens: TokenPlan, copies: float | None, gradients: float, whole: float
) -> dict[str, float]:
    """Of a row, beside what is always there: at the moment that has most. No two of them are at the same time.

    copies: autocast's, on one GPU; None: units are gathered instead, two at a time (sharding.sharded_units).
    """
    dtype = torch.float32 if config.model.compute_dtype == "float32" else torch.bfloat16
    width, has_lora = dtype.itemsize, config.model.lora.rank > 0
    has_rows = tokens.groups_per_gpu > tokens.groups_per_row
    head = head_peak_bytes(tokens.scored_rows, size.hidden, size.vocab, dtype, trains_weight=not has_lora)
    decoder_kept, layer = decoder_bytes(size, tokens.row, _recompute(config), config.model.kernels != "off")
    tower_kept, block = tower_bytes(size, tokens, config)
    words, layer_params = size.vocab * size.hidden, size.layer_params
    unit = TOWER_PARTS_TOGETHER * size.tower_block_params
    trained_words = 0 if has_lora else words  # of an end: its gradient, and the float32 copy that is added up
    trained_layer = adapter_params(size, config.model.lora) if has_lora else layer_params
    always = {"whole gradients until the last row": whole}
    earlier = {"gradients, float32": gradients if has_rows else 0}

    def beside(weights: int, trained: int) -> dict[str, float]:
        """Units that are gathered, and the gradients of one on their way."""
        gathered = width * weights + (width + 4) * trained
        return {"gathered blocks": gathered if copies is None else copies}

    kept = {"decoder activations": decoder_kept, "tower activations": tower_kept}
    late = {"tower activations": tower_kept, "gradients, float32": gradients}  # those of the decoder are gone
    on_its_way = 4 if copies is None else 0  # alone on a GPU, an end's gradient is among the others
    moments = [
        {**kept, "head": head, **earlier, **beside(words, 0)},
        {  # the decoder's gradients come as its activations go: most at one of the two ends
            **kept,
            "a decoder layer": layer,
            "head": (width if size.is_tied and copies is None else 4) * trained_words,
            **earlier,
            **beside(2 * layer_params, trained_layer),
        },
        {**late, "a decoder layer": layer, **beside(2 * layer_params, trained_layer)},
        {**late, "embedding": (on_its_way and on_its_way + width) * trained_words, **beside(unit, 0)},
        {**late, "a tower block": block, "embedding": on_its_way * trained_words, **beside(2 * unit, unit)},
    ]
    return always | max(moments, key=lambda parts: sum(parts.values()))


def _recompute(config: Config) -> Recompute:
    mode = config.model.gradient_checkpointing
    return "none" if mode == "auto" else mode


def decoder_bytes(size: ModelSize, num_tokens: int, mode: Recompute, has_kernels: bool = True) -> tuple[int, int]:
    """What backward needs of the decoder, in bfloat16: (kept of all layers, of one layer while it is recomputed).

        layer = 8 D + 4 H + 4 K + 6 I        per token: the residual before each norm and what the norm gives, q and
                                             attention output, keys and values, gate, up and their product
        kept  = layers x layer;  full: layers x 2 D
        selective: layers x (4 D + 4 H + 4 I): the layer's input, and what attention and products that widen gave

    Qwen3's norms of queries and keys keep what they are given: 2 H + 2 K more, in each of the three.
    Without kernels (model.kernels=off) 8 D + 2 I more: a norm's row in float32 and scaled, the gate's activation; in
    Qwen3 4 H + 4 K for those two norms.
    An estimate from the operators' saved tensors; on one GPU the residual is float32 and takes 4 D more a layer.
    """
    d = size.hidden
    layer = num_tokens * (8 * d + 4 * size.heads_width + 4 * size.key_width + 6 * size.mlp)
    heads = size.heads_width + size.key_width if size.is_qwen3 else 0  # that have norms
    layer += num_tokens * 2 * heads
    layer += 0 if has_kernels else num_tokens * (8 * d + 2 * size.mlp + 4 * heads)
    wide = 4 * d + 4 * size.heads_width + 4 * size.mlp + 2 * heads
    kept = {"none": layer, "selective": num_tokens * wide, "full": num_tokens * 2 * d}[mode]
    return size.layers * kept, 0 if mode == "none" else layer


def tower_bytes(size: ModelSize, tokens: TokenPlan, config: Config) -> tuple[int, int]:
    """What backward needs of the tower, in bfloat16: (kept of all blocks, of one block while it is recomputed).

        block = 20 d + 6 i                   per patch (4 to a video token, all videos of a row at once): as in the
                                             decoder, with q and k kept before their rotation as well as after;
                                             without kernels 30 d + 8 i
        kept  = 2 C + depth x block;  full: 2 C + depth x 2 d;  selective: 2 C + depth x (12 d + 4 i);
        frozen: one block, before the decoder

    2 C bytes are the pixels of a patch, which the gradient of the patch embedding needs. Qwen3-VL's MLP has no gate, 2
    i less each, and its norms keep no more without kernels: 22 d + 4 i. Its features for inner layers are 2 D a layer
    and video token. Mergers are left out.
    """
    num_patches = tokens.groups_per_row * tokens.video * PATCHES_PER_TOKEN
    d, gate = size.tower_width, 0 if size.is_qwen3 else 2 * size.tower_mlp
    block = num_patches * (20 * d + 4 * size.tower_mlp + gate)
    if config.model.kernels == "off":
        block += num_patches * (2 * d if size.is_qwen3 else 10 * d + 2 * size.tower_mlp)
    if config.model.is_tower_frozen:
        return 0, block
    features = size.num_deepstack * 2 * size.hidden // PATCHES_PER_TOKEN  # of a patch
    pixels, mode = num_patches * (2 * size.video.patch_values + features), _recompute(config)
    wide = num_patches * (12 * d + 2 * size.tower_mlp + gate)
    kept = {"none": block, "selective": wide, "full": num_patches * 2 * d}[mode]
    return pixels + size.tower_depth * kept, 0 if mode == "none" else block


def _gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: num_bytes / 1e9 for name, num_bytes in parts.items() if num_bytes}
