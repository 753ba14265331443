"""Four ways to do one policy update on a group; each yields the losses of its micro-batches, which add up.

    original   the recipe of VideoChat-R1: G rows of prompt and completion, pixels repeated G times through the tower,
               the head on every token of every row, log-softmax of all these logits, row by row, in the model's dtype;
               loss = mean over sequences of the mean over a sequence's tokens (beta 0 here: no reference model)
    plain      G separate rows likewise, but the head on completion rows only
    packing    one row `[prompt | c_1 | ... | c_G]`, tower once; head and loss in plain torch
    kernels    the same row, head and loss in the fused kernel: what the trainer runs

`original` is written from the description of that recipe, with one change: positions are those of the sampled tokens
(the original left the video's frame rate out when scoring). Completions are padded on the right to one length.

Shape letters: G completions, L tokens of a padded row, R longest completion, N scored tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.floors import separate_pairs, shared_pairs
from bench.flops import StepFlop, decoder_flop, head_flop, tower_flop
from vcr1_fast.learner.kernel_choice import KernelChoice, Pick
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.objective import grpo_objective
from vcr1_fast.learner.packing import pack
from vcr1_fast.settings.config import AlgorithmConfig, ModelConfig
from vcr1_fast.types import RolloutGroup

WayName = Literal["original", "plain", "packing", "kernels"]
WAY_NAMES: tuple[WayName, ...] = ("original", "plain", "packing", "kernels")
TEMPERATURE = 1.0
PAD = -100

LossCall = Callable[[], Tensor]  # runs one micro-batch forward; its result is to be added to the step's loss


@dataclass(frozen=True)
class WayOptions:
    """How a way is run so that it fits in memory."""

    rows_per_microbatch: int  # of the separate rows; the packed ways run the whole group at once
    gradient_checkpointing: bool


def losses(
    name: WayName, hf: Qwen2_5_VLForConditionalGeneration, group: RolloutGroup, options: WayOptions
) -> Iterator[LossCall]:
    """The micro-batches of one update. Sets the model's attention and checkpointing as the way needs them."""
    if options.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.disable_input_require_grads()  # as learner/recompute.py
    else:
        hf.gradient_checkpointing_disable()
    if name in ("original", "plain"):
        hf.model.language_model.config._attn_implementation = "sdpa"
        if hf.device.type == "cpu":  # what a PolicyModel gave the tower; on a GPU all ways have it
            hf.model.visual.config._attn_implementation = "sdpa"
            hf.model.visual.patch_embed.proj.__class__ = torch.nn.Conv3d
        loss_of = original_loss if name == "original" else plain_loss
        for start in range(0, len(group.completions), options.rows_per_microbatch):
            rows = range(start, min(start + options.rows_per_microbatch, len(group.completions)))
            yield lambda rows=rows: loss_of(hf, group, rows)
        return
    # packing: attention as the kernels have it, so that the difference between the two is the head
    kernels = KernelChoice(Pick("plain"), Pick("plain")) if name == "packing" else KernelChoice()
    config = ModelConfig(gradient_checkpointing="full" if options.gradient_checkpointing else "none")
    policy = PolicyModel(hf, config, hf.dtype, kernels).train()
    batch = policy.device_batch(pack([group], [token_weights_of(group)]))
    objective = grpo_objective(batch, None, AlgorithmConfig())
    yield lambda: policy(batch, TEMPERATURE, objective)[0]


def token_weights_of(group: RolloutGroup) -> list[float]:
    """1 / (R_s S): mean over a sequence's tokens, then over sequences."""
    return [1.0 / (len(group.completions) * c.num_tokens) for c in group.completions]


@dataclass(frozen=True)
class PaddedRows:
    """Some of the group's completions, each behind its own copy of the prompt."""

    token_ids_GL: Tensor
    position_ids_3GL: Tensor
    target_GR: Tensor  # PAD behind the end of a completion
    advantage_G1: Tensor
    weight_G1: Tensor  # of one token in the step's loss
    model_inputs: dict[str, Tensor]  # pixels and grids, repeated for each row


def pad_rows(group: RolloutGroup, rows: range, device: torch.device) -> PaddedRows:
    prompt, chosen = group.prompt, [group.completions[i] for i in rows]
    target_GR = torch.nn.utils.rnn.pad_sequence([c.token_ids_R for c in chosen], batch_first=True, padding_value=PAD)
    num_rows, longest = target_GR.shape
    ids_GL = torch.cat([prompt.token_ids_L.expand(num_rows, -1), target_GR.clamp(min=0)], dim=1)
    extra = prompt.next_position + torch.arange(longest)
    positions = torch.cat([prompt.position_ids_3L, extra.expand(3, -1)], dim=1)
    weights = token_weights_of(group)
    return PaddedRows(
        ids_GL.to(device),
        positions[:, None].expand(-1, num_rows, -1).to(device),
        target_GR.to(device),
        torch.tensor([[group.advantages[i]] for i in rows], dtype=torch.float32, device=device),
        torch.tensor([[weights[i]] for i in rows], dtype=torch.float32, device=device),
        {
            "pixel_values_videos": prompt.media[0].values_PC.to(device).repeat(num_rows, 1),
            "video_grid_thw": torch.tensor([prompt.media[0].grid_thw] * num_rows),
        },
    )


