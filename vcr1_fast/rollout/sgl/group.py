"""The process group that carries weights from one learner rank to its workers, apart from the learner's own groups.

Rank 0 is the learner's rank, the ranks behind it are SGLang's processes, which join by `init_weights_update_group`.
torch's functions for groups would register it beside the learner's default group and, where that one is bound to a GPU,
split its NCCL communicator, which needs every rank of the training. So the backend is made by itself, and nothing else
of `torch.distributed` knows of it. SGLang's side makes its end by torch's helper, whose names of keys are used here.
Both ends need one NCCL (`Libraries`). Also imported in the worker's interpreter: only the standard library and torch.
"""

from __future__ import annotations

import secrets
import socket
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vcr1_fast.settings.error import require

MAX_TIMEOUT_S = 300.0  # of making the group and of one broadcast; a worker that dies then is found out no sooner


class UpdateGroup:
    """Made by `begin_join` together with the workers, which must be asked to join `name` at `address` and `port`."""

    def __init__(self, num_workers: int, device: torch.device, address: str, timeout_s: float) -> None:
        """Listens on a free port of `address` alone. Raises OSError when that is none of this machine's."""
        self.name, self.address, self.size = f"vcr1-{secrets.token_hex(8)}", address, num_workers + 1
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._timeout = timedelta(seconds=min(timeout_s, MAX_TIMEOUT_S))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=self.size + 8)
        self.port: int = listener.getsockname()[1]
        how: Any = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        self._store: Store = TCPStore(address, self.port, self.size, timeout=self._timeout, **how)
        self._end: Any = None  # ProcessGroupGloo or, where torch has it, ProcessGroupNCCL
        # Has a name here as long as `_end`: without one the backend's thread would need the GIL to free it, which the
        # end of the backend holds while it waits for that thread.
        self._sent: Tensor | None = None

    def begin_join(self) -> Future[None]:
        """Done when every worker is in (gloo), or at once (NCCL connects at the first broadcast).

        In a thread of its own, which ends with a RuntimeError when a worker does not come: nothing else would end it.
        """
        joining: Future[None] = Future()

        def join() -> None:
            try:
                self._join()
                joining.set_result(None)
            except Exception as error:
                joining.set_exception(error)

        threading.Thread(target=join, daemon=True).start()
        return joining

    def _join(self) -> None:
        store = self._store
        for prefix in (self.name, f"{self.name}/", "cuda/" if self.backend == "nccl" else "cpu/"):
            store = PrefixStore(prefix, store)
        if self.backend == "gloo":
            self._end = dist.ProcessGroupGloo(store, 0, self.size, timeout=self._timeout)
            return
        nccl: Any = dist.ProcessGroupNCCL  # pyright: ignore[reportAttributeAccessIssue]
        options = nccl.Options()
        options._timeout = self._timeout
        options.group_name = self.name
        self._end = nccl(store, 0, self.size, options)

    def broadcast(self, flat_B: Tensor) -> dist.Work:
        """Begins to send the bytes to every worker; they must stay as they are until `wait` of what is given back."""
        assert self._end is not None, "join first"
        self._sent = flat_B
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._end.broadcast([flat_B], options)

    def close(self) -> None:
        """Leave, without waiting for anybody: a broadcast to a process that is gone may hold `abort` up."""
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        if self._end is not None:
            self._end.abort()
            self._end = None


@dataclass(frozen=True, slots=True)
class Libraries:
    """Of one environment."""

    torch: str  # such as 2.13.0+cu130
    cuda: str  # that torch was built for, such as 13.0; empty in another build
    nccl: str  # such as 2.29.7; empty without CUDA

    @classmethod
    def here(cls) -> Libraries:
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

    def require_nccl_of(self, theirs: Libraries, worker: str) -> None:
        """Raises ConfigError unless both have one NCCL: it refuses a group of two versions as an invalid usage
        (initTransportsRank in NCCL's init.cc)."""
        require(
            self.nccl == theirs.nccl,
            f"weights go by NCCL, but worker {worker} has NCCL {theirs.nccl or 'none'} (torch {theirs.torch}) and the "
            f"trainer {self.nccl or 'none'} (torch {self.torch}), wanted one version: `{self.pip_line(theirs)}` in the "
            "trainer's environment",
        )
