"""torch.cuda's Python side for a GPU that is not there: properties, streams and events that do nothing but count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

# The GPU that is played. Rates of prediction are in predict.py.
H100 = SimpleNamespace(
    name="H100 SXM",
    total_memory=80 * 1000**3,
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
)


class Event:
    wait_for_gpu: ClassVar[Callable[[str], None]]

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Event.wait_for_gpu("event.synchronize")


class Stream:
    """A stream; FSDP has several."""

    device_type, device_index, stream_id, cuda_stream = 1, 0, 0, 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        Event.wait_for_gpu("stream.synchronize")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def install(num_gpus: int, wait: Callable[[str], None]) -> None:
    """Have torch.cuda speak of such GPUs from now on, in the whole process. `wait(what)` is told of each wait."""
    Event.wait_for_gpu = wait
    stream = Stream()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: num_gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_properties": lambda device=None: H100,
        "get_device_name": lambda device=None: H100.name,
        "mem_get_info": lambda device=None: (H100.total_memory, H100.total_memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: wait("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
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
