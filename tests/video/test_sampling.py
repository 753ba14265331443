"""Which frames: numbers by hand, and the index rule of the original for constant rates."""

from fractions import Fraction

import numpy as np
import pytest

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.sampling import choose_frames, even_indices, focus_indices, native_rate


def constant(num_frames: int, fps: Fraction | int) -> np.ndarray:
    return np.arange(num_frames) / float(fps)


def test_eight_seconds_at_30_fps_give_16_frames_at_exactly_2_fps() -> None:
    choice = choose_frames(constant(240, 30), 8.0, VideoConfig())
    # 239 / 15 = 15.9333: 0, 15.93, 31.87, 47.8, 63.7, 79.7, 95.6, 111.5, 127.5, 143.4, 159.3, ...
    assert choice.indices == (0, 16, 32, 48, 64, 80, 96, 112, 127, 143, 159, 175, 191, 207, 223, 239)
    assert choice.sampled_fps == 2.0


def test_ntsc_rate_is_recovered_exactly() -> None:
    fps = Fraction(30000, 1001)
    choice = choose_frames(constant(300, fps), 10.01, VideoConfig())
    # 300 frames last 10.01 s, 20.02 frames at 2 fps, hence 20 of 300
    assert len(choice.indices) == 20
    assert choice.sampled_fps == float(Fraction(20, 300) * fps)


def test_milliseconds_of_matroska_do_not_change_the_choice() -> None:
    exact = constant(192, 24)
    # 191 / 24 = 7.9583 is stored as 7.958; taken literally that is 7.99966 s, 15.9993 frames, hence 14 instead of 16
    assert choose_frames(np.round(exact, 3), 8.0, VideoConfig()) == choose_frames(exact, 8.0, VideoConfig())
    assert choose_frames(np.round(exact, 3), 8.0, VideoConfig()).sampled_fps == 2.0


@pytest.mark.parametrize(
    ("num_native", "num_wanted"),
    [(2, 2), (3, 2), (4, 4), (5, 4), (29, 4), (60, 4), (90, 6), (119, 6), (120, 8), (23040, 768)],
)
def test_frame_count_is_even_and_held_between_limits(num_native: int, num_wanted: int) -> None:
    choice = choose_frames(constant(num_native, 30), num_native / 30, VideoConfig())
    assert len(choice.indices) == num_wanted
    assert choice.sampled_fps == pytest.approx(num_wanted / num_native * 30, rel=1e-12)
    assert choice.indices[0] == 0 and choice.indices[-1] == num_native - 1


def test_fps_means_the_decimal_number() -> None:
    # 20 s at 0.3 fps are 6 frames; the binary number next to 0.3 is 1e-17 less, which would round down to 4
    assert len(choose_frames(constant(600, 30), 20.0, VideoConfig(fps=0.3)).indices) == 6


def test_one_frame_is_shown_twice() -> None:
    choice = choose_frames(np.zeros(1), 0.04, VideoConfig())
    assert choice.indices == (0, 0)
    assert choice.sampled_fps == pytest.approx(50.0)  # 2 frames for 0.04 s
    assert choose_frames(np.zeros(1), 0.0, VideoConfig(fps=3.0)).sampled_fps == 3.0


def test_indices_equal_the_original_rule() -> None:
    for num_native in (7, 90, 241, 1000):
        for num_frames in range(2, min(num_native, 64) + 1, 2):
            exact = np.linspace(0, num_native - 1, num_frames)
            no_tie = np.abs(exact % 1 - 0.5) > 1e-9
            got = np.array(even_indices(num_native, num_frames))
            assert (got == np.rint(exact))[no_tie].all()
            assert (got[~no_tie] % 2 == 0).all()


def test_variable_rate_is_sampled_in_time() -> None:
    # 10 s at 1 fps, then 100 frames within 1 s: the index rule would take nearly all frames from the last second
    times_s = np.concatenate([np.arange(10.0), 10.0 + np.arange(101) / 100])
    choice = choose_frames(times_s, 11.01, VideoConfig(fps=1.0))
    shown = times_s[list(choice.indices)]
    # D = 11 * 111 / 110 = 11.1 s, 11.1 frames, 10 when even; 11 / 9 = 1.2222 s apart
    assert len(choice.indices) == 10
    # nearest of 0, 1.22, 2.44, 3.67, 4.89, 6.11, 7.33, 8.56, 9.78, 11 s
    assert shown.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert choice.indices[-1] == 110
    assert choice.sampled_fps == pytest.approx(10 / 11.1, rel=1e-7)


def test_a_dropped_frame_makes_the_rate_variable() -> None:
    times_s = np.delete(constant(60, 30), 20)
    assert not native_rate(times_s)[1]


