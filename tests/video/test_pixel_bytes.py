"""Pixels sent as bytes: the same patches bit for bit, or no bytes at all."""

import pytest
import torch
from vcr1_kernels import patchify
from vcr1_kernels.reference import patchify as reference_patchify

from vcr1_fast.video.formats import QWEN2_5_VL, QWEN3_VL
from vcr1_fast.video.pixel_bytes import pack, unpack

SAME_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def frames_of_all_bytes(height: int = 28) -> torch.Tensor:
    """Each byte in each channel, in different places."""
    ramp = torch.arange(2 * height**2) % 256
    return torch.stack([ramp, (ramp + 85) % 256, 255 - ramp], dim=-1).view(1, height, -1, 3).to(torch.uint8)


@pytest.mark.parametrize("dtype", list(SAME_BITS))
@pytest.mark.parametrize("make", [patchify, reference_patchify])
@pytest.mark.parametrize("video", [QWEN2_5_VL, QWEN3_VL])
def test_every_byte_of_every_channel_comes_back_bit_for_bit(dtype, make, video):
    frames = frames_of_all_bytes(video.factor_px)
    values_PC = make(frames, dtype, patch_px=video.patch_px, mean=video.mean, std=video.std)
    packed = pack({"values_PC": values_PC, "token_ids_L": torch.arange(3)})
    assert set(packed) == {"bytes_PC", "levels_C256", "token_ids_L"}
    assert packed["bytes_PC"].dtype == torch.uint8
    got = unpack(packed)
    assert set(got) == {"values_PC", "token_ids_L"} and got["values_PC"].dtype == dtype
    assert torch.equal(got["values_PC"].view(SAME_BITS[dtype]), values_PC.view(SAME_BITS[dtype]))
    for channel in range(3):  # the frames do hold them all
        assert len(values_PC.unflatten(1, (3, -1))[:, channel].unique()) >= (256 if dtype == torch.float32 else 150)


@pytest.mark.parametrize("change", [1e-7, float("nan"), 100.0, -100.0])
def test_values_that_are_no_bytes_are_sent_as_they_are(change):
    values_PC = patchify(frames_of_all_bytes(), torch.float32)
    values_PC[3, 700] += change
    packed = pack({"values_PC": values_PC})
    assert packed["values_PC"] is values_PC


def test_what_has_no_pixels_stays_as_it_is():
    embedded = {"embeddings_MD": torch.zeros(2, 4), "values_PC": torch.zeros(0, 1176)}
    assert pack(embedded) == embedded
    assert unpack({"embeddings_MD": embedded["embeddings_MD"]}) == {"embeddings_MD": embedded["embeddings_MD"]}
