"""A tower that is not trained runs once a clip; everything after it is what it would be with the tower inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.model import PolicyModel, load_hugging_face, load_tokenizer
from vcr1_fast.learner.objective import grpo_objective
from vcr1_fast.learner.packing import pack
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.run.sources import open_source
from vcr1_fast.settings.config import AlgorithmConfig, Config, ConfigError, ModelConfig, VideoConfig
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.temporal_contrast import shuffled_prompt
from vcr1_fast.types import Completion, Example, IntervalTruth, Prompt, RolloutGroup, SamplingParams
from vcr1_fast.video.draw import write_png
from vcr1_fast.video.frozen_tower import load_frozen_tower
from vcr1_fast.video.patches import PatchSource

CPU = torch.device("cpu")
MODELS = ("tiny", "tiny3")  # the second one's tower gives features for inner layers, too


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(SynthConfig(output_dir=str(folder), kinds=("grounding",), num_train=4, num_eval=1), False)
    return folder


def _source(model: str, freeze: bool, **video: Any) -> PatchSource:
    settings = VideoConfig(max_frames=8, min_frame_pixels=7056, num_workers=0, **video)
    return open_source(Config(model=ModelConfig(path=model, freeze_vision=freeze), video=settings), CPU)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sources(model: str) -> Iterator[tuple[PatchSource, PatchSource]]:
    """(pixels, frozen tower)"""
    pair = _source(model, freeze=False), _source(model, freeze=True)
    yield pair
    for source in pair:
        source.close()


def _prompts(clips: Path, sources: tuple[PatchSource, PatchSource]) -> list[Prompt]:
    """The same question with pixels and with embeddings."""
    tasks, tokenizer = make_tasks(Config().task), load_tokenizer("tiny")
    video = str(clips / "videos" / "train-grounding-00000.mp4")
    example = Example("a", "temporal_grounding", video, "a red circle appears", 8.0, IntervalTruth(((1.0, 3.0),)))
    return [
        PromptBuilder(tokenizer, tasks, source, writes_times=source.video_format.reads_times).build(example)
        for source in sources
    ]


def test_embeddings_are_those_of_the_policys_own_tower(
    clips: Path, model: str, sources: tuple[PatchSource, PatchSource]
) -> None:
    with_pixels, embedded = _prompts(clips, sources)
    assert torch.equal(with_pixels.token_ids_L, embedded.token_ids_L)
    assert torch.equal(with_pixels.position_ids_3L, embedded.position_ids_3L)
    assert embedded.media[0].embeddings_MD is not None and embedded.media[0].values_PC.shape == (
        0,
        with_pixels.media[0].values_PC.shape[1],
    )
    hf = load_hugging_face(model, torch.float32, CPU)
    KernelChoice().switch_tower(hf.model.visual, CPU, torch.float32)
    grids = torch.tensor([with_pixels.media[0].grid_thw])
    wanted: Any = hf.model.visual(with_pixels.media[0].values_PC, grid_thw=grids)
    features = [wanted.pooler_output, *getattr(wanted, "deepstack_features", ())]
    assert len(features) == {"tiny": 1, "tiny3": 4}[model]
    assert torch.equal(embedded.media[0].embeddings_MD, torch.cat(features, dim=1))


def test_an_image_is_kept_like_a_clip(tmp_path: Path, sources: tuple[PatchSource, PatchSource]) -> None:
    write_png(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8), tmp_path / "i.png")
    _, embedded = sources
    for source in sources:
        first, again = (source(f"{tmp_path}/i.png#image") for _ in range(2))
        assert first.kind == again.kind == "image"
        height, width = (round(side / source.video_format.factor_px) for side in (90, 130))
        assert first.grid_thw == again.grid_thw == (1, 2 * height, 2 * width)
        assert (again.second_per_grid_s, again.pair_times_s, again.duration_s) == (0.0, (), 0.0)
    assert first.embeddings_MD is not None and again.embeddings_MD is not None
    assert torch.equal(first.embeddings_MD, again.embeddings_MD) and len(again.embeddings_MD) == again.num_tokens
    kept = embedded.cache.metrics()
    assert (kept["cache/ram_entries"], kept["cache/misses"]) == (2.0, 2.0)  # frame and embeddings, each made once


def test_loss_and_gradients_are_those_of_a_frozen_tower_inside(
    clips: Path, model: str, sources: tuple[PatchSource, PatchSource]
) -> None:
    answer = Completion(torch.tensor([300, 301, 302]), torch.full((3,), -1.0), "stop", "")
    results = []
    for prompt in _prompts(clips, sources):
        group = RolloutGroup(prompt, (answer, answer), 0, advantages=(1.0, -0.5), rewards=(1.0, 0.0))
        policy = PolicyModel(
            load_hugging_face(model, torch.float32, CPU), ModelConfig(freeze_vision=True), torch.float32
        )
        batch = policy.device_batch(pack([group], [[0.5, 0.5]]))
        loss, _ = policy(batch, 1.0, grpo_objective(batch, None, AlgorithmConfig()))
        loss.backward()
        results.append({name: p.grad for name, p in policy.named_parameters()})
    with_pixels, embedded = results
    assert all((grad is None) == (".visual." in name) for name, grad in embedded.items())
    for name, grad in with_pixels.items():
        assert (grad is None) == (embedded[name] is None)
        assert grad is None or torch.equal(grad, embedded[name])
    assert max(grad.abs().max() for grad in with_pixels.values() if grad is not None) > 0


def test_the_engine_answers_the_same(clips: Path, model: str, sources: tuple[PatchSource, PatchSource]) -> None:
    engine = LocalEngine(load_hugging_face(model, torch.float32, CPU), load_tokenizer("tiny"))
    sampling = SamplingParams(num_completions=3, max_new_tokens=12, seed=5)
    answers = [engine.generate([prompt], sampling)[0] for prompt in _prompts(clips, sources)]
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one.token_ids_R, other.token_ids_R) and torch.equal(one.logprobs_R, other.logprobs_R)


def test_shuffled_clips_shuffle_their_embeddings(clips: Path, sources: tuple[PatchSource, PatchSource]) -> None:
    with_pixels, embedded = (shuffled_prompt(prompt, seed=3) for prompt in _prompts(clips, sources))
    tower = sources[1].tower
    assert tower is not None and embedded.media[0].embeddings_MD is not None
    wanted_MD = tower.embed(with_pixels.media[0])
    assert not torch.equal(embedded.media[0].embeddings_MD, _prompts(clips, sources)[1].media[0].embeddings_MD)
    # one call sees the same frames in another order: sums of matrix products may be taken in another order, too
    assert (embedded.media[0].embeddings_MD - wanted_MD).abs().max() < 1e-5


def test_a_clip_seen_before_is_not_even_decoded(
    clips: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = str(clips / "videos" / "train-grounding-00001.mp4")
    folder = str(tmp_path / "cache")
    first = _source(model, freeze=True, cache_dir=folder)
    wanted = first(video)
    first.close()
    later = _source(model, freeze=True, cache_dir=folder)
    monkeypatch.setattr(later.loader, "get", lambda request: pytest.fail("the clip was read again"))
    again = later(video)
    later.close()
    assert again.embeddings_MD is not None and wanted.embeddings_MD is not None
    assert torch.equal(again.embeddings_MD, wanted.embeddings_MD)
    assert len(again.pair_times_s) == again.grid_thw[0]
    assert replace(again, embeddings_MD=None, values_PC=wanted.values_PC) == replace(wanted, embeddings_MD=None)


def test_other_weights_are_another_tower(tmp_path: Path) -> None:
    hf = load_hugging_face("tiny", torch.float32, CPU)
    with torch.no_grad():
        next(hf.model.visual.parameters())[0].add_(1e-3)
    hf.save_pretrained(tmp_path / "other")
    tiny, again, other = (
        load_frozen_tower(folder, torch.float32, CPU).digest
        for folder in (model_folder("tiny"), model_folder("tiny"), tmp_path / "other")
    )
    assert tiny == again != other
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no weights, wanted model\.safetensors"):
        load_frozen_tower(tmp_path / "other", torch.float32, CPU)
    del hf.model.visual.merger.ln_q.weight
    hf.save_pretrained(tmp_path / "part")
    with pytest.raises(ConfigError, match=r"1 missing \(model\.visual\.merger\.ln_q\.weight\)"):
        load_frozen_tower(tmp_path / "part", torch.float32, CPU)


def test_a_tower_of_half_precision_has_float32_frequencies() -> None:
    tower = load_frozen_tower(model_folder("tiny"), torch.bfloat16, CPU)
    wanted = load_hugging_face("tiny", torch.bfloat16, CPU).model.visual
    for named in ("named_parameters", "named_buffers"):
        mine, other = (dict(getattr(module, named)()) for module in (tower.visual, wanted))
        assert mine.keys() == other.keys()
        assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in mine.items())
    assert all(buffer.dtype == torch.float32 for buffer in tower.visual.buffers())
    assert not any(weight.requires_grad for weight in tower.visual.parameters())
