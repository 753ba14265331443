"""Answers that are cut short for new weights and gone on with: the requests, and a scripted worker that holds back."""

from __future__ import annotations

import threading
import time

import torch

from vcr1_fast.rollout.engine import NOT_BEGUN, Quota
from vcr1_fast.rollout.sgl.video import features_by_kind, requests_of
from vcr1_fast.rollout.sglang_engine import open_requests
from vcr1_fast.types import Completion, SamplingParams

SAMPLING = SamplingParams(3, 4)


def completion(num_tokens: int, reason: str) -> Completion:
    ids = torch.arange(10, 10 + num_tokens)
    return Completion(ids, torch.full((num_tokens,), -0.25), reason)  # pyright: ignore[reportArgumentType]


def test_what_is_unfinished_of_a_prompt_is_asked_together(make_prompt):
    prompts = [make_prompt((1, 2, 2), text) for text in ("a", "b", "c")]
    answers = [
        [NOT_BEGUN, completion(2, "aborted"), NOT_BEGUN],
        [completion(2, "stop"), completion(4, "length"), completion(1, "stop")],
        [NOT_BEGUN] * 3,
    ]
    requests = open_requests(prompts, answers)
    assert [(r.index, r.prompt, r.begun) for r in requests] == [
        (0, prompts[0], answers[0]),
        (2, prompts[2], answers[2]),
    ]


def test_begun_completions_are_sent_behind_their_prompt(start, make_prompt):
    """Their tokens take the positions after the prompt's, the same on all three axes, and count against the limit. The
    first request draws nothing: it has the prompt read once for all."""
    engine, prompt = start(["ok"]), make_prompt((2, 4, 4), "what?")
    [asked] = open_requests([prompt], [[completion(3, "aborted"), NOT_BEGUN]])
    fields, tensors = engine._request(7, asked, SAMPLING)
    first, *rest = requests_of(fields, tensors, features_by_kind(fields["media"], tensors))
    ids, next_position = prompt.token_ids_L.tolist(), int(prompt.position_ids_3L.max()) + 1
    assert [r["input_ids"] for r in (first, *rest)] == [ids, [*ids, 10, 11, 12], ids]
    assert [r["sampling_params"]["max_new_tokens"] for r in (first, *rest)] == [0, 1, 4]
    [item] = rest[0]["video_data"]
    positions_3L = item["mrope_positions"]
    assert torch.equal(positions_3L[:, : len(ids)], prompt.position_ids_3L)
    assert positions_3L[:, len(ids) :].tolist() == [[next_position, next_position + 1, next_position + 2]] * 3
    assert torch.equal(rest[1]["video_data"][0]["mrope_positions"], prompt.position_ids_3L)
    assert len({r["video_data"][0]["hash"] for r in (first, *rest)}) == 1


def test_an_interrupted_call_is_gone_on_with_by_the_new_weights(start, make_prompt):
    engine = start(["hold"], max_inflight=2)
    prompts = [make_prompt((1, 2, 2), f"{letter} is here") for letter in "abc"]
    got: list[list[list[Completion]]] = []
    thread = threading.Thread(target=lambda: got.append(engine.generate(prompts, SAMPLING)))
    thread.start()
    deadline = time.monotonic() + 10
    while not engine._workers.seats[0].requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # the worker takes two requests and not the third
    engine.interrupt()
    thread.join(10)
    [begun] = got
    assert [[(c.num_tokens, c.finish_reason) for c in group] for group in begun] == [
        [(2, "stop"), (1, "aborted"), (1, "aborted")],
        [(2, "stop"), (1, "aborted"), (1, "aborted")],
        [(0, "aborted")] * 3,
    ]
    engine.load_weights([("model.visual.w", torch.zeros(300, 300))], 2)
    whole = engine.generate(prompts, SAMPLING, begun)
    assert [[(c.num_tokens, c.finish_reason) for c in group] for group in whole] == [
        [(2, "stop"), (3, "stop"), (3, "stop")],
        [(2, "stop"), (3, "stop"), (3, "stop")],
        [(2, "stop")] * 3,
    ]
    first = [int(p.token_ids_L[0]) for p in prompts]
    for group, before, token in zip(whole, begun, first, strict=True):
        for row, part in zip(group, before, strict=True):
            assert row.token_ids_R[: part.num_tokens].tolist() == part.token_ids_R.tolist()
            assert row.logprobs_R[: part.num_tokens].tolist() == part.logprobs_R.tolist()
            assert int(row.token_ids_R[-2]) == token
    assert torch.equal(whole[0][0].token_ids_R, begun[0][0].token_ids_R)  # what was finished is not asked again


def test_what_is_done_already_may_be_enough(start, make_prompt):
    engine = start(["hold"])  # would never answer
    begun = [[completion(4, "length")] * 3, [NOT_BEGUN] * 3, [completion(1, "aborted")] * 3]
    prompts = [make_prompt((1, 2, 2), text) for text in "abc"]
    assert engine.generate(prompts, SAMPLING, begun, Quota(1)) == begun


def test_interrupting_what_does_not_run_does_nothing(start, make_prompt):
    engine = start(["ok"])
    engine.interrupt()
    [group] = engine.generate([make_prompt((1, 2, 2), "a")], SAMPLING)
    assert [c.finish_reason for c in group] == ["stop"] * 3
