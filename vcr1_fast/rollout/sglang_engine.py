"""Rollouts by SGLang in processes of its own: a `RolloutEngine` that drives one worker or several.

All G completions of a prompt go to one worker in one request, so that its video is prefilled once; the least loaded
worker gets the next prompt. Pixels, positions and token ids are the learner's, and log-probs come back as the local
engine defines them (see sglang_video.py). A worker that dies or hangs is started again, given the current weights, and
its groups are done again: the caller sees only the time.
"""

from __future__ import annotations

import json
import selectors
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vcr1_fast.config_learning import SGLangConfig
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.sampling import check_sampling
from vcr1_fast.rollout.sglang_messages import Message
from vcr1_fast.rollout.sglang_process import WorkerGoneError, WorkerProcess, prepare_model_folder
from vcr1_fast.rollout.sglang_weights import Batch, WeightStore, checkpoint_weights
from vcr1_fast.types import Completion, Prompt, SamplingParams

CPU = torch.device("cpu")
POLL_S = 0.25
SEND_LIMIT_S = 60.0  # a worker reads in a thread of its own; one that takes nothing for so long is stopped
ABORT_GRACE_S = 10.0
MAX_BACKOFF_S = 30.0
CPU_ARGS = {  # what runs without a GPU; on one, SGLang chooses
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "max_total_tokens": 16384,
    "sleep_on_idle": True,  # its scheduler would otherwise poll on a core that the learner needs
}


@dataclass
class _Group:
    """One prompt of a `generate` call."""

    index: int
    prompt: Prompt
    num_attempts: int = 0
    deadline: float = 0.0
    is_aborted: bool = False


@dataclass
class _Seat:
    """One worker and the requests it has."""

    worker: WorkerProcess
    groups: dict[int, _Group] = field(default_factory=dict)  # by request number
    is_checked: bool = False  # its weights were read back since it was started


