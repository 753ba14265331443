"""A rollout engine that replays given completions: for tests, and for training on answers sampled elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.engine import Begun, Quota
from vcr1_fast.types import Completion, Prompt, SamplingParams

Script = str | Sequence[int]  # an answer's text (ended by <|im_end|> when replayed), or its token ids as they are


class ScriptedEngine:
    """Replays the first G scripted answers of each example.

    Example: `ScriptedEngine(tokenizer, {"clip:1": ["<answer>2.0 to 4.5</answer>", "no idea"]})` with G = 2.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scripts: Mapping[str, Sequence[Script]],
        logprobs: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> None:
        """`scripts`: example id -> answers. `logprobs`: example id -> per answer, one per token; default all 0."""
        self.policy_version = 0
        self._tokenizer = tokenizer
        self._special = SpecialIds.of(tokenizer)
        self._scripts = scripts
        self._logprobs = logprobs

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Begun | None = None,
        quota: Quota | None = None,
    ) -> list[list[Completion]]:
        """Answers cut at max_new_tokens. Raises ValueError for an unknown id, too few answers or unequal lengths."""
        return [self._group(prompt.example.id, sampling) for prompt in prompts]

    def interrupt(self) -> None:
        """Answers come at once."""

    def release_memory(self) -> None:
        """Nothing to lend."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Ask for every weight, as an engine would (the sender's gathers are collectives), and keep none."""
        for _ in weights:
            pass
        self.policy_version = policy_version

    @property
    def version(self) -> str:
        """See `RolloutEngine.version`."""
        return "scripted"

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Holds nothing."""

    def _group(self, example_id: str, sampling: SamplingParams) -> list[Completion]:
        if example_id not in self._scripts:
            known = ", ".join(list(self._scripts)[:5]) or "none"
            raise ValueError(f"example {example_id!r} is not scripted, the scripts begin with: {known}")
        scripts, wanted = self._scripts[example_id], sampling.num_completions
        if len(scripts) < wanted:
            raise ValueError(
                f"example {example_id!r} has {len(scripts)} scripted answers, wanted num_completions {wanted}"
            )
        return [self._completion(example_id, i, scripts[i], sampling.max_new_tokens) for i in range(wanted)]

    def _completion(self, example_id: str, index: int, script: Script, max_new_tokens: int) -> Completion:
        if isinstance(script, str):
            text_ids = self._tokenizer(script, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = [*text_ids, self._special.im_end]  # pyright: ignore[reportGeneralTypeIssues]
        else:
            ids = list(script)
        logprobs = [0.0] * len(ids) if self._logprobs is None else list(self._logprobs[example_id][index])
        if len(logprobs) != len(ids):
            raise ValueError(
                f"answer {index} of example {example_id!r} has {len(ids)} tokens, but {len(logprobs)} log-probs"
            )
        ids, logprobs = ids[:max_new_tokens], logprobs[:max_new_tokens]
        has_stop = bool(ids) and ids[-1] in self._special.stop
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        token_ids_R = torch.tensor(ids, dtype=torch.int64)
        return Completion(token_ids_R, torch.tensor(logprobs), "stop" if has_stop else "length", text)
