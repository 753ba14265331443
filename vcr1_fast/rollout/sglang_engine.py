"""Rollouts by SGLang in processes of its own: a `RolloutEngine` that drives one worker or several.

Pixels, positions and token ids are the learner's, and log-probs come back as the local engine defines them (see
sglang_video.py). A worker that dies or hangs is started again, given the current weights, and its groups are done
again: the caller sees only the time (sglang_round.py, sglang_workers.py).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vcr1_fast.config_learning import SGLangConfig
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.sampling import check_sampling
from vcr1_fast.rollout.sglang_messages import Message
from vcr1_fast.rollout.sglang_process import prepare_model_folder
from vcr1_fast.rollout.sglang_round import Round
from vcr1_fast.rollout.sglang_weights import checkpoint_weights
from vcr1_fast.rollout.sglang_workers import Workers
from vcr1_fast.types import Completion, Prompt, SamplingParams

CPU = torch.device("cpu")
CPU_ARGS = {  # what runs without a GPU; on one, SGLang chooses
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
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
    ) -> None:
        """Starts the workers and waits for them. `checkpoint`: a Hugging Face folder; `seed`: of SGLang's sampling.

        Raises ValueError when the tokenizer does not fit, OSError when the interpreter or folder cannot be used, and
        RuntimeError, with the end of the worker's log, when SGLang does not start.
        """
        special = SpecialIds.of(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        self._checkpoint = checkpoint
        self._stop_ids, self._suppressed_ids = special.stop, special.vision
        settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self._is_tied = bool(settings.get("tie_word_embeddings", False))
        self._folder = Path(tempfile.mkdtemp(prefix="vcr1-sglang-"))  # mode 700: only this user reaches the sockets
        try:
            model_folder = prepare_model_folder(checkpoint, self._folder / "model")
            arguments = engine_args(config, model_folder, dtype, device, seed)
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

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Raises ValueError for a prompt or settings that the engine cannot take, and
        RuntimeError when a group or the workers failed too often; the engine can then still be used."""
        check_sampling(sampling)
        if not self._workers.has_weights and self.policy_version == 0:
            self.load_weights(checkpoint_weights(self._checkpoint), 0)
        return Round(
            self._workers,
            self.config,
            prompts,
            encode=lambda number, prompt: self._request(number, prompt, sampling),
            decode=lambda message: self._completions(message, sampling),
        ).run()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """See `RolloutEngine.load_weights`; names of the model's state dict or of the checkpoint.

        The first load must name every weight, later ones may leave out frozen ones. After a worker's first load every
        weight is read back and compared. Raises ValueError for names or shapes that do not fit, and RuntimeError when
        SGLang's model does not hold what was sent; `policy_version` then stays, and the next load must be whole.
        """
        if self._is_tied:  # the head travels as the embedding that it is
            weights = ((name, value) for name, value in weights if name != "lm_head.weight")
        self._workers.load(weights, policy_version)

    def close(self) -> None:
        """End the workers and free the memory."""
        self._workers.close()
        shutil.rmtree(self._folder, ignore_errors=True)

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
