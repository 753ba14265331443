"""Rates of a GPU that is there: the arithmetic by hand, and the measurement itself, on this CPU."""

import pytest
import torch

from vcr1_fast.fake_gpu import present
from vcr1_fast.fake_gpu.predict import H100_RATES


def test_rates_by_hand(monkeypatch):
    """GEMM 2 x 64^3 FLOP; a copy reads and writes 4 x 64^2 bytes; causal attention of 32 tokens: 2 x 2 x 16 x 128 x
    32 x 33 / 2 FLOP, and 2.5 times as many back. In 1, 2, 4 and 8 s."""
    seconds = iter((1.0, 2.0, 4.0, 8.0))
    monkeypatch.setattr(present, "_seconds", lambda call, device: (call(), next(seconds))[1])
    rates = present.measure_rates(torch.device("cpu"), "by hand", side=64, num_tokens=32)
    assert (rates.source, rates.gemm_flop_s, rates.memory_bytes_s) == ("by hand", 2 * 64**3, 4 * 64**2)
    flop = 2 * 2 * 16 * 128 * 32 * 33 / 2
    assert rates.attention_flop_s["fa2"] == (flop / 4, 2.5 * flop / 8)
    assert rates.attention_flop_s["fa3"] == H100_RATES.attention_flop_s["fa3"]
    assert rates.link_bytes_s == H100_RATES.link_bytes_s


def test_a_machine_is_measured():
    """A core does between 1e8 and 1e13 FLOP/s, and copies between 1e8 and 1e12 bytes/s."""
    rates = present.measure_rates(torch.device("cpu"), "this machine", side=256, num_tokens=64)
    assert 1e8 < rates.gemm_flop_s < 1e13 and 1e8 < rates.memory_bytes_s < 1e12
    assert 1e7 < rates.attention_flop_s["fa2"][1] < 1e13


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_are_assumed():
    assert present.present_rates() is H100_RATES and "assumed" in H100_RATES.source


@pytest.mark.gpu
def test_a_gpu_is_measured():
    """Between a tenth of an A100 and twice a B200."""
    rates = present.present_rates()
    assert "measured on this" in rates.source and 3e13 < rates.gemm_flop_s < 5e15
    assert 1e11 < rates.memory_bytes_s < 2e13 and rates.attention_flop_s["fa2"][1] > 1e13
