"""Rollouts by SGLang in processes of its own: a `RolloutEngine` that drives one worker or several.

Pixels, positions and token ids are the learner's, and log-probs come back as the local engine defines them (see
sgl/video.py). A worker that dies or hangs is started again, given the current weights, and its groups are done
again: the caller sees only the time (sgl/round.py, sgl/workers.py).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.engine import NOT_BEGUN, Begun, Quota, is_done
from vcr1_fast.rollout.sampling import check_sampling
from vcr1_fast.rollout.sgl import penalty
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.memory import BOUNDED_SHARE, memory_args
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.process import prepare_model_folder
from vcr1_fast.rollout.sgl.round import Answers, Round
from vcr1_fast.rollout.sgl.update import CHECK_LOADER, FORGET_LOADER
from vcr1_fast.rollout.sgl.weights import checkpoint_weights
from vcr1_fast.rollout.sgl.workers import Request, Workers
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import Completion, FinishReason, Prompt, RunError, SamplingParams
from vcr1_fast.video.pixel_bytes import pack

CPU = torch.device("cpu")
CPU_ARGS = {  # what runs without a GPU; on one, SGLang chooses
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "mem_fraction_static": BOUNDED_SHARE,
    "max_total_tokens": 16384,
    "sleep_on_idle": True,  # its scheduler would otherwise poll on a core that the learner needs
}


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
        can_penalise: bool = False,
    ) -> None:
        """Starts the workers and waits for them. `checkpoint`: a Hugging Face folder; `seed`: of SGLang's sampling;
        `can_penalise`: `generate` takes a repetition penalty, for which SGLang's scheduler no longer works ahead of its
        GPU.

        Raises ConfigError when checkpoint or tokenizer do not fit, OSError when the interpreter or folder cannot be
        used, and RuntimeError, with the end of the worker's log, when SGLang does not start.
        """
        special = SpecialIds.of(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        self._can_penalise = can_penalise
        self._checkpoint = checkpoint
        self._stop_ids, self._suppressed_ids = special.stop, special.vision
        model = read_config(checkpoint)
        self._family, self._is_tied = family_of(model), bool(model.tie_word_embeddings)
        self._round: Round | None = None  # the call of generate that is running
        self._folder = Path(tempfile.mkdtemp(prefix="vcr1-sglang-"))  # mode 700: only this user reaches the sockets
        try:
            model_folder = prepare_model_folder(checkpoint, self._folder / "model")
            arguments = engine_args(config, model_folder, dtype, device, seed, can_penalise=can_penalise)
            self._workers = Workers(config, arguments, self._folder, dtype)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def policy_version(self) -> int:
        """Of the weights now loaded."""
        return self._workers.policy_version

    @property
    def num_restarts(self) -> int:
        """Workers started again so far."""
        return self._workers.num_restarts

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Begun | None = None,
        quota: Quota | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Where completions are gone on with, their prompt is read again once, and so are
        their tokens. With a repetition penalty log-probs are NaN: SGLang's are those after it.

        Raises ValueError for a prompt or settings that the engine cannot take, and RuntimeError when a group or the
        workers failed too often; the engine can then still be used.
        """
        check_sampling(sampling)
        if sampling.repetition_penalty != 1 and not self._can_penalise:
            raise ValueError(
                f"sampling.repetition_penalty is {sampling.repetition_penalty}, wanted 1: this engine was opened "
                "without can_penalise"
            )
        if self._workers.is_released:
            raise RuntimeError("the engine's memory is released: load_weights takes it back, with every weight")
        if not self._workers.has_weights and self.policy_version == 0:
            self.load_weights(checkpoint_weights(self._checkpoint), 0)
        size = sampling.num_completions
        answers = [list(group) for group in begun] if begun else [[NOT_BEGUN] * size for _ in prompts]

        def is_enough(got: Answers) -> bool:
            return quota is not None and quota.is_met([is_done(got.get(row, own)) for row, own in enumerate(answers)])

        self._round = Round(
            self._workers,
            self.config,
            open_requests(prompts, answers),
            encode=lambda number, request: self._request(number, request, sampling),
            decode=lambda message, request: self._completions(message, request, sampling),
            is_enough=is_enough,
        )
        try:
            got = self._round.run()
        finally:
            self._round = None
        for row, drawn in got.items():
            rest = iter(drawn)
            answers[row] = [next(rest) if own.finish_reason == "aborted" else own for own in answers[row]]
        return answers

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`."""
        running = self._round
        if running is not None:
            running.interrupt()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """See `RolloutEngine.load_weights`; names of the model's state dict or of the checkpoint.

        The first load must name every weight, later ones may leave out frozen ones. After a worker's first load every
        weight is read back and compared. Raises ValueError for names or shapes that do not fit, and RuntimeError when
        SGLang's model does not hold what was sent; `policy_version` then stays, and the next load must be whole.
        """
        named = ((self._family.checkpoint_name(name), value) for name, value in weights)
        # a tied head travels as the embedding that it is
        kept = ((name, value) for name, value in named if not (self._is_tied and name == "lm_head.weight"))
        self._workers.load(kept, policy_version)

    def release_memory(self) -> None:
        """Lend the GPU memory of weights, KV cache and CUDA graphs to the learner, if `rollout.sglang.release_memory`.

        Not during `generate`. The next `load_weights` takes it back and must name every weight, frozen ones too: what
        SGLang finds there is undefined.
        """
        if self.config.release_memory:
            self._workers.release_memory()

    @property
    def version(self) -> str:
        """See `RolloutEngine.version`; of all workers."""
        return "sglang " + ", ".join(sorted({seat.worker.version for seat in self._workers.seats}))

    @property
    def host_copy(self) -> HostCopy:
        """Of the weights, for workers that are started again; `WeightSync` shares it out among ranks."""
        return self._workers.host_copy

    def metrics(self) -> dict[str, float]:
        """engine/restarts: workers started again so far."""
        return {"engine/restarts": float(self.num_restarts)}

    def close(self) -> None:
        """End the workers and free the memory."""
        self._workers.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _request(
        self, number: int, request: Request, sampling: SamplingParams
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        prompt, begun = request.prompt, request.begun
        fields = {
            "id": number,
            "policy_version": self.policy_version,
            "begun_lengths": [completion.num_tokens for completion in begun],
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_ids": self._stop_ids,
            "suppressed_ids": self._suppressed_ids,
            "media": [
                {"kind": shown.kind, "grid_thw": shown.grid_thw, "second_per_grid_s": shown.second_per_grid_s}
                for shown in prompt.media
            ],
        }
        tensors = {"token_ids_L": prompt.token_ids_L, "position_ids_3L": prompt.position_ids_3L}
        tensors["begun_ids"] = torch.cat([completion.token_ids_R for completion in begun])
        embeddings = [shown.embeddings_MD for shown in prompt.media if shown.embeddings_MD is not None]
        if embeddings:
            tensors["embeddings_MD"] = _joined(embeddings)
        elif prompt.media:
            tensors["values_PC"] = _joined([shown.values_PC for shown in prompt.media])
        # to another machine pixels go as bytes, where that is exact
        is_far = self.config.placement == "disaggregated"
        return fields, pack(tensors) if is_far else tensors

    def _completions(self, message: Message, request: Request, sampling: SamplingParams) -> list[Completion]:
        """Raises RuntimeError for an answer that is not what was asked for."""
        lengths: list[int] = message.fields["lengths"]
        versions = set(message.fields["policy_versions"])
        if len(lengths) != len(request.begun) or versions - {str(self.policy_version)}:
            raise RunError(
                f"SGLang gave {len(lengths)} completions by policy {sorted(versions)}, wanted "
                f"{len(request.begun)} by policy {self.policy_version}"
            )
        tokens, logprobs = message.tensors["token_ids"].split(lengths), message.tensors["logprobs"].split(lengths)
        if not all(bool(logprob_R.isfinite().all()) for logprob_R in logprobs):
            raise RunError("SGLang's log-probs are not finite: the weights have diverged or are broken")
        if sampling.repetition_penalty != 1:
            logprobs = [torch.full_like(logprob_R, torch.nan) for logprob_R in logprobs]
        whole = [
            (torch.cat([before.token_ids_R, token_R]), torch.cat([before.logprobs_R, logprob_R]))
            for before, token_R, logprob_R in zip(request.begun, tokens, logprobs, strict=True)
        ]
        texts = self.tokenizer.batch_decode([token_R.tolist() for token_R, _ in whole], skip_special_tokens=True)
        reasons: list[FinishReason] = [
            self._finish_reason(token_R, is_cut and token_R.numel() < sampling.max_new_tokens)
            for (token_R, _), is_cut in zip(whole, message.fields["is_cut"], strict=True)
        ]
        return [Completion(*row, reason, text) for row, reason, text in zip(whole, reasons, texts, strict=True)]

    def _finish_reason(self, token_R: Tensor, is_cut: bool) -> FinishReason:
        if token_R.numel() and int(token_R[-1]) in self._stop_ids:
            return "stop"
        return "aborted" if is_cut else "length"


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def open_requests(prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> list[Request]:
    """One for each prompt that has unfinished completions: so a prompt is read once, whatever is still to be drawn."""
    unfinished = [[own for own in group if own.finish_reason == "aborted"] for group in answers]
    return [Request(row, prompts[row], begun) for row, begun in enumerate(unfinished) if begun]


def engine_args(
    config: SGLangConfig,
    model_folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    can_penalise: bool = False,
) -> Mapping[str, Any]:
    """What `sglang.Engine` is started with; `config.engine_args` has the last word.

    Raises ConfigError when `config.memory_gb` is too small.
    """
    is_cpu = device.type == "cpu"
    has_size = not is_cpu or config.memory_gb is not None
    return {
        "model_path": str(model_folder),
        "load_format": "dummy",  # weights come by message
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "grammar_backend": "none",
        # Qwen3-VL's position embeddings as the model has them, also where its tower runs in a CUDA graph
        "enable_precise_embedding_interpolation": True,
        "custom_weight_loader": [CHECK_LOADER, FORGET_LOADER],
        "random_seed": seed,
        "log_level": "warning",
        **(CPU_ARGS if is_cpu else {"base_gpu_id": device.index or 0}),
        **(memory_args(config, read_model_size(str(model_folder)), dtype.itemsize) if has_size else {}),
        **(penalty.ENGINE_ARGS if can_penalise else {}),
        **({"enable_memory_saver": True} if config.release_memory and device.type == "cuda" else {}),
        **config.engine_args,
    }
