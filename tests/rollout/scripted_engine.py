"""A rollout engine that replays given answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.engine import Begun, Quota
from vcr1_fast.types import Completion, Prompt, SamplingParams


class ScriptedEngine:
    """Replays the first G answers of each example, log-probs 0.

    Example: `ScriptedEngine(tokenizer, {"clip:1": ["<answer>2.0 to 4.5</answer>", "no idea"]})` with G = 2.
    """

    version = "scripted"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scripts: Mapping[str, Sequence[str]]) -> None:
        """`scripts`: example id -> answers, ended by <|im_end|> when replayed."""
        self.policy_version = 0
        self._tokenizer = tokenizer
        self._special = SpecialIds.of(tokenizer)
        self._scripts = scripts

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Begun | None = None,
        quota: Quota | None = None,
    ) -> list[list[Completion]]:
        """Answers cut at max_new_tokens. Raises ValueError for an unknown id or too few answers."""
        return [self._group(prompt.example.id, sampling) for prompt in prompts]

    def interrupt(self) -> None: ...

    def release_memory(self) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Ask for every weight, as an engine would (the sender's gathers are collectives), and keep none."""
        for _ in weights:
            pass
        self.policy_version = policy_version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def _group(self, example_id: str, sampling: SamplingParams) -> list[Completion]:
        scripts, wanted = self._scripts.get(example_id, ()), sampling.num_completions
        if len(scripts) < wanted:
            raise ValueError(f"example {example_id!r} has {len(scripts)} scripted answers, wanted {wanted}")
        return [self._completion(text, sampling.max_new_tokens) for text in scripts[:wanted]]

    def _completion(self, script: str, max_new_tokens: int) -> Completion:
        text_ids = self._tokenizer(script, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*text_ids, self._special.im_end][:max_new_tokens]
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        reason = "stop" if ids[-1:] == [self._special.im_end] else "length"
        return Completion(torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids)), reason, text)
