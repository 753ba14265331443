"""M-RoPE positions against numbers worked out by hand, a token-by-token reading of the rule, and transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from vcr1_fast.prompts.positions import mrope_positions

PAD = 9  # the placeholder id of these tests


def row(*parts: int) -> Tensor:
    """Positive numbers are runs of text tokens, negative ones runs of placeholders."""
    return torch.tensor([PAD if n < 0 else 1 for n in parts for _ in range(abs(n))])


def test_one_second_grid_by_hand() -> None:
    # 3 text, video of 3 x (2 x 2) tokens at 2 ids a second, 2 text. Start 3; times 3, 5, 7; text goes on at 7 + 1.
    positions_3L = mrope_positions(row(3, -12, 2), [(3, 4, 4)], [1.0], PAD, 2)
    assert positions_3L.dtype == torch.int64
    assert positions_3L.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 8, 9],
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 3, 3, 4, 4, 8, 9],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 3, 4, 3, 4, 8, 9],
    ]


@pytest.mark.parametrize(
    ("second_per_grid_s", "times"),
    [
        (0.5, [0, 1, 2, 3, 4, 5]),  # 4 fps
        (1.0, [0, 2, 4, 6, 8, 10]),  # 2 fps, the original's rate
        (2.5, [0, 5, 10, 15, 20, 25]),
        (0.7, [0, 1, 2, 4, 5, 7]),  # 0, 1.4, 2.8, 4.2, 5.6, 7.0, each cut
    ],
)
def test_time_axis_by_hand(second_per_grid_s: float, times: list[int]) -> None:
    positions_3L = mrope_positions(row(1, -6, 1), [(6, 2, 2)], [second_per_grid_s], PAD, 2)
    assert positions_3L[0].tolist() == [0, *[1 + t for t in times], 1 + times[-1] + 1]
    assert positions_3L[1].tolist() == [0, 1, 1, 1, 1, 1, 1, 1 + times[-1] + 1]


def test_the_text_behind_each_of_two_videos_by_hand() -> None:
    # At token 1: times 0 and 1.5 * 2 = 3; text goes on at 1 + 3 + 1. The second video stands at 6, what is left at 7.
    positions_3L = mrope_positions(row(1, -2, 1, -1, 1), [(2, 2, 2), (1, 2, 2)], [1.5, 1.0], PAD, 2)
    assert positions_3L.tolist() == [[0, 1, 4, 5, 6, 7], [0, 1, 1, 5, 6, 7], [0, 1, 1, 5, 6, 7]]


def test_text_goes_on_after_the_widest_axis() -> None:
    # Time 0 only, 2 rows, 5 columns: the largest position is 1 + 4.
    assert mrope_positions(row(1, -10, 1), [(1, 4, 10)], [1.0], PAD, 2)[:, -1].tolist() == [6, 6, 6]


def test_a_prompt_may_end_or_start_with_a_video_or_have_none() -> None:
    assert mrope_positions(row(-1), [(1, 2, 2)], [1.0], PAD, 2).tolist() == [[0]] * 3
    assert mrope_positions(row(4), [], [], PAD, 2).tolist() == [[0, 1, 2, 3]] * 3


PICTURE = 8  # the placeholder id of images
SHOWN = {  # runs as in `row`, images as their number of tokens and a half; then grids of images, and of videos
    "text": ([7], [], []),
    "images": ([3, 6.5, 2, 4.5, 1], [(1, 4, 6), (1, 4, 4)], []),
    "image beside a video": ([3, 6.5, 2, -48, 1], [(1, 4, 6)], [(3, 8, 8)]),
    "two videos": ([2, -100, 3, -180, 4], [], [(4, 10, 10), (5, 12, 12)]),
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("runs", "images", "videos"), SHOWN.values(), ids=SHOWN.keys())
def test_what_is_shown_stands_as_in_transformers(
    family: str, runs: list[float], images: list[tuple[int, int, int]], videos: list[tuple[int, int, int]]
) -> None:
    """Its own rules, which agree with the original's where no time goes further than rows and columns do: at 2 fps the
    last pair of 5 is at 8 x 0.5 = 4 of 6 rows. Qwen3-VL's splits a video into its pairs, two words of time before each.
    """
    is_timed = family == "qwen3_vl"
    if videos and not is_timed and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("the rule of transformers before 5.19 is another one")
    model = (Qwen3VLModel if is_timed else Qwen2_5_VLModel).__new__(Qwen3VLModel if is_timed else Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)  # its rule needs no weights
    model.config = Qwen3VLConfig() if is_timed else Qwen2_5_VLConfig(vision_config={"tokens_per_second": 2})
    of_video, ids, grids, seconds = iter(videos), [], [], []
    of_image = iter(images)
    for run in runs:
        if run < 0:
            t, h, w = next(of_video)
            pairs = [(1, h, w)] * t if is_timed else [(t, h, w)]
            ids += [token for pair in pairs for token in [1, 1] * is_timed + [PAD] * (pair[0] * h * w // 4)]
        elif run % 1:
            pairs = [next(of_image)]
            ids += [PICTURE] * int(run)
        else:
            pairs = []
            ids += [1] * int(run)
        grids += pairs
        seconds += [0.0 if run > 0 else 0.5] * len(pairs)
    ids_L = torch.tensor(ids)
    more = {"second_per_grid_ts": torch.tensor([0.5] * len(videos))} if videos and not is_timed else {}
    theirs, _ = model.get_rope_index(
        ids_L[None],
        mm_token_type_ids=((ids_L == PICTURE).int() + 2 * (ids_L == PAD).int())[None],
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **more,
    )
    ours = mrope_positions(ids_L, grids, seconds, PAD, 2, image_pad_id=PICTURE)
    assert torch.equal(ours, theirs[:, 0])
