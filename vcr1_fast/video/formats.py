"""What the models of each family are shown of a video, and how they are told its time. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_PER_PATCH = 2
PATCHES_PER_TOKEN = 4  # 2 x 2 of them merge into one video token
Channels = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """What the models of a family are shown of a video, as in the preprocessor_config.json of the published ones."""

    patch_px: int  # side of a patch
    mean: Channels  # of red, green, blue in [0, 1]: what is taken off
    std: Channels  # and what is divided by
    reads_times: bool  # knows the time of frames only from words before each pair, not from positions

    @property
    def factor_px(self) -> int:
        """Side of a video token: frames are multiples of it."""
        return 2 * self.patch_px

    @property
    def patch_values(self) -> int:
        """C: channels x frames x rows x columns of one patch."""
        return 3 * FRAMES_PER_PATCH * self.patch_px**2


QWEN2_5_VL = VideoFormat(
    14, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), reads_times=False
)
QWEN3_VL = VideoFormat(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), reads_times=True)
FORMATS = {"qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}
