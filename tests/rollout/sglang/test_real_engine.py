"""The real SGLang engine against the learner: same tokens, pixels and positions must give the same log-probs."""

import math
from dataclasses import replace

import pytest
import torch

from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.parity import BOUND, difference, disturb, is_among_the_largest, short_and_long
from tests.rollout.timed_prompt import timed_prompt
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.rollout.sgl.weights import checkpoint_weights
from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.types import SamplingParams
from vcr1_fast.video.formats import QWEN3_VL

GROUP_SIZE = 4
VISION = ("video_pad", "vision_start", "vision_end", "vision_pad", "image_pad")
SAMPLINGS = (  # of each update, so that none is like the one before
    SamplingParams(GROUP_SIZE, 8),
    SamplingParams(3, 8, temperature=0.7),
    SamplingParams(1, 8, temperature=1.3, top_p=0.8),
    SamplingParams(8, 8, temperature=0.6),
    SamplingParams(8, 8, top_k=3),
)


def test_random_model_agrees_after_each_update_at_temperatures_top_p_and_group_sizes(
    random_engine, make_tiny_model, make_prompt
):
    plain = short_and_long(make_prompt)
    prompts = [*plain, timed_prompt(random_engine.tokenizer)]
    for update, sampling in enumerate(SAMPLINGS):
        policy = policy_of(make_tiny_model(seed=50 + update))  # nothing of it is kept
        random_engine.load_weights(policy.hf.state_dict().items(), 70 + update)
        assert random_engine.policy_version == 70 + update
        answers = random_engine.generate(prompts, sampling)
        assert [len(group) for group in answers] == [sampling.num_completions] * len(prompts)
        worst, spread = difference(policy, prompts, answers, sampling.temperature)
        assert spread > (0.2 if sampling.top_k else 0.5)  # the likeliest tokens differ less
        assert worst < BOUND
        vision = [random_engine.tokenizer.get_vocab()[f"<|{name}|>"] for name in VISION]
        if sampling.top_k:
            model = make_tiny_model(seed=50 + update)
            assert is_among_the_largest(model, plain, answers[: len(plain)], sampling.top_k, vision)
        assert not set(vision) & {int(i) for group in answers for c in group for i in c.token_ids_R}


def test_a_repetition_penalty_is_transformers_and_counts_the_prompt(random_engine, make_tiny_model, make_prompt):
    """Greedy answers are the local engine's, whose penalty is compared with transformers' own; drawn ones stay among
    the largest logits after it."""
    model = make_tiny_model(seed=61, head_scale=0.05)
    random_engine.load_weights(model.state_dict().items(), 90)
    prompts = [*short_and_long(make_prompt), make_prompt((2, 4, 4), "a a a b b a a a b", 1.0, 4)]
    local = LocalEngine(model, random_engine.tokenizer)
    greedy = SamplingParams(1, 60, temperature=0.0, repetition_penalty=1.3)
    ours, theirs = local.generate(prompts, greedy), random_engine.generate(prompts, greedy)
    free = random_engine.generate(prompts, replace(greedy, repetition_penalty=1.0))
    for [mine], [other], [without] in zip(ours, theirs, free, strict=True):
        assert mine.token_ids_R.tolist() == other.token_ids_R.tolist() != without.token_ids_R.tolist()
        assert other.logprobs_R.isnan().all() and not without.logprobs_R.isnan().any()
    drawn = random_engine.generate(prompts, SamplingParams(3, 30, temperature=0.8, top_k=2, repetition_penalty=1.3))
    vision = [random_engine.tokenizer.get_vocab()[f"<|{name}|>"] for name in VISION]
    assert is_among_the_largest(model, prompts, drawn, 2, vision, penalty=1.3)


def test_one_video_with_several_questions(random_engine, make_tiny_model, make_prompt):
    """SGLang has the first question's video in its caches when the others come; another video of the same size is not
    taken for it."""
    policy = policy_of(make_tiny_model(seed=5))
    random_engine.load_weights(policy.hf.state_dict().items(), 80)
    tokenizer, prompts = random_engine.tokenizer, []
    for seed, question in ((1, "where"), (1, "when"), (2, "where"), (2, "when")):
        video = make_prompt((6, 8, 4), "", 0.5, seed)
        ids = torch.cat([video.token_ids_L, torch.tensor(tokenizer(question)["input_ids"])])
        positions = mrope_positions(ids, [(6, 8, 4)], [0.5], tokenizer.get_vocab()["<|video_pad|>"], 2)
        prompts.append(replace(video, token_ids_L=ids, position_ids_3L=positions))
    for _ in range(2):
        worst, spread = difference(policy, prompts, random_engine.generate(prompts, SamplingParams(2, 8)))
        assert spread > 0.5
        assert worst < BOUND


