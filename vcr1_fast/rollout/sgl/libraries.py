"""Versions of torch and NCCL, of the trainer's environment and of SGLang's, which weights may go between by NCCL.

Runs in both: only the standard library and torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from vcr1_fast.settings.error import require


@dataclass(frozen=True, slots=True)
class Libraries:
    """Of one environment."""

    torch: str  # such as 2.13.0+cu130
    cuda: str  # that torch was built for, such as 13.0; empty in another build
    nccl: str  # such as 2.29.7; empty without CUDA

    @classmethod
    def here(cls) -> Libraries:
        import torch
        from torch.cuda import nccl

        cuda = torch.version.cuda or ""
        return cls(torch.__version__, cuda, ".".join(map(str, nccl.version())) if cuda else "")

    def pip_line(self, wanted: Libraries) -> str:
        """What gives this environment the NCCL of another one: its torch, whose wheel brings it. Where that is the
        same, somebody has changed the NCCL alone."""
        version = wanted.torch.partition("+")[0]
        if version != self.torch.partition("+")[0]:
            return f"pip install torch=={version}"
        return f"pip install nvidia-nccl-cu{self.cuda.partition('.')[0]}=={wanted.nccl}"


def check_nccl(own: Libraries, theirs: Libraries, worker: str) -> None:
    """Raises ConfigError unless both have one NCCL: it refuses a group of two versions as an invalid usage
    (initTransportsRank in NCCL's init.cc)."""
    require(
        own.nccl == theirs.nccl,
        f"weights go by NCCL, but worker {worker} has NCCL {theirs.nccl or 'none'} (torch {theirs.torch}) and the "
        f"trainer {own.nccl or 'none'} (torch {own.torch}), wanted one version: `{own.pip_line(theirs)}` in the "
        "trainer's environment",
    )
