"""`train()` itself on a fake GPU: load, push, parity, evaluation, steps, checkpoint, export, as rank 0 of some.

Left out is what needs values. Answers are token 0 wherever they are drawn on the GPU, so no reward differs from another
and a KL term is what sends groups through the update, unless another engine is given; exported weights and checkpoints
are zeros; the proof of the kernels has nothing to compare, so they are taken as proven. Work of thread pools is done at
once. Of several ranks the others are not there: their answers in an evaluation, and checkpoints, are left out. SGLang's
engine is not run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import vcr1_fast.train as train_module
from vcr1_fast.fake_gpu.learner import measured
from vcr1_fast.fake_gpu.mode import FakeGpu
from vcr1_fast.learner import update_rows
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.kernel_proof import Proof
from vcr1_fast.run import run as run_module
from vcr1_fast.run.saver import CheckpointSaver
from vcr1_fast.settings.io import load_config


def run_training(gpu: FakeGpu, config: str, overrides: Sequence[str], num_gpus: int, engine: str) -> dict[str, Any]:
    """What `train` returns, and the counts of the whole run. `engine`: see process.Case."""
    gpu.meter.start()
    with _as_rank_0(num_gpus), _with_engine(engine):
        result = train_module.train(load_config(config, list(overrides)))
    return {"result": result, "run": vars(measured(gpu.meter, 0.0))}


def _with_engine(engine: str) -> AbstractContextManager[object]:
    if not engine:
        return nullcontext()
    module, _, function = engine.partition(":")
    return mock.patch.object(run_module.Run, "open_engine", getattr(importlib.import_module(module), function))


@contextmanager
def _as_rank_0(num_gpus: int) -> Iterator[None]:
    join = dist.init_process_group

    def submit(_: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """In this thread and at once: a mode holds for one thread, and fake tensors bear no second one."""
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future

    def join_fake(**_: Any) -> None:
        join("fake", rank=0, world_size=num_gpus, store=FakeStore())

    launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submit))
        stack.enter_context(mock.patch.object(run_module, "choose_kernels", lambda *_: Proof(KernelChoice())))
        # each rank has such groups as this one, so none leaves its rank
        same = lambda sizes, world: [list(sizes)] * world.world_size  # noqa: E731
        stack.enter_context(mock.patch.object(update_rows, "gather_all", same))
        stack.enter_context(mock.patch.object(dist, "init_process_group", join_fake))
        if num_gpus > 1:
            # a checkpoint of several ranks is checked against what the others hold, and there are no others
            stack.enter_context(mock.patch.object(CheckpointSaver, "save", lambda *_: None))
            stack.enter_context(mock.patch.dict(os.environ, launcher | {"WORLD_SIZE": str(num_gpus)}))
        yield
