"""Patchify: the Triton kernel (interpreted on a CPU) and the torch twin against the reference and the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import reference
from vcr1_kernels.patchify import _patchify, patchify

HALF = (torch.bfloat16, torch.float16)
QWEN2_5: dict[str, Any] = {"patch_px": 14, "mean": reference.CLIP_MEAN, "std": reference.CLIP_STD}  # the defaults
QWEN3: dict[str, Any] = {"patch_px": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
FORMATS = pytest.mark.parametrize("cut", [QWEN2_5, QWEN3], ids=["qwen2_5", "qwen3"])


@pytest.fixture
def interpreted() -> None:
    """Kernels run in Triton's interpreter here; a machine with a GPU runs the tests below instead."""
    pytest.importorskip("triton")
    from vcr1_kernels.backend import is_interpreted

    if not is_interpreted():
        pytest.skip("TRITON_INTERPRET is not 1")


def random_clip(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8).to(device)


def channels_first(clip: Tensor) -> Tensor:
    """The same values, stored as [F, 3, H, W]."""
    return clip.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance in representable numbers. Only for values of equal sign: patch values are never near 0."""
    assert a.dtype == b.dtype and torch.equal(a.signbit(), b.signbit())
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return int((a.view(kind).long() - b.view(kind).long()).abs().max())


def test_cpu_tensors_take_the_torch_twin_and_bfloat16_by_default() -> None:
    clip = random_clip(4, 56, 84)
    assert torch.equal(patchify(clip), reference.patchify(clip, torch.bfloat16))
    for dtype in (*HALF, torch.float32):
        assert torch.equal(patchify(clip, dtype), reference.patchify(clip, dtype))
        assert torch.equal(patchify(clip, dtype, backend="torch"), reference.patchify(clip, dtype))


# In blocks of 2 x 2 patches. One block; odd counts of frames; several programs a band with a cut last one (5 blocks are
# 3920 pairs of 14 px, 5120 of 16); several bands
@FORMATS
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2), (5, 2, 1), (3, 1, 5), (2, 3, 2), (4, 2, 4)])
def test_interpreted_kernel_equals_the_reference(
    shape: tuple[int, int, int], cut: dict[str, Any], interpreted: None
) -> None:
    clip = random_clip(shape[0], *(2 * cut["patch_px"] * side for side in shape[1:]))
    exact = reference.patchify(clip, torch.float64, **cut)
    got = patchify(clip, torch.float32, **cut, backend="triton")
    # The interpreter rounds a product before it adds (a GPU does not): 1 ulp. Values reach 2.7, an ulp there is 2.4e-7;
    # the reference rounds a difference and a quotient.
    assert ulps(got, reference.patchify(clip, **cut)) <= 1
    assert (got - exact).abs().max() < 4.8e-7
    half = patchify(clip, torch.float16, **cut, backend="triton")
    assert torch.equal(half, reference.patchify(clip, torch.float16, **cut))
    # It also truncates to bfloat16
    brief = patchify(clip, torch.bfloat16, **cut, backend="triton")
    assert ulps(brief, reference.patchify(clip, torch.bfloat16, **cut)) <= 1


@FORMATS
def test_the_kernels_arithmetic_gives_the_references_bits_for_every_byte(
    cut: dict[str, Any], interpreted: None
) -> None:
    """With true fused multiply-adds, made here in float64: products of two float32 are exact there."""
    from vcr1_kernels.device import patchify as device

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a.double() * b.double() + c.double()).float()

    mean, std, inv_std, shift = torch.tensor(device.scales(cut["mean"], cut["std"])).view(3, 4).T
    byte = torch.arange(256.0)[:, None].expand(256, 3)
    distance = byte - mean
    quotient = distance * inv_std
    exact = fma(fma(-quotient, std.expand(256, 3), distance), inv_std.expand(256, 3), quotient)
    side = 2 * cut["patch_px"]
    frames = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, side, side, 3)
    values = reference.patchify(frames.repeat_interleave(2, 0), **cut)[::4].view(256, 3, -1)[:, :, 0]
    assert torch.equal(values, (byte - torch.tensor(cut["mean"]) * 255) / (torch.tensor(cut["std"]) * 255))
    assert torch.equal(exact, values)
    for dtype in HALF:
        assert torch.equal(fma(byte, inv_std, shift).to(dtype), values.to(dtype))


@pytest.mark.parametrize(
    "view",
    [
        lambda clip: clip[::2],
        lambda clip: clip[1:, :, 4:32],
        lambda clip: clip[:, 3:31, 8:64],
        lambda clip: clip[:, :28, 1:29],  # rows start at 3 bytes: copied
        lambda clip: channels_first(clip)[:, :28],  # copied
        lambda clip: clip.transpose(1, 2),
        lambda clip: clip[:1].expand(4, -1, -1, -1)[:, :28, :28],
    ],
)
def test_strided_clips_are_read_as_they_are_or_copied(view, interpreted: None) -> None:
    clip = view(random_clip(4, 56, 84))[:, :56, :56]
    got = patchify(clip, torch.float16, backend="triton")
    assert torch.equal(got, reference.patchify(clip, torch.float16))


def test_only_unreadable_strides_are_copied() -> None:
    from vcr1_kernels.patchify import _is_readable

    clip = random_clip(4, 56, 84)
    readable = (clip, clip[::3], clip[:, 2:30], clip[:, :, 4:60], clip[2:, 7:35, 28:56])
    unreadable = (clip[:, :, 1:29], channels_first(clip), clip.transpose(1, 2), clip[:, ::2, 2:58])
    assert all(_is_readable(view, 14) for view in readable)
    assert not any(_is_readable(view, 14) for view in unreadable)


def test_frames_beyond_2_to_31_bytes_are_found(interpreted: None) -> None:
    """Only the pages of three small frames are touched; an int32 offset would read far before the clip."""
    storage = torch.empty(2**31 + 2352, dtype=torch.uint8)
    clip = storage.as_strided((3, 28, 28, 3), (2**30, 84, 3, 1))
    frames = random_clip(3, 28, 28)
    clip.copy_(frames)
    got = patchify(clip, torch.float16, backend="triton")
    assert torch.equal(got, reference.patchify(frames, torch.float16))


def test_every_value_is_written_and_nothing_else(interpreted: None) -> None:
    from vcr1_kernels.device.patchify import LAUNCH, patchify_kernel, scales

    clip = random_clip(3, 56, 84)
    buffer = torch.full((4 + 48 + 4, 1176), float("nan"))
    programs = 2 * 2 * 3  # frame pairs, bands, programs of a band: 3 blocks are 2352 pairs
    constants: Any = {"PATCH": 14, "SCALES": scales(reference.CLIP_MEAN, reference.CLIP_STD), **LAUNCH}
    patchify_kernel[(programs,)](clip, buffer[4:], clip.stride(0), clip.stride(1), 3, 2, 3, **constants)
    assert buffer[:4].isnan().all() and buffer[-4:].isnan().all()
    assert not buffer[4:-4].isnan().any()


def test_empty_width_gives_no_patches(interpreted: None) -> None:
    clip = torch.zeros((2, 28, 0, 3), dtype=torch.uint8)
    assert patchify(clip, backend="triton").shape == (0, 1176)


@pytest.mark.parametrize("triton", [False, True])
def test_operator_is_registered_well(triton: bool, request: pytest.FixtureRequest) -> None:
    if triton:
        request.getfixturevalue("interpreted")
    scale = (list(reference.CLIP_MEAN), list(reference.CLIP_STD))
    torch.library.opcheck(_patchify, (random_clip(3, 28, 56), torch.float16, 14, *scale, triton))


def test_compiles_as_one_graph() -> None:
    clip = random_clip(2, 28, 28)
    compiled = torch.compile(lambda x: patchify(x) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(clip), patchify(clip) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@FORMATS
@pytest.mark.parametrize("shape", [(2, 1, 1), (5, 2, 1), (3, 1, 5), (16, 14, 14), (128, 16, 24)])  # in blocks
def test_gpu_kernel_gives_the_references_bits(
    shape: tuple[int, int, int], cut: dict[str, Any], dtype: torch.dtype
) -> None:
    clip = random_clip(shape[0], *(2 * cut["patch_px"] * side for side in shape[1:]), device="cuda")
    assert torch.equal(patchify(clip, dtype, **cut), reference.patchify(clip, dtype, **cut))


@pytest.mark.gpu
def test_gpu_strided_clips() -> None:
    clip = random_clip(8, 84, 112, device="cuda")
    for view in (
        clip[::2],
        clip[:, 5:33, 4:60],
        clip[:, :28, 1:29],
        clip.flip(3)[:, :56],
        clip.transpose(1, 2)[:, :84],
    ):
        assert torch.equal(patchify(view), reference.patchify(view, torch.bfloat16))


@pytest.mark.gpu
def test_gpu_more_than_2_to_31_values() -> None:
    """2464 frames of 448 x 672 give 2.2e9 values; the last pair is compared."""
    clip = torch.zeros((2464, 448, 672, 3), dtype=torch.uint8, device="cuda")
    clip[-2:] = random_clip(2, 448, 672, device="cuda")
    patches = patchify(clip)
    assert patches.numel() > 2**31
    per_pair = 32 * 48
    assert torch.equal(patches[-per_pair:], reference.patchify(clip[-2:], torch.bfloat16))
    assert torch.equal(patches[:per_pair], reference.patchify(clip[:2], torch.bfloat16))
