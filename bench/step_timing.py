"""Runs one update of a way and says where its time went: tower, decoder, head, backward, optimizer, other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.hooks import RemovableHandle
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.floors import Limits
from bench.flops import StepFlop
from bench.harness import free_memory, with_peak
from bench.step_ways import LossCall
from vcr1_fast.learner.optimizer import clip_grad_norm

PARTS: tuple[str, ...] = ("tower", "decoder", "head", "backward", "optimizer", "other")


@dataclass(frozen=True)
class UpdateTime:
    total_ms: float
    parts_ms: dict[str, float]


class PartMarks:
    """Marks in the stream of work; the time before a mark belongs to the part that the mark names."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def times(self) -> UpdateTime:
        """Milliseconds of each part; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        parts_ms = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            parts_ms[part] += before.elapsed_time(after) if self._is_cuda else (after - before) * 1e3
        return UpdateTime(sum(parts_ms.values()), parts_ms)

    @contextmanager
    def on(self, hf: Qwen2_5_VLForConditionalGeneration) -> Iterator[None]:
        """Marks at the borders of tower and decoder. What checkpointing recomputes lies within backward."""
        handles: list[RemovableHandle] = []
        for part, module in (("tower", hf.model.visual), ("decoder", hf.model.language_model)):
            handles.append(module.register_forward_pre_hook(lambda *_: self.mark("other")))
            handles.append(module.register_forward_hook(lambda *_, part=part: self.mark(part)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def run_update(
    hf: Qwen2_5_VLForConditionalGeneration, optimizer: AdamW | None, calls: Iterator[LossCall]
) -> tuple[float, UpdateTime]:
    """Forward and backward of all micro-batches, then clipping and the optimizer (None: gradients stay as they are).

    Returns the loss and the times.
    """
    marks, loss_sum = PartMarks(hf.device), torch.zeros((), device=hf.device)
    with marks.on(hf):
        marks.mark("other")
        for call in calls:
            loss = call()
            marks.mark("head")
            loss.backward()
            marks.mark("backward")
            loss_sum += loss.detach()
        if optimizer is not None:
            clip_grad_norm(hf, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.mark("optimizer")
    return float(loss_sum), marks.times()


def update_with_peak(hf: Qwen2_5_VLForConditionalGeneration, calls: Iterator[LossCall]) -> tuple[float, int | None]:
    """The loss of one update and the largest memory allocated meanwhile, weights and optimizer state included."""
    free_memory(hf.device)
    (loss, _), extra, before = with_peak(lambda: run_update(hf, None, calls), hf.device)
    return loss, None if extra is None else before + extra


def still_optimizer(hf: Qwen2_5_VLForConditionalGeneration) -> AdamW:
    """AdamW at learning rate 0: the full work of an update, and every way meets the same weights."""
    return AdamW(hf.parameters(), lr=0.0, weight_decay=0.0, fused=True if hf.device.type == "cuda" else None)


def warm_up(hf: Qwen2_5_VLForConditionalGeneration, optimizer: AdamW) -> None:
    """Lets the optimizer allocate its state, so that every way meets it."""
    for parameter in hf.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def predicted_parts_ms(flop: StepFlop, limits: Limits, *, head_in_forward: bool) -> dict[str, float]:
    """What the counted FLOPs would take at the rate of a large matrix product on this device.

    A fused head that makes its gradients while going forward spends all three of its products there.
    """
    head_forward = 3 * flop.head if head_in_forward else flop.head
    backward = flop.step - flop.tower - flop.decoder - head_forward + flop.recomputed
    forward = {"tower": flop.tower, "decoder": flop.decoder, "head": head_forward, "backward": backward}
    return {name: limits.flop_ms(value) for name, value in forward.items()}


def drop_gradients(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    for parameter in hf.parameters():
        parameter.grad = None


def gradient_difference(hf: Qwen2_5_VLForConditionalGeneration, expected: Mapping[str, Tensor]) -> float:
    """`distance` of the gradients that the parameters have."""
    return distance({n: p.grad for n, p in hf.named_parameters() if p.grad is not None}, expected)


def distance(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||g - e|| / ||e|| over all weights together. A missing gradient counts as zero."""
    difference = norm = 0.0
    for name, wanted in expected.items():
        wide = wanted.double()
        got = gradients[name].double() if name in gradients else torch.zeros_like(wide)
        difference += float((got - wide).square().sum())
        norm += float(wide.square().sum())
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def take_gradients(hf: Qwen2_5_VLForConditionalGeneration) -> dict[str, Tensor]:
    """Hands the gradients over and leaves the parameters without."""
    taken = {}
    for name, parameter in hf.named_parameters():
        taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return taken