def on_policy_loss(logprob_GR: Tensor, rows: PaddedRows) -> Tensor:
    """-sum w A exp(logp - stop(logp)) over the tokens that are none of the padding."""
    ratio_GR = torch.exp(logprob_GR - logprob_GR.detach())
    term_GR = rows.weight_G1 * rows.advantage_G1 * ratio_GR
    return -torch.where(rows.target_GR == PAD, torch.zeros_like(term_GR), term_GR).sum()


def original_loss(hf: Qwen2_5_VLForConditionalGeneration, group: RolloutGroup, which: range) -> Tensor:
    rows = pad_rows(group, which, hf.device)
    logits_GLV = hf(
        input_ids=rows.token_ids_GL, position_ids=rows.position_ids_3GL, use_cache=False, **rows.model_inputs
    ).logits
    per_row = []
    for logits_LV, ids_L in zip(logits_GLV[:, :-1], rows.token_ids_GL[:, 1:], strict=True):
        per_row.append(logits_LV.log_softmax(dim=-1).gather(1, ids_L[:, None])[:, 0])
    logprob_GL = torch.stack(per_row)
    return on_policy_loss(logprob_GL[:, -rows.target_GR.shape[1] :].float(), rows)


def plain_loss(hf: Qwen2_5_VLForConditionalGeneration, group: RolloutGroup, which: range) -> Tensor:
    rows = pad_rows(group, which, hf.device)
    num_scored = rows.target_GR.shape[1]
    with autocast(hf):
        logits_GRV = hf(
            input_ids=rows.token_ids_GL[:, :-1],
            position_ids=rows.position_ids_3GL[..., :-1],
            logits_to_keep=num_scored,
            use_cache=False,
            **rows.model_inputs,
        ).logits
    all_logprobs_GRV = torch.log_softmax(logits_GRV.to(reference_dtype(hf)), -1)
    logprob_GR = all_logprobs_GRV.gather(2, rows.target_GR.clamp(min=0)[..., None])[..., 0]
    return on_policy_loss(logprob_GR, rows)


def autocast(hf: Qwen2_5_VLForConditionalGeneration) -> AbstractContextManager[object]:
    if hf.dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(hf.device.type, dtype=hf.dtype)


def reference_dtype(hf: Qwen2_5_VLForConditionalGeneration) -> torch.dtype:
    return torch.promote_types(hf.dtype, torch.float32)


@dataclass(frozen=True)
class TokenCounts:
    """What a way runs through the model, and what the same update is without sharing."""

    executed: int  # decoder tokens
    unshared: int  # tokens of the G separate rows as `plain` feeds them
    head_rows: int
    pairs: int  # visible (query, key) pairs of one attention layer


def count_tokens(name: WayName, group: RolloutGroup) -> TokenCounts:
    prompt_len = group.prompt.token_ids_L.numel()
    lens = [c.num_tokens for c in group.completions]
    fed = [n - 1 for n in lens]
    unshared = sum(prompt_len + n for n in fed)
    if name == "original":
        padded = [max(lens)] * len(lens)
        tokens = sum(prompt_len + n for n in padded)
        return TokenCounts(tokens, unshared, tokens, separate_pairs(prompt_len, padded))
    if name == "plain":
        padded = [max(fed)] * len(lens)
        tokens = sum(prompt_len + n for n in padded)
        return TokenCounts(tokens, unshared, max(lens) * len(lens), separate_pairs(prompt_len, padded))
    return TokenCounts(prompt_len + sum(fed), unshared, sum(lens), shared_pairs(prompt_len, fed))


def count_flop(name: WayName, config: Any, group: RolloutGroup, options: WayOptions) -> StepFlop:
    """`config`: the Qwen2_5_VLConfig."""
    counts = count_tokens(name, group)
    tower_runs = len(group.completions) if name in ("original", "plain") else 1
    tower = tower_runs * tower_flop(config.vision_config, [group.prompt.media[0].grid_thw])
    decoder = decoder_flop(config.text_config, counts.executed, counts.pairs)
    recomputed = tower + decoder if options.gradient_checkpointing else 0
    return StepFlop(tower, decoder, head_flop(config.text_config, counts.head_rows), recomputed)
