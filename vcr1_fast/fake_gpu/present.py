"""The rates of the GPU that is present, measured in a second or two; links between GPUs cannot be, by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from vcr1_fast.fake_gpu.costs import attention_flop
from vcr1_fast.fake_gpu.predict import H100_RATES, Rates

NUM_CALLS = 20  # timed together, after three that warm up


def present_rates() -> Rates:
    """Measured on the current GPU; the H100's where there is none."""
    if not torch.cuda.is_available():
        return H100_RATES
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    return measure_rates(device, f"measured on this {name}, but for links and flash-attn 3 and 4, which are assumed")


def measure_rates(device: torch.device, source: str, side: int = 8192, num_tokens: int = 4096) -> Rates:
    """Of bfloat16: a square GEMM, causal attention of torch (16 heads of 128), a copy of 4 side^2 bytes in float32.

    `side` and `num_tokens` are large enough that a GPU is busy; nothing stays allocated.
    """
    a_NN, b_NN = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    gemm_s = _seconds(lambda: a_NN @ b_NN, device)
    source_NN = torch.empty(side, side, dtype=torch.float32, device=device)
    target_NN = torch.empty_like(source_NN)
    copy_s = _seconds(lambda: target_NN.copy_(source_NN), device)
    shape = (1, 16, num_tokens, 128)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    attend = lambda: scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    with torch.no_grad():
        forward_s = _seconds(attend, device)
    out = attend()
    backward_s = _seconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True), device)
    flop = attention_flop(16 * 128, [num_tokens], [num_tokens], True)
    return replace(
        H100_RATES,
        source=source,
        gemm_flop_s=2 * side**3 / gemm_s,
        memory_bytes_s=2 * source_NN.nbytes / copy_s,
        attention_flop_s={**H100_RATES.attention_flop_s, "fa2": (flop / forward_s, 2.5 * flop / backward_s)},
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    for _ in range(3):
        call()
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    _wait(device)
    return (time.perf_counter() - began_s) / NUM_CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