class SGLangEngine:
    """A RolloutEngine. Its tokens do not depend on `SamplingParams.seed`: SGLang draws from a stream of its own.

    Before the first `load_weights` the checkpoint's own weights are used, as version 0.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: SGLangConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        seed: int = 0,
    ) -> None:
        """Starts the workers and waits for them. `checkpoint`: a Hugging Face folder; `seed`: of SGLang's sampling.

        Raises ValueError when the tokenizer does not fit, OSError when the interpreter or folder cannot be used, and
        RuntimeError, with the end of the worker's log, when SGLang does not start.
        """
        special = SpecialIds.of(tokenizer)
        self.policy_version = 0
        self.tokenizer = tokenizer
        self.config = config
        self.num_restarts = 0
        self._checkpoint = checkpoint
        self._stop_ids, self._suppressed_ids = special.stop, special.vision
        self._store = WeightStore(config.bucket_mb << 20, dtype)
        settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self._is_tied = bool(settings.get("tie_word_embeddings", False))
        self._next_number = 0
        self._failures_in_a_row = 0
        self._folder = Path(tempfile.mkdtemp(prefix="vcr1-sglang-"))  # mode 700: only this user reaches the socket
        model_folder = prepare_model_folder(checkpoint, self._folder / "model")
        arguments = engine_args(config, model_folder, dtype, device, seed)
        self._seats = [
            _Seat(WorkerProcess(config.python or sys.executable, arguments, self._folder, f"worker-{index}"))
            for index in range(config.num_workers)
        ]
        try:
            for seat in self._seats:
                seat.worker.start()
            for seat in self._seats:
                seat.worker.wait_ready(config.start_timeout_s)
        except WorkerGoneError as error:
            self.close()
            raise RuntimeError(f"SGLang does not start: its worker {error}") from error
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Raises ValueError for a prompt or settings that the engine cannot take, and
        RuntimeError when a group or the workers failed too often; the engine can then still be used."""
        check_sampling(sampling)
        if not self._store.is_whole and self.policy_version == 0:
            self.load_weights(checkpoint_weights(self._checkpoint), 0)
        waiting = deque(_Group(index, prompt) for index, prompt in enumerate(prompts))
        answers: dict[int, list[Completion]] = {}
        try:
            while len(answers) < len(prompts):
                self._hand_out(waiting, sampling)
                if not self._take_answers(waiting, answers, sampling):
                    self._watch(waiting)
        except BaseException:
            self._give_up()
            raise
        return [answers[index] for index in range(len(prompts))]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """See `RolloutEngine.load_weights`; names of the model's state dict or of the checkpoint.

        The first load must name every weight, later ones may leave out frozen ones. After a worker's first load every
        weight is read back and compared. Raises ValueError for names or shapes that do not fit, and RuntimeError when
        SGLang's model does not hold what was sent; `policy_version` then stays, and the next load must be whole.
        """
        if self._is_tied:  # the head travels as the embedding that it is
            weights = ((name, value) for name, value in weights if name != "lm_head.weight")
        changed = self._store.update(weights)
        previous, self.policy_version = self.policy_version, policy_version
        try:
            for seat in self._seats:
                try:
                    self._feed(seat, changed if seat.is_checked else self._store.all())
                except WorkerGoneError as error:
                    self._revive(seat, deque(), str(error))
        except BaseException:
            self.policy_version = previous
            raise

    def close(self) -> None:
        """End the workers and free the memory."""
        for seat in self._seats:
            seat.worker.stop()
        self._store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hand_out(self, waiting: deque[_Group], sampling: SamplingParams) -> None:
        while waiting:
            seat = min(self._seats, key=lambda seat: len(seat.groups))
            if len(seat.groups) >= self.config.max_inflight:
                return
            group = waiting.popleft()
            self._next_number += 1
            group.deadline, group.is_aborted = time.monotonic() + self.config.timeout_s, False
            seat.groups[self._next_number] = group
            fields, tensors = self._request(self._next_number, group.prompt, sampling)
            try:
                seat.worker.channel.send("generate", fields, tensors, timeout_s=SEND_LIMIT_S)
            except (OSError, WorkerGoneError) as error:
                self._revive(seat, waiting, f"took no request: {error}")

    def _request(
        self, number: int, prompt: Prompt, sampling: SamplingParams
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = {
            "id": number,
            "policy_version": self.policy_version,
            "num_completions": sampling.num_completions,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_ids": self._stop_ids,
            "suppressed_ids": self._suppressed_ids,
            "grid_thw": prompt.patches.grid_thw,
            "second_per_grid_s": prompt.patches.second_per_grid_s,
        }
        tensors = {
            "token_ids_L": prompt.token_ids_L,
            "position_ids_3L": prompt.position_ids_3L,
        }
        embeddings_MD = prompt.patches.embeddings_MD
        if embeddings_MD is not None:
            tensors["embeddings_MD"] = embeddings_MD
        else:
            tensors["values_PC"] = prompt.patches.values_PC
        return fields, tensors

    def _take_answers(
        self, waiting: deque[_Group], answers: dict[int, list[Completion]], sampling: SamplingParams
    ) -> bool:
        """Whether anything came within POLL_S."""
        with selectors.DefaultSelector() as selector:
            for seat in self._seats:
                if seat.worker.is_ready:
                    selector.register(seat.worker.channel, selectors.EVENT_READ, seat)
            ready: list[_Seat] = [key.data for key, _ in selector.select(POLL_S)]
        for seat in ready:
            try:
                message = seat.worker.channel.receive(SEND_LIMIT_S)
            except (OSError, EOFError, ValueError) as error:
                self._revive(seat, waiting, f"is gone: {error}")
                continue
            group = seat.groups.pop(int(message.fields["id"]), None)
            if group is not None:  # None: of a call that was given up
                self._settle(group, message, waiting, answers, sampling)
        return bool(ready)

    def _settle(
        self,
        group: _Group,
        message: Message,
        waiting: deque[_Group],
        answers: dict[int, list[Completion]],
        sampling: SamplingParams,
    ) -> None:
        """What one answer means for its group."""
        name = group.prompt.example.id
        if message.kind == "completions":
            answers[group.index] = self._completions(message, sampling)
            self._failures_in_a_row = 0
            return
        if message.kind == "refused":
            raise ValueError(f"the prompt of example {name!r} cannot be answered: {message.fields['reason']}")
        timed_out = f"took longer than {self.config.timeout_s:g} s (rollout.sglang.timeout_s)"
        self._retry(group, waiting, timed_out if message.kind == "aborted" else str(message.fields["reason"]))

    def _retry(self, group: _Group, waiting: deque[_Group], reason: str) -> None:
        group.num_attempts += 1
        if group.num_attempts >= self.config.max_attempts:
            name = group.prompt.example.id
            raise RuntimeError(
                f"the answers to example {name!r} failed {group.num_attempts} times (rollout.sglang.max_attempts), "
                f"the last time because: {reason}"
            )
        waiting.append(group)

    def _watch(self, waiting: deque[_Group]) -> None:
        """Nothing came for a while: abort what is late, and start workers again that do not even abort."""
        now = time.monotonic()
        for seat in self._seats:
            late = [(number, group) for number, group in seat.groups.items() if group.deadline < now]
            hung = [group for _, group in late if group.is_aborted]
            if hung:
                reason = f"did not stop a request {ABORT_GRACE_S:g} s after it was late"
                for group in hung:
                    group.num_attempts += 1
                self._revive(seat, waiting, reason)
                continue
            for number, group in late:
                group.is_aborted, group.deadline = True, now + ABORT_GRACE_S
                self._abort(seat, number)

    def _abort(self, seat: _Seat, number: int) -> None:
        try:
            seat.worker.channel.send("abort", {"id": number}, timeout_s=1.0)
        except (OSError, WorkerGoneError):
            seat.worker.kill()  # found by the next send

    def _give_up(self) -> None:
        """Free the workers of what nobody waits for any more."""
        for seat in self._seats:
            for number in list(seat.groups):
                if seat.worker.is_ready:
                    self._abort(seat, number)
            seat.groups.clear()

    def _revive(self, seat: _Seat, waiting: deque[_Group], reason: str) -> None:
        """Start the worker again, with the current weights, and put its groups back in front of the queue.

        Raises RuntimeError after `max_restarts` starts in a row without one finished group.
        """
        groups = list(seat.groups.values())
        seat.groups.clear()
        waiting.extendleft(reversed(groups))
        while True:
            self._failures_in_a_row += 1
            if self._failures_in_a_row > self.config.max_restarts:
                seat.worker.kill()
                raise RuntimeError(
                    f"SGLang workers failed {self._failures_in_a_row} times in a row (rollout.sglang.max_restarts is "
                    f"{self.config.max_restarts}), the last one because it {reason}"
                )
            print(f"SGLang worker {seat.worker.log.stem} is started again: it {reason}", file=sys.stderr)
            time.sleep(min(self.config.backoff_s * 2 ** (self._failures_in_a_row - 1), MAX_BACKOFF_S))
            self.num_restarts += 1
            seat.is_checked = False
            try:
                seat.worker.start()
                seat.worker.wait_ready(self.config.start_timeout_s)
                self._feed(seat, self._store.all())
                return
            except WorkerGoneError as error:
                reason = str(error)

    def _feed(self, seat: _Seat, batches: Sequence[Batch]) -> None:
        """Raises WorkerGoneError when the worker must be started again, RuntimeError when it holds other weights."""
        for index, (bucket, slots) in enumerate(batches):
            self._next_number += 1
            fields = {
                "id": self._next_number,
                "entries": [slot.as_json() for slot in slots],
                "policy_version": self.policy_version,
                "is_first": index == 0,
                "is_last": index == len(batches) - 1,
                "check": not seat.is_checked,
            }
            answer = seat.worker.ask("weights", fields, {"bytes_B": bucket.memory}, self.config.timeout_s)
            if answer.kind != "loaded":
                seat.worker.kill()
                raise WorkerGoneError(f"did not take weights: {answer.fields.get('reason', answer.kind)}")
            if answer.fields["wrong"]:
                seat.worker.kill()
                raise RuntimeError(
                    "SGLang's model does not hold the weights it was sent: " + "; ".join(answer.fields["wrong"])
                )
        seat.is_checked = True

    def _completions(self, message: Message, sampling: SamplingParams) -> list[Completion]:
        """Raises RuntimeError for an answer that is not what was asked for."""
        lengths: list[int] = message.fields["lengths"]
        versions = set(message.fields["policy_versions"])
        if len(lengths) != sampling.num_completions or versions != {str(self.policy_version)}:
            raise RuntimeError(
                f"SGLang gave {len(lengths)} completions by policy {sorted(versions)}, wanted "
                f"{sampling.num_completions} by policy {self.policy_version}"
            )
        tokens, logprobs = message.tensors["token_ids"].split(lengths), message.tensors["logprobs"].split(lengths)
        if not all(bool(logprob_R.isfinite().all()) for logprob_R in logprobs):
            raise RuntimeError("SGLang's log-probs are not finite: the weights have diverged or are broken")
        texts = self.tokenizer.batch_decode([token_R.tolist() for token_R in tokens], skip_special_tokens=True)
        return [
            Completion(
                token_R.clone(),
                logprob_R.clone(),
                "stop" if token_R.numel() and int(token_R[-1]) in self._stop_ids else "length",
                text,
            )
            for token_R, logprob_R, text in zip(tokens, logprobs, texts, strict=True)
        ]


def engine_args(
    config: SGLangConfig, model_folder: Path, dtype: torch.dtype, device: torch.device, seed: int
) -> Mapping[str, Any]:
    """What `sglang.Engine` is started with; `config.engine_args` has the last word."""
    return {
        "model_path": str(model_folder),
        "load_format": "dummy",  # weights come by message
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "grammar_backend": "none",
        "mem_fraction_static": config.mem_fraction_static,
        "custom_weight_loader": ["vcr1_fast.rollout.sglang_check.compare"],
        "random_seed": seed,
        "log_level": "warning",
        **(CPU_ARGS if device.type == "cpu" else {"base_gpu_id": device.index or 0}),
        **config.engine_args,
    }
