"""torch.cuda's Python side for a GPU that is not there: properties, streams and events that do nothing but count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GpuModel:
    """A GPU that is played. Rates of prediction are in predict.py."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    num_multiprocessors: int


H100 = GpuModel("H100 SXM", 80 * 1000**3, (9, 0), 132)


class _Event:
    def __init__(self, wait: Callable[[str], None]) -> None:
        self._wait = wait

    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._wait("event.synchronize")


class _Stream:
    """A stream; FSDP has several."""

    device_type, device_index, stream_id, cuda_stream = 1, 0, 0, 0

    def __init__(self, wait: Callable[[str], None]) -> None:
        self._wait = wait
        self.device = torch.device("cuda", 0)

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event(self._wait)

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._wait("stream.synchronize")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _stream_and_event(wait: Callable[[str], None]) -> tuple[Callable[[], _Stream], Callable[[], _Event]]:
    """Classes, because annotations of other packages name them."""

    class Stream(_Stream):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(wait)

    class Event(_Event):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(wait)

    return Stream, Event


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def install(gpu: GpuModel, num_gpus: int, wait: Callable[[str], None]) -> None:
    """Have torch.cuda speak of this GPU from now on, in the whole process. `wait(what)` is told of each wait for it."""
    properties = type(
        "Properties",
        (),
        {
            "name": gpu.name,
            "total_memory": gpu.memory_bytes,
            "major": gpu.capability[0],
            "minor": gpu.capability[1],
            "multi_processor_count": gpu.num_multiprocessors,
            "L2_cache_size": 50 << 20,
        },
    )

    stream_class, event_class = _stream_and_event(wait)
    stream = stream_class()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: num_gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: gpu.name,
        "mem_get_info": lambda device=None: (gpu.memory_bytes, gpu.memory_bytes),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: wait("torch.cuda.synchronize"),
        "Stream": stream_class,
        "Event": event_class,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _nothing,
        "device": _nothing,
        "device_of": _nothing,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.get_device_module = lambda device=None: torch.cuda
    torch.accelerator.current_stream = lambda device=None: stream  # FSDP's, for gathers that no backward pass took up
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.Tensor.record_stream = lambda self, stream: None  # pyright: ignore[reportAttributeAccessIssue]
