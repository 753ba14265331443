"""What is made of one prompt for SGLang, and what is refused before it gets there. Needs no SGLang."""

import pytest
import torch

from vcr1_fast.rollout.sgl.video import (
    check_request,
    completion_tensors,
    features_by_kind,
    item_hash,
    media_item,
    requests_of,
    sampling_params,
)

LIMITS = {
    **{"vocabulary_size": 100, "video_token_id": 7, "image_token_id": 8, "patch_values": 1176, "feature_width": 12},
    **{"context_length": 64, "num_cache_tokens": 48},
}


def medium(kind: str, *grid_thw: int) -> dict:
    return {"kind": kind, "grid_thw": list(grid_thw), "second_per_grid_s": 0.5}


def request(**changes):
    fields = {
        "begun_lengths": [0, 0],
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "stop_ids": [2, 0],
        "suppressed_ids": [3, 7],
        "media": [medium("video", 2, 4, 4)],
    }
    tensors = {
        "token_ids_L": torch.tensor([1, *[7] * 8, 2]),
        "position_ids_3L": torch.arange(10).expand(3, -1),
        "values_PC": torch.zeros(32, 1176),
        "begun_ids": torch.zeros(0, dtype=torch.int64),
    }
    for name, value in changes.items():
        (tensors if isinstance(value, torch.Tensor) else fields)[name] = value
    return fields, tensors


def test_a_good_request_passes():
    check_request(*request(), LIMITS)
    check_request(*request(embeddings_MD=torch.zeros(8, 12), values_PC=torch.zeros(0, 1176)), LIMITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids_L": torch.tensor([1, *[7] * 8, 100])}, "from 1 to 100"),
        ({"token_ids_L": torch.tensor([-1, *[7] * 8, 2])}, "from -1 to 7"),
        ({"token_ids_L": torch.zeros(0, dtype=torch.int64)}, "not empty"),
        ({"token_ids_L": torch.tensor([1, *[7] * 7, 2, 2])}, r"1 places, .*'video', 7.*, wanted 1, .*'video', 8"),
        ({"token_ids_L": torch.tensor([1, *[8] * 8, 2])}, r"1 places, .*'image', 8.*, wanted 1, .*'video', 8"),
        ({"token_ids_L": torch.tensor([1, *[7] * 8, 8])}, "stand in 2 places"),
        ({"media": []}, "stand in 1 places, .*, wanted 0"),
        ({"stop_ids": [200]}, "from 3 to 200"),
        ({"position_ids_3L": torch.arange(9).expand(3, -1)}, "positions are"),
        ({"position_ids_3L": torch.arange(10).expand(3, -1) - 1}, "a position is -1"),
        ({"begun_lengths": []}, "at least one"),
        ({"begun_lengths": [0, 8]}, r"of \[0, 8\] tokens may get up to 8"),
        ({"begun_ids": torch.tensor([5, 100])}, "a begun answer has ids from 5 to 100"),
        ({"max_new_tokens": 0}, "at least one"),
        ({"max_new_tokens": 39}, "room for 48"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, wanted > 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1}, "top_k is 1, wanted 0"),
        ({"media": [medium("video", 2, 4, 8)]}, "patches are"),
        ({"media": [medium("video", 2, 16, 1)]}, "wanted one of"),
        ({"media": [medium("image", 2, 4, 4)]}, "wanted one of"),
        ({"media": [medium("sound", 2, 4, 4)]}, "wanted one of"),
        ({"values_PC": torch.zeros(32, 1175)}, "patches are"),
        ({"values_PC": torch.full((32, 1176), torch.nan)}, "not all finite"),
        ({"embeddings_MD": torch.zeros(8, 13)}, "embeddings are"),
        ({"embeddings_MD": torch.zeros(32, 12)}, "embeddings are"),
    ],
)
def test_a_request_that_would_do_harm_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        check_request(*request(**change), LIMITS)


def test_top_k_is_sglangs_own_number_for_all_where_it_is_off():
    assert sampling_params(request()[0])["top_k"] == -1
    assert sampling_params(request(top_k=50)[0])["top_k"] == 50


