"""The local rollout engine on fake GPUs: prefill and decode of one chunk of prompts; what is drawn means nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers.initialization import no_init_weights

from vcr1_fast.fake_gpu.groups import GroupShape, make_group
from vcr1_fast.fake_gpu.learner import DEVICE, measured
from vcr1_fast.fake_gpu.mode import FakeGpu
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.model import resolve_dtype
from vcr1_fast.prompts.special_ids import TOKEN_TEXT
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.settings.config import Config
from vcr1_fast.types import SamplingParams

NEW_TOKENS = (2, 4)  # the difference of the two is what two tokens more cost


class _Tokenizer:
    """Ids of the special tokens, and no words."""

    name_or_path = "stand-in"

    def __init__(self, hf_config: Any) -> None:
        placeholders = {"image_pad": hf_config.image_token_id, "video_pad": hf_config.video_token_id}
        free = (i for i in range(len(TOKEN_TEXT)) if i not in placeholders.values())
        self._ids = {text: placeholders.get(name) or next(free) for name, text in TOKEN_TEXT.items()}

    def get_vocab(self) -> dict[str, int]:
        return self._ids

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [""] * len(rows)


def answer(
    gpu: FakeGpu, config: Config, hf_config: Any, shapes: Sequence[GroupShape], group_size: int
) -> dict[str, Any]:
    """{"load": Measured, "answers": {number of new tokens: Measured}} for the prompts of these shapes in one chunk."""
    family, dtype = family_of(hf_config), resolve_dtype(config.model, DEVICE)
    began_s = time.perf_counter()
    gpu.meter.start()
    gpu.meter.enter("load", "weights")
    with DEVICE, no_init_weights():
        model: Any = family.model_class._from_config(copy.deepcopy(hf_config), dtype=dtype)
    tokenizer: Any = _Tokenizer(hf_config)
    many = 1 << 40  # of tokens: all prompts in one chunk
    engine = LocalEngine(model, tokenizer, max_batch_rows=many, max_batch_tokens=many)
    report: dict[str, Any] = {"load": asdict(measured(gpu.meter, began_s)), "answers": {}}
    prompts = [make_group(shape, family, hf_config, DEVICE).prompt for shape in shapes]
    for num_tokens in NEW_TOKENS:
        began_s = time.perf_counter()
        gpu.meter.start()
        gpu.meter.enter("rollout", "KV cache and activations")
        engine.generate(prompts, SamplingParams(group_size, num_tokens))
        report["answers"][num_tokens] = asdict(measured(gpu.meter, began_s))
    engine.close()
    return report
