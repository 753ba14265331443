"""What is made of one prompt for SGLang, and what is refused before it gets there. Needs no SGLang."""

import pytest
import torch

from vcr1_fast.rollout.sgl.video import (
    SUPPRESSED_NATS,
    check_request,
    completion_tensors,
    item_hash,
    sampling_params,
    video_item,
    whole_vocabulary,
)

LIMITS = {"vocabulary_size": 100, "video_token_id": 7, "hidden_size": 12, "context_length": 64, "num_cache_tokens": 48}


def request(**changes):
    fields = {
        "num_completions": 2,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "stop_ids": [2, 0],
        "suppressed_ids": [3, 7],
        "grid_thw": [2, 4, 4],
        "second_per_grid_s": 0.5,
    }
    tensors = {
        "token_ids_L": torch.tensor([1, *[7] * 8, 2]),
        "position_ids_3L": torch.arange(10).expand(3, -1),
        "values_PC": torch.zeros(32, 1176),
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
        ({"token_ids_L": torch.tensor([1, *[7] * 7, 2, 2])}, "7 video placeholders"),
        ({"stop_ids": [200]}, "from 3 to 200"),
        ({"position_ids_3L": torch.arange(9).expand(3, -1)}, "positions are"),
        ({"position_ids_3L": torch.arange(10).expand(3, -1) - 1}, "a position is -1"),
        ({"num_completions": 0}, "at least one"),
        ({"max_new_tokens": 0}, "at least one"),
        ({"max_new_tokens": 39}, "room for 48"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, wanted > 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1}, "top_k is 1, wanted 0"),
        ({"grid_thw": [2, 4, 8]}, "patches are"),
        ({"grid_thw": [2, 16, 1]}, "patches are"),
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
    item = video_item(fields, tensors | {"position_ids_3L": positions})
    assert item["video_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert item["second_per_grid_ts"].tolist() == [0.5, 0.5]
    assert item["mrope_position_delta"].tolist() == [[11]]  # 20 + 1 - 10
    assert item["mrope_positions"] is positions


def test_video_tokens_stand_in_one_place_or_one_for_each_pair_of_frames():
    apart = [1, *[7] * 4, 5, 6, *[7] * 4, 2]
    check_request(*request(token_ids_L=torch.tensor(apart), position_ids_3L=torch.arange(12).expand(3, -1)), LIMITS)
    for broken in ([1, *[7] * 5, 5, 6, *[7] * 3, 2], [1, *[7] * 2, 5, *[7] * 2, 6, *[7] * 4]):
        ids = torch.tensor(broken)
        positions = torch.arange(len(broken)).expand(3, -1)
        with pytest.raises(ValueError, match=r"stand in \d places, of .* for each of 2 pairs"):
            check_request(*request(token_ids_L=ids, position_ids_3L=positions), LIMITS)


def test_the_hash_knows_pixels_and_grid():
    values = torch.arange(32 * 1176, dtype=torch.float32).view(32, 1176)
    changed = values.clone()
    changed[31, 1175] += 1
    hashes = {item_hash(values, (2, 4, 4)), item_hash(values, (1, 8, 4)), item_hash(changed, (2, 4, 4))}
    assert len(hashes) == 3
    assert item_hash(values.clone(), (2, 4, 4)) in hashes
    assert all(0 <= value < 2**63 for value in hashes)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("raised", [0.0, 12.0])
def test_log_probs_of_all_ids_are_had_back(temperature, raised):
    """SGLang's steps in float32: add the bias, divide, softmax, log. `raised`: the model wants pictures' ids most."""
    ids, suppressed = 606, [3, 4, 7]
    logits = 3 * torch.randn(50, ids, generator=torch.Generator().manual_seed(0))
    logits[:, 7] += raised
    fields, _ = request(temperature=temperature, suppressed_ids=suppressed)
    bias = torch.zeros(ids)
    for name, value in sampling_params(fields)["logit_bias"].items():
        bias[int(name)] = value
    lowered = ((logits + bias) / temperature).softmax(dim=-1).log()
    wanted = (logits.double() / temperature).log_softmax(dim=-1)
    assert lowered[:, suppressed].max() < -SUPPRESSED_NATS + 60 and lowered.isfinite().any()
    drawn = torch.arange(50) + 10
    rows = torch.arange(50)
    got = whole_vocabulary(lowered[rows, drawn].double(), lowered[:, suppressed].double())
    torch.testing.assert_close(got, wanted[rows, drawn], atol=2e-5, rtol=0)


def test_an_answer_becomes_tensors():
    meta = {
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 2, None]],
        "output_token_ids_logprobs": [[[-50.0, 3, None]], [[-51.0, 3, None]]],
    }
    token_R, logprob_R = completion_tensors(meta)
    assert token_R.tolist() == [5, 2]
    # log p = log p' - log(1 + e^(s + 50)): e^0 = 1 and e^-1
    torch.testing.assert_close(logprob_R, torch.tensor([-1.0 - 0.693147, -2.0 - 0.313262]), atol=1e-5, rtol=0)