def test_each_frame_pair_is_a_row_and_positions_are_ours():
    fields, tensors = request()
    positions = torch.arange(10).expand(3, -1).clone()
    positions[0, 9] = 20
    tensors["position_ids_3L"] = positions
    [(kind, features)] = features_by_kind(fields["media"], tensors).items()
    assert kind == "video" and features is tensors["values_PC"]
    [asked] = requests_of(fields, tensors, {kind: features})
    [item] = asked["video_data"]
    assert item["video_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert item["mrope_position_delta"].tolist() == [[11]]  # 20 + 1 - 10
    assert torch.equal(item["mrope_positions"], positions)


def test_rows_of_several_media_are_parted_by_kind():
    """A picture between two videos, of which one has its frame pairs in places of their own."""
    media = [medium("video", 2, 2, 4), medium("image", 1, 4, 2), medium("video", 1, 2, 2)]
    ids = [1, *[7] * 2, 5, *[7] * 2, 6, *[8] * 2, 5, 7, 2]
    positions = torch.arange(len(ids)).expand(3, -1)
    rows = torch.arange(28.0).unsqueeze(1).expand(-1, 1176)
    fields, tensors = request(media=media, token_ids_L=torch.tensor(ids), position_ids_3L=positions, values_PC=rows)
    check_request(fields, tensors, LIMITS)
    by_kind = features_by_kind(media, tensors)
    assert by_kind["video"][:, 0].tolist() == [*range(16), *range(24, 28)]
    assert by_kind["image"][:, 0].tolist() == [*range(16, 24)]
    items = {kind: media_item(kind, fields, tensors, features) for kind, features in by_kind.items()}
    assert items["video"]["video_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 4], [1, 2, 2]]
    assert items["image"]["image_grid_thw"].tolist() == [[1, 4, 2]] and "pixel_values" in items["image"]
    embedded = {name: value for name, value in tensors.items() if name != "values_PC"}
    embedded["embeddings_MD"] = torch.arange(7.0).unsqueeze(1).expand(-1, 12)
    check_request(fields, embedded, LIMITS)
    by_kind = features_by_kind(media, embedded)
    assert {kind: rows[:, 0].tolist() for kind, rows in by_kind.items()} == {"image": [4, 5], "video": [0, 1, 2, 3, 6]}
    item = media_item("image", fields, embedded, by_kind["image"])
    assert item["modality"] == "IMAGE" and item["precomputed_embeddings"] is by_kind["image"]
    for other in (media[::-1], media[:2], [*media, medium("image", 1, 2, 2)]):
        patches = torch.zeros(sum(m["grid_thw"][0] * m["grid_thw"][1] * m["grid_thw"][2] for m in other), 1176)
        with pytest.raises(ValueError, match="stand in 4 places"):
            check_request({**fields, "media": other}, {**tensors, "values_PC": patches}, LIMITS)


def test_text_alone_has_no_media_and_the_positions_that_sglang_counts():
    changes = {"token_ids_L": torch.tensor([1, 5, 6, 2]), "position_ids_3L": torch.arange(4).expand(3, -1)}
    fields, tensors = request(media=[], **changes)
    del tensors["values_PC"]
    check_request(fields, tensors, LIMITS)
    assert features_by_kind([], tensors) == {}
    with pytest.raises(ValueError, match="of text alone has other positions"):
        check_request(fields, {**tensors, "position_ids_3L": torch.arange(1, 5).expand(3, -1)}, LIMITS)
    with pytest.raises(ValueError, match=r"stand in 1 places, .* wanted 0"):
        check_request(fields, {**tensors, "token_ids_L": torch.tensor([1, 7, 6, 2])}, LIMITS)


def test_video_tokens_stand_in_one_place_or_one_for_each_pair_of_frames():
    apart = [1, *[7] * 4, 5, 6, *[7] * 4, 2]
    check_request(*request(token_ids_L=torch.tensor(apart), position_ids_3L=torch.arange(12).expand(3, -1)), LIMITS)
    for broken in ([1, *[7] * 5, 5, 6, *[7] * 3, 2], [1, *[7] * 2, 5, *[7] * 2, 6, *[7] * 4]):
        ids = torch.tensor(broken)
        positions = torch.arange(len(broken)).expand(3, -1)
        with pytest.raises(ValueError, match=r"stand in \d places, .*, wanted 1, .*'video', 8.* for each pair"):
            check_request(*request(token_ids_L=ids, position_ids_3L=positions), LIMITS)


def test_the_hash_knows_pixels_grid_and_seconds():
    values = torch.arange(32 * 1176, dtype=torch.float32).view(32, 1176)
    changed = values.clone()
    changed[31, 1175] += 1
    two, one = [medium("video", 2, 4, 4)], [medium("video", 1, 8, 4)]
    slow = [{**two[0], "second_per_grid_s": 1.0}]  # its tokens have other positions
    hashes = {item_hash(values, two), item_hash(values, one), item_hash(changed, two), item_hash(values, slow)}
    assert len(hashes) == 4
    assert item_hash(values.clone(), [medium("video", 2, 4, 4)]) in hashes
    assert all(0 <= value < 2**63 for value in hashes)


def test_an_answer_becomes_tensors():
    token_R, logprob_R = completion_tensors({"output_token_logprobs": [[-1.0, 5, None], [-2.0, 2, None]]})
    assert token_R.tolist() == [5, 2] and logprob_R.tolist() == [-1.0, -2.0]
    token_R, logprob_R = completion_tensors({"output_token_logprobs": []})
    assert token_R.dtype == torch.int64 and token_R.numel() == logprob_R.numel() == 0
