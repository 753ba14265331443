"""GOT-10k's average overlap and success rates, with numbers computed by hand."""

import pytest

from vcr1_fast.tasks.frame_overlap import inside_picture, success_metrics

WHOLE, LEFT, THIRD = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.25, 1.0)


def test_boxes_are_pooled_over_tracks_and_the_given_one_is_left_out():
    truths = [[WHOLE] * 4, [WHOLE] * 2]
    tracks = [[LEFT, WHOLE, LEFT, THIRD], [WHOLE, LEFT]]
    # overlaps 1, 0.5, 0.25 and 0.5: a mean over tracks would give (1.75 / 3 + 0.5) / 2
    assert success_metrics(tracks, truths) == {"ao": 2.25 / 4, "sr@0.5": 1 / 4, "sr@0.75": 1 / 4}


def test_a_rate_wants_more_than_its_threshold():
    track, truth = [WHOLE, (0.0, 0.0, 0.75, 1.0), LEFT], [WHOLE, WHOLE, WHOLE]
    assert success_metrics([track], [truth]) == {"ao": 1.25 / 2, "sr@0.5": 1 / 2, "sr@0.75": 0.0}


@pytest.mark.parametrize("track", [[], [WHOLE], [WHOLE] * 4])
def test_a_track_of_another_length_misses_every_instant(track):
    assert success_metrics([track], [[WHOLE] * 3]) == {"ao": 0.0, "sr@0.5": 0.0, "sr@0.75": 0.0}
    both = success_metrics([track, [WHOLE] * 3], [[WHOLE] * 3] * 2)
    assert both == {"ao": 0.5, "sr@0.5": 0.5, "sr@0.75": 0.5}
    with pytest.raises(ValueError, match="no examples to score"):
        success_metrics([], [])


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((0.25, 0.25, 0.5, 0.75), (0.25, 0.25, 0.5, 0.75)),
        ((-0.25, 0.0, 0.25, 0.5), (0.0, 0.0, 0.5, 0.5)),  # moved in at its size, not cut off: rect_iou's order
        ((0.75, -0.5, 1.5, 2.0), (0.75, 0.0, 1.0, 1.0)),
        ((1.5, 0.0, 2.0, 0.5), (1.0, 0.0, 1.0, 0.5)),
        ((0.5, 0.5, 0.25, 0.75), (0.5, 0.5, 0.5, 0.75)),  # reversed: of no width
    ],
)
def test_boxes_are_put_inside_the_picture_as_the_toolkit_does(box, inside):
    assert inside_picture(box) == inside
    truth = [WHOLE, (0.0, 0.0, 0.5, 0.5)]
    assert success_metrics([[WHOLE, (-0.25, 0.0, 0.25, 0.5)]], [truth])["ao"] == 1.0
