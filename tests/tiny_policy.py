"""A random Qwen2.5-VL of 40 thousand weights in a policy shell, and a way to run a function on several ranks."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.learner.golden_case import TEXT, TOKEN_IDS, VISION

REPOSITORY = Path(__file__).resolve().parents[1]


def tiny_hf(*, tied: bool = False, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {
            "vocab_size": 67,  # odd: two ranks get shards of unequal length
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "tie_word_embeddings": tied,
        },
        vision_config=dict(VISION),
        tie_word_embeddings=tied,
        **TOKEN_IDS,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).float()


class TinyPolicy(nn.Module):
    """The shape of the real policy: the Hugging Face model as `.hf`, everything inside `forward`."""

    def __init__(self, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.hf = tiny_hf(tied=tied, seed=seed)
        self.one = nn.Parameter(torch.ones(1))  # fewer rows than ranks: the second rank's shard is empty

    def forward(self, token_ids_BT: Tensor, patches_PC: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of the shifted tokens, plus the vision tower's mean square if it is fed."""
        loss = torch.zeros(())
        if patches_PC is not None:
            grid_thw = torch.tensor([[1, 4, 4]])
            features = self.hf.model.visual(patches_PC, grid_thw=grid_thw).pooler_output
            loss = loss + features.float().square().mean()
        logits_BTV = self.hf(input_ids=token_ids_BT).logits.float() * self.one.float()
        targets = token_ids_BT[:, 1:].reshape(-1)
        return loss + nn.functional.cross_entropy(logits_BTV[:, :-1].reshape(targets.numel(), -1), targets)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 59, (2, 7), generator=torch.Generator().manual_seed(seed))


def patches(seed: int) -> Tensor:
    return torch.randn(16, 1176, generator=torch.Generator().manual_seed(seed))


def free_port() -> int:
    """Below those that the system hands out, so that no other test's connection takes it before the ranks have it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def fork_ranks(num_ranks: int, main: Callable[..., None]) -> NoReturn:
    """Run `main(*sys.argv[1:])` on ranks forked from this process, whose imports they share; exit 1 where one fails."""
    os.environ |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            main(*sys.argv[1:])
            os._exit(1)  # `main` ends its process itself
        children.append(pid)
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))


def run_ranks(worker: Path, *arguments: str, num_ranks: int = 2, timeout_s: float = 120.0) -> None:
    """Run the script `worker` on `num_ranks` processes of this machine, as torchrun would; fail with their output."""
    port = free_port()
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(worker), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ten words, split at spaces."""
    words = {
        word: index
        for index, word in enumerate(["<unk>", "when", "does", "the", "dog", "jump", "into", "a", "lake", "?"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def tiny_folder(folder: Path, *, tied: bool = False) -> Path:
    """Where such a policy started from: a model's folder."""
    tiny_hf(tied=tied, seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
