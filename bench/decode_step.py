"""`python -m bench decode_step`: one token of the embedded engine for 8 answers, beside the stock forward.

engine  all of a token in `LocalEngine`: decoder and head, drawing, log-prob, the check for stop ids
stock   transformers' own text model and the head alone, whose cache holds the prompt once per answer: what a decoder
        that nobody rewrote takes at least

Packaged tiny model, float32. The stock model is fed what the engine drew, and log-probs are compared first. Operators
are counted as they are dispatched, and with those that they call, as torch.profiler sees them. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedTokenizerBase

from bench.columns import heads_of, print_rows
from bench.groups import random_group
from vcr1_fast.learner.model import load_hugging_face, load_tokenizer
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.types import Completion, Prompt, SamplingParams

CPU = torch.device("cpu")
GRIDS = ((8, 8, 8), (64, 8, 8))  # frame pairs and patches: 128 and 1,024 video tokens
NUM_TEXT, NUM_ANSWERS, NUM_TOKENS = 72, 8, 60
COUNTED = (4, 8)  # the difference of two lengths is what four tokens take
MAX_DIFFERENCE = 1e-4  # of log-probs in float32, far above its noise; the tests hold float64 to 1e-6
COLUMNS = {
    "prompt_tokens": ("prompt", "its tokens"),
    "way": ("way", "engine: the embedded one; stock: transformers' forward and the head alone"),
    "dispatched": ("operators", "of one token, as torch dispatches them"),
    "nested": ("with nested ones", "with those that they call, as torch.profiler sees them"),
    "ms": ("ms", "of one token, median over all"),
}
COLUMN_HEADS = heads_of(COLUMNS)
Mark = Callable[[object], None]  # called at each token
Decode = Callable[[int, Mark], object]  # that many tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long."""
    parser.add_argument("--rounds", type=int, default=5, help="turns of 60 tokens (default: 5)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows {prompt_tokens, way, dispatched, nested, ms}, of one token; ms is the median over all."""
    rows: list[dict[str, Any]] = []
    worst = 0.0
    for grid in GRIDS:
        ways, prompt_tokens, difference = ways_of(grid)
        worst = max(worst, difference)
        samples_ms: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, decode in ways.items():
                marks_s: list[float] = []
                decode(NUM_TOKENS, lambda _, marks_s=marks_s: marks_s.append(time.perf_counter()))
                samples_ms[name] += [1e3 * (after - before) for before, after in pairwise(marks_s)]
        for name, decode in ways.items():
            row = {"prompt_tokens": prompt_tokens, "way": name, **operators(decode)}
            rows.append(row | {"ms": statistics.median(samples_ms[name])})
    print_rows(rows, COLUMNS, f"one token of {NUM_ANSWERS} answers")
    print(f"log-probs differ by {worst:.1e} at most")
    return {"rows": rows, "logprob_difference": worst}


def failed(result: dict[str, Any]) -> str | None:
    """Why a run counts for nothing."""
    worst = result["logprob_difference"]
    return None if worst < MAX_DIFFERENCE else f"log-probs are {worst:.1e} from those of the stock forward"


def ways_of(grid: tuple[int, int, int]) -> tuple[dict[str, Decode], int, float]:
    """The ways, the prompt's tokens, and the largest difference of log-probs between them."""
    tokenizer = load_tokenizer("tiny")
    hf, engine = _endless(tokenizer), LocalEngine(_endless(tokenizer), tokenizer)
    prompt = random_group(grid, NUM_TEXT, (), hf.config.video_token_id).prompt

    def engine_way(num_tokens: int, mark: Mark) -> list[Completion]:
        engine.on_token = mark
        return engine.generate([prompt], SamplingParams(NUM_ANSWERS, num_tokens))[0]

    drawn = engine_way(NUM_TOKENS, lambda _: None)
    token_SB = torch.stack([answer.token_ids_R for answer in drawn], dim=1)
    logits_SBV = torch.stack(feed_stock(hf, prompt, token_SB, lambda _: None))
    logits_SBV[..., SpecialIds.of(tokenizer).vision] = -torch.inf
    logprob_SB = logits_SBV.log_softmax(-1).gather(2, token_SB[..., None])[..., 0]
    difference = logprob_SB - torch.stack([answer.logprobs_R for answer in drawn], dim=1)
    ways: dict[str, Decode] = {"engine": engine_way, "stock": lambda n, m: feed_stock(hf, prompt, token_SB[:n], m)}
    return ways, prompt.token_ids_L.numel(), float(difference.abs().max())


def _endless(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The packaged model with a head of its own that hardly ever ends an answer: rows that end are dropped."""
    hf = load_hugging_face("tiny", torch.float32, CPU).eval()
    weight_VD = hf.lm_head.weight.detach().clone()
    weight_VD[list(SpecialIds.of(tokenizer).stop)] = 0
    hf.lm_head.weight = torch.nn.Parameter(weight_VD)
    return hf


@torch.inference_mode()
def feed_stock(hf: Any, prompt: Prompt, token_SB: Tensor, mark: Mark) -> list[Tensor]:
    """transformers' logits [B, V] that each of the tokens is drawn from."""
    decoder, patches, num_answers = hf.model.language_model, prompt.media[0], token_SB.shape[1]
    cache = DynamicCache(config=decoder.config)
    logits_1LV = hf(
        input_ids=prompt.token_ids_L[None],
        position_ids=prompt.position_ids_3L[:, None],
        pixel_values_videos=patches.values_PC,
        video_grid_thw=torch.tensor([patches.grid_thw]),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits
    cache.batch_repeat_interleave(num_answers)
    result = [logits_1LV[:, -1].expand(num_answers, -1)]
    mark(None)
    for step, token_B in enumerate(token_SB[:-1]):
        positions = torch.full((3, num_answers, 1), prompt.next_position + step)
        output = decoder(input_ids=token_B[:, None], position_ids=positions, past_key_values=cache, use_cache=True)
        result.append(hf.lm_head(output.last_hidden_state[:, 0]))
        mark(None)
    return result


def operators(decode: Decode) -> dict[str, float]:
    """{"dispatched", "nested"}: operators of a token, composite ones as one, and all that were entered."""
    dispatched, nested = [], []
    for num_tokens in COUNTED:
        with _Counter() as counter:
            decode(num_tokens, lambda _: None)
        dispatched.append(counter.count)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            decode(num_tokens, lambda _: None)
        nested.append(sum(event.name.startswith("aten::") for event in trace.events() or ()))
    tokens = COUNTED[1] - COUNTED[0]
    return {"dispatched": (dispatched[1] - dispatched[0]) / tokens, "nested": (nested[1] - nested[0]) / tokens}


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