def test_frames_lie_closer_together_in_the_evidence() -> None:
    """VideoChat-R1.5's rule: 60 s at 30 fps, evidence 10 to 20 s, 120 frames.

    Frames 300 to 600 are 301 of the 1,799 that it looks at: 120 * 451.5 / (451.5 + 1498) = 27.8, so 28 lie inside,
    300 / 27 = 11.1 apart, and 92 outside, 1,497 / 91 = 16.45 apart.
    """
    choice = choose_frames(constant(1800, 30), 60.0, VideoConfig(), [(10.0, 20.0)])
    inside = [i for i in choice.indices if 300 <= i <= 600]
    assert (len(choice.indices), len(inside)) == (120, 28)
    assert inside[:4] == [300, 311, 322, 333] and inside[-1] == 600
    assert choice.indices[:4] == (0, 16, 32, 49) and choice.indices[-2:] == (1781, 1798)  # the whole clip is seen
    outside = [i for i in choice.indices if i < 300]
    assert len(outside) == 19 and max(np.diff(outside)) == 17
    assert choice.sampled_fps == 2.0  # what equally spaced frames would have: so the model is told


def test_several_periods_share_the_frames_by_their_length() -> None:
    """60 s at 10 fps, 60 frames of the first 599: 3 to 6 s are 31 frames, 40 to 50 s are 101; 132 in all.

    60 * 198 / (198 + 467) = 17.9: 18 inside, of which 18 * 31 / 132 = 4.2 and 18 * 101 / 132 = 13.8.
    """
    evidence = [(40.0, 50.0), (3.0, 6.0)]  # their order does not matter
    choice = choose_frames(constant(600, 10), 60.0, VideoConfig(fps=1.0), evidence)
    assert [i for i in choice.indices if 30 <= i <= 60] == [30, 40, 50, 60]
    assert [i for i in choice.indices if 400 <= i <= 500] == [400 + 100 * i // 13 for i in range(14)]
    assert len(choice.indices) == 60
    assert choice == choose_frames(constant(600, 10), 60.0, VideoConfig(fps=1.0), [*evidence, (41.0, 43.0)])  # within


@pytest.mark.parametrize("evidence", [[], [(60.0, 70.0)], [(400.0, 500.0), (1e300, 1e308)], [(7.0, 3.0)]])
def test_evidence_that_no_frame_shows_changes_nothing(evidence: list[tuple[float, float]]) -> None:
    times_s = constant(1800, 30)
    assert choose_frames(times_s, 60.0, VideoConfig(), evidence) == choose_frames(times_s, 60.0, VideoConfig())


def test_evidence_is_cut_where_the_clip_ends() -> None:
    # 50 s to the end: frames 500 to 598 of 599; 60 * 148.5 / (148.5 + 500) = 13.7
    choice = choose_frames(constant(600, 10), 60.0, VideoConfig(fps=1.0), [(50.0, 1e308)])
    assert [i for i in choice.indices if i >= 500] == [500 + 98 * i // 13 for i in range(14)]


def test_short_clips_and_instants_have_as_many_frames_as_there_are() -> None:
    # 8 frames, 7 of which it looks at: 8 * 4.5 / 8.5 = 4.2, so 4 of frames 2 to 4, which has 3; all of the 4 others.
    # 7 frames are made even with the last one
    eight = choose_frames(constant(8, 1), 8.0, VideoConfig(), [(2.0, 4.0)])
    assert eight.indices == (0, 1, 2, 3, 4, 5, 6, 6)
    assert choose_frames(constant(2, 1), 2.0, VideoConfig(), [(0.0, 2.0)]).indices == (0, 0)
    assert choose_frames(np.zeros(1), 1.0, VideoConfig(), [(0.0, 1.0)]).indices == (0, 0)
    # an instant is one frame: 4 * 1.5 / 29.5 = 0.2 of 4 frames rounds to none, and it has one all the same; of the 28
    # others 4 are 27 / 3 apart, and an even count is made with the last one
    assert focus_indices([(9.0, 9.0)], 30, 4, 1) == (0, 9, 10, 19, 28, 28)
    instant = choose_frames(constant(30, 1), 30.0, VideoConfig(max_frames=4), [(9.0, 9.0)])
    assert instant.indices == (0, 10, 19, 28)  # places 0, 5/3, 10/3, 5 of these: max_frames holds


def test_evidence_in_a_file_of_variable_rate_is_found_by_its_time() -> None:
    # 10 s at 1 fps, then 100 frames within 1 s; of 10 frames on a grid of 111 in 11 s, those of 2 to 4 s are closer
    times_s = np.concatenate([np.arange(10.0), 10.0 + np.arange(101) / 100])
    even = choose_frames(times_s, 11.01, VideoConfig(fps=1.0))
    focused = choose_frames(times_s, 11.01, VideoConfig(fps=1.0), [(2.0, 4.0)])
    assert sum(2 <= times_s[i] <= 4 for i in even.indices) == 2
    assert sum(2 <= times_s[i] <= 4 for i in focused.indices) == 3
    assert times_s[focused.indices[-1]] == pytest.approx(10.9) and focused.sampled_fps == even.sampled_fps