def test_packaged_qwen3_vl_agrees_with_its_own_weights_and_after_updates(qwen3):
    """One block of placeholders for each pair of frames, with its time before it; three layers get features of the
    tower; the head is tied."""
    policy = policy_of(load_hugging_face("tiny3", torch.float32, torch.device("cpu")))
    grids = ((3, 4, 4), (2, 6, 6), (40, 12, 8))
    prompts = [timed_prompt(qwen3.engine.tokenizer, grid, seed, QWEN3_VL) for seed, grid in enumerate(grids)]
    qwen3.engine.load_weights(checkpoint_weights(PACKAGED["tiny3"]), 1)
    sync = WeightSync(policy, qwen3.engine)
    for update, least_spread in enumerate((1.0, 1.0, 0.5)):
        worst, spread = difference(policy, prompts, qwen3.engine.generate(prompts, SamplingParams(4, 12)))
        assert spread > least_spread
        assert worst < BOUND
        disturb(policy, update)
        assert sync.push().policy_version == qwen3.engine.policy_version


def test_greedy_tokens_are_the_local_engines(random_engine, make_tiny_model, make_prompt, tiny_tokenizer):
    model = make_tiny_model(seed=6)
    random_engine.load_weights(model.state_dict().items(), 8)
    prompts = short_and_long(make_prompt)[:2]
    greedy = SamplingParams(1, 24, temperature=0.0)
    theirs = random_engine.generate(prompts, greedy)
    ours = LocalEngine(model, tiny_tokenizer).generate(prompts, greedy)
    for (sglang,), (local,) in zip(theirs, ours, strict=True):
        assert sglang.token_ids_R.tolist() == local.token_ids_R.tolist()
        assert (sglang.finish_reason, sglang.text) == (local.finish_reason, local.text)
        assert (sglang.logprobs_R - local.logprobs_R).abs().max() < BOUND


def test_stop_id_ends_a_completion_and_stays(random_engine, make_tiny_model, make_prompt):
    """All ids are made equally likely, so that the log-prob of each is known."""
    stops = {random_engine.tokenizer.get_vocab()[token] for token in ("<|im_end|>", "<|endoftext|>")}
    model = make_tiny_model()
    with torch.no_grad():
        model.model.language_model.norm.weight.zero_()  # all logits 0
    random_engine.load_weights(model.state_dict().items(), 20)
    completions = random_engine.generate([make_prompt((2, 4, 4), "when")], SamplingParams(8, 256))[0]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped  # each is still going after 256 draws with probability (1 - 2 / 283) ** 256 = 0.16, all 8 with 5e-7
    for completion in completions:
        ids = completion.token_ids_R.tolist()
        assert not set(ids[:-1]) & stops
        assert (ids[-1] in stops) == (completion.finish_reason == "stop") or len(ids) == 256
        # five ids cannot be drawn, and do not count in the softmax
        uniform = torch.full((len(ids),), -math.log(model.config.text_config.vocab_size - 5))
        torch.testing.assert_close(completion.logprobs_R, uniform, atol=1e-4, rtol=0)


def test_a_bad_request_is_refused_and_the_next_one_answered(random_engine, make_prompt):
    """Sent to SGLang, the first of these ends its processes."""
    good = make_prompt((2, 4, 4), "when")
    worker = random_engine._workers.seats[0].worker
    pid, sampling = worker.child.pid, SamplingParams(2, 4)
    outside = good.token_ids_L.clone()
    outside[0] = 10**6
    more_pads = good.token_ids_L.clone()
    more_pads[-1] = random_engine.tokenizer.get_vocab()["<|video_pad|>"]
    for bad, words in (
        (replace(good, token_ids_L=outside), r"vocabulary is 0 \.\. 287"),
        (replace(good, position_ids_3L=good.position_ids_3L[:, 1:]), "positions are"),
        (replace(good, media=(replace(good.media[0], grid_thw=(1, 4, 4)),)), "patches are"),
        (replace(good, token_ids_L=more_pads), "placeholders stand in 2 places"),
    ):
        with pytest.raises(ValueError, match=words):
            random_engine.generate([bad], sampling)
    with pytest.raises(ValueError, match="room for"):
        random_engine.generate([good], SamplingParams(2, 10**6))
    assert len(random_engine.generate([good], sampling)[0]) == 2
    assert worker.child.pid == pid  # the same process all along
