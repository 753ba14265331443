"""A clip is preprocessed once: the local engine, SGLang and the learner's update take the same values."""

from __future__ import annotations

from typing import Any

import torch

from vcr1_fast.learner.model import PolicyModel, load_hugging_face, load_tokenizer
from vcr1_fast.learner.objective import grpo_objective
from vcr1_fast.learner.packing import pack
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.engine import NOT_BEGUN
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.rollout.sgl.messages import decode, encode
from vcr1_fast.rollout.sgl.video import features_by_kind, requests_of
from vcr1_fast.rollout.sgl.workers import Request, Workers
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.settings.config import AlgorithmConfig, ModelConfig, TaskConfig
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Completion, Example, Frames, IntervalTruth, Prompt, RolloutGroup, SamplingParams
from vcr1_fast.video import pixel_bytes
from vcr1_fast.video.patches import to_patches

CPU = torch.device("cpu")


def _prompt() -> Prompt:
    pixels = torch.randint(0, 256, (4, 56, 84, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = Frames(pixels, torch.arange(4) / 2.0, sampled_fps=2.0, duration_s=2.0, reader="none")
    example = Example("a", "temporal_grounding", "a.mp4", "a red circle appears", 2.0, IntervalTruth(((0.5, 1.0),)))
    builder = PromptBuilder(load_tokenizer("tiny"), make_tasks(TaskConfig()), lambda _: to_patches(frames))
    return builder.build(example)


def _seen_by(visual: Any, seen: list[torch.Tensor]) -> None:
    """Note the patches of every call of a vision tower."""
    visual.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True)


def test_engine_and_learner_take_the_same_values() -> None:
    prompt = _prompt()
    values_PC = prompt.media[0].values_PC
    engine_hf, learner_hf = (load_hugging_face("tiny", torch.float32, CPU) for _ in range(2))
    seen_by_engine: list[torch.Tensor] = []
    seen_by_learner: list[torch.Tensor] = []
    _seen_by(engine_hf.model.visual, seen_by_engine)
    _seen_by(learner_hf.model.visual, seen_by_learner)
    LocalEngine(engine_hf, load_tokenizer("tiny")).generate([prompt], SamplingParams(2, max_new_tokens=2))
    answer = Completion(torch.tensor([300, 301]), torch.full((2,), -1.0), "stop", "")
    group = RolloutGroup(prompt, (answer, answer), 0, advantages=(1.0, -1.0), rewards=(1.0, 0.0))
    policy = PolicyModel(learner_hf, ModelConfig(), torch.float32)
    batch = policy.device_batch(pack([group], [[0.5, 0.5]]))
    policy(batch, 1.0, grpo_objective(batch, None, AlgorithmConfig()))
    assert len(seen_by_engine) == len(seen_by_learner) == 1  # and the tower ran once for both answers
    assert torch.equal(seen_by_engine[0], values_PC) and torch.equal(seen_by_learner[0], values_PC)


def test_sglang_is_sent_the_very_tensors_and_handed_their_bits() -> None:
    """In shared memory and, as between nodes, as bytes. What SGLang makes of it is for the tests with the real one."""
    prompt = _prompt()
    engine = SGLangEngine.__new__(SGLangEngine)  # without its workers: what is asked here needs none
    engine._stop_ids, engine._suppressed_ids = (2,), (7,)
    engine.config = SGLangConfig()
    engine._workers = Workers.__new__(Workers)
    engine._workers.policy_version = 3
    fields, tensors = engine._request(1, Request(0, prompt, [NOT_BEGUN] * 2), SamplingParams(2, max_new_tokens=2))
    assert tensors["values_PC"] is prompt.media[0].values_PC
    assert tensors["token_ids_L"] is prompt.token_ids_L and tensors["position_ids_3L"] is prompt.position_ids_3L
    grid = prompt.media[0].grid_thw
    assert fields["media"] == [{"kind": "video", "grid_thw": grid, "second_per_grid_s": 1.0}]
    engine.config = SGLangConfig(placement="disaggregated", addresses=["10.0.0.2:29800"])
    _, as_bytes = engine._request(1, Request(0, prompt, [NOT_BEGUN] * 2), SamplingParams(2, max_new_tokens=2))
    assert as_bytes["bytes_PC"].dtype == torch.uint8
    for sent, by_reference in ((tensors, True), (as_bytes, False)):
        frames, lent = encode("generate", fields, sent, by_reference=by_reference)
        message = decode(frames)
        received = pixel_bytes.unpack(message.tensors)
        [features] = features_by_kind(message.fields["media"], received).values()
        [request] = requests_of(message.fields, received, {"video": features})
        [item] = request["video_data"]
        assert torch.equal(item["pixel_values_videos"], prompt.media[0].values_PC)
        assert torch.equal(item["mrope_positions"], prompt.position_ids_3L)
        assert len(lent) == by_reference
