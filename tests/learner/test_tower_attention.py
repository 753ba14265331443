"""The tower's attention in one call per layer."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vcr1_fast.learner import tower_attention
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.model import load_hugging_face


def two_videos() -> tuple[torch.Tensor, torch.Tensor]:
    """Grids and patches of 2 videos of 4 frame pairs of 8 x 8 patches."""
    values = torch.randn(2 * 4 * 64, 1176, generator=torch.Generator().manual_seed(0))
    return torch.tensor([(4, 8, 8)] * 2), values


def test_the_tower_in_one_call_is_the_tower_window_by_window(monkeypatch):
    """transformers must hand segments to an implementation with "flash" in its name; the kernel itself needs a GPU, so
    dense attention under a mask of segments stands for it here."""
    calls = []

    def dense(query, key, value, ends, lengths, scale):
        segment = torch.searchsorted(ends.long(), torch.arange(query.shape[0]), right=True)
        calls.append((int(segment.max()), int(lengths.max())))
        heads_first = [x.transpose(0, 1)[None] for x in (query, key, value)]
        out = scaled_dot_product_attention(*heads_first, attn_mask=segment[:, None] == segment[None], scale=scale)
        return out[0].transpose(0, 1)

    monkeypatch.setattr(tower_attention, "varlen_attention", dense)
    hf = load_hugging_face("tiny", torch.float32, torch.device("cpu"))
    grids, values = two_videos()
    expected = hf.model.visual(values, grid_thw=grids).pooler_output
    tower_attention.use_tower_attention(hf.model.visual, "flash")
    got = hf.model.visual(values, grid_thw=grids).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    # 2 videos of 4 frame pairs of 8 x 8 patches: windows of 4 x 4, or whole frames
    assert sorted(set(calls)) == [(8, 64), (32, 16)] and len(calls) == 4


def test_dense_calls_are_the_stock_tower(monkeypatch):
    """With lengths from the host, as a device batch gives them; a clip whose last windows are narrow. Its patches are
    embedded by a product, not by transformers' convolution."""
    hf = load_hugging_face("tiny", torch.float32, torch.device("cpu"))
    family, tower = family_of(hf.config), hf.model.visual
    grids = [(2, 4, 10), (1, 6, 4), (2, 4, 8)]
    values_PC = torch.randn(80 + 24 + 64, 1176, generator=torch.Generator().manual_seed(0))

    def run(call) -> list[torch.Tensor]:
        out = call().pooler_output if call is stock else call()
        out.square().sum().backward()
        grads = [weight.grad for weight in tower.parameters()]
        tower.zero_grad(set_to_none=True)
        return [out.detach(), *grads]

    def stock():
        return tower(values_PC, grid_thw=torch.tensor(grids))

    expected = run(stock)
    names = list(tower.state_dict())
    tower_attention.use_tower_attention(tower, "plain")
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: calls.append(tuple(q.shape[::2])) or attend(q, k, v, **options),
    )
    got = run(lambda: family.run_tower(tower, values_PC, family.tower_inputs(grids, tower.config)))
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    assert list(tower.state_dict()) == names
    # windows of 4 x 4: two frames of 16, 16 and 8 patches together, one of 16 and 8, two with windows of one length
    windows, frames = [(2, 16), (2, 16), (2, 8), (1, 16), (1, 8), (4, 16)], [(2, 40), (1, 24), (2, 32)]
    assert calls == [*windows, *frames] * 2


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_stock_tower_within_bfloat16():
    """Outputs and the gradient of every tower weight; the bound is the stock bfloat16 tower's own error in float32."""
    grids, values = two_videos()
    values = values.cuda()

    def run(dtype: torch.dtype, one_call: bool) -> list[torch.Tensor]:
        hf = load_hugging_face("tiny", dtype, torch.device("cuda"))
        if one_call:
            tower_attention.use_tower_attention(hf.model.visual, "flash")
        out = hf.model.visual(values.to(dtype), grid_thw=grids).pooler_output
        out.float().square().sum().backward()
        grads = [p.grad.double() for p in hf.model.visual.parameters() if p.grad is not None]
        return [out.double(), *grads]

    truth, stock, ours = run(torch.float32, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    for exact, plain, got in zip(truth, stock, ours, strict=True):
        assert float((got - exact).norm()) <= 1.5 * float((plain - exact).norm()) + 1e-3 * float(exact.norm())
