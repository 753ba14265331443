"""What evaluation reads where eval.video says otherwise than video."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.model import load_tokenizer
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run.sources import eval_builder, open_source, prompt_limits
from vcr1_fast.settings.config import Config, ModelConfig
from vcr1_fast.settings.io import load_config, load_settings
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tasks import make_tasks
from vcr1_fast.train import train
from vcr1_fast.types import Example, IntervalTruth, Prompt, SamplingParams
from vcr1_fast.video.patches import PatchSource

SMALL = ("--video.num_workers=0", "--video.min_frame_pixels=7056", "--video.max_frame_pixels=7056")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    settings = SynthConfig(output_dir=str(folder), num_train=2, num_eval=2, kinds=("grounding",))
    write_dataset(settings, show_progress=False)
    return folder


def example_of(data: Path) -> Example:
    video = str(sorted((data / "videos").glob("*.mp4"))[0])
    return Example("a", "temporal_grounding", video, "a dog barks", 8.0, IntervalTruth(((1.0, 2.0),)))


@contextlib.contextmanager
def builders(*overrides: str, frozen: bool = False) -> Iterator[tuple[PromptBuilder, PromptBuilder]]:
    config = load_config("tiny", [*SMALL, f"--model.freeze_vision={str(frozen).lower()}", *overrides])
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(contextlib.closing(open_source(config, torch.device("cpu"))))
        tokenizer, tasks, limits = load_tokenizer("tiny"), make_tasks(config.task), prompt_limits(config, "train")
        builder = PromptBuilder(tokenizer, tasks, source, prefetch=source.prefetch, limits=limits)
        yield builder, opened.enter_context(eval_builder(config, builder, source, KernelChoice()))


def source_of(builder: PromptBuilder) -> PatchSource:
    assert isinstance(builder._read, PatchSource)
    return builder._read


def frames_of(prompt: Prompt) -> tuple[int, int]:
    """Frames, and tokens of each pair."""
    return prompt.media[0].num_frames, prompt.media[0].num_tokens // prompt.media[0].grid_thw[0]


def test_without_settings_of_its_own_evaluation_has_the_builder_of_training():
    with builders("--eval.video.fps=2") as (builder, in_evaluation):
        assert in_evaluation is builder


@pytest.mark.parametrize("frozen", [False, True])
def test_more_frames_of_a_larger_size_in_evaluation_and_the_same_in_training(data: Path, frozen: bool):
    example = example_of(data)
    more = ("--eval.video.max_frames=24", "--eval.video.fps=3", "--eval.video.max_frame_pixels=28224")
    with builders(*more, "--eval.video.min_frame_pixels=28224", frozen=frozen) as (builder, in_evaluation):
        in_evaluation.read_ahead([example])
        builder.read_ahead([example])
        first, seen, again = (b.build(example) for b in (builder, in_evaluation, builder))
        ours, theirs = source_of(builder), source_of(in_evaluation)
        assert (theirs.loader, theirs.cache, theirs.tower) == (ours.loader, ours.cache, ours.tower)
    assert (frames_of(first), frames_of(seen)) == ((16, 9), (24, 36))  # 84 x 84 and 168 x 168 pixels
    assert torch.equal(first.token_ids_L, again.token_ids_L)
    assert seen.media[0].second_per_grid_s == pytest.approx(2 / 3)


def test_another_reader_or_cache_is_opened_for_evaluation_and_closed(data: Path, tmp_path: Path):
    example, cached = example_of(data), tmp_path / "kept"
    with builders(f"--eval.video.cache_dir={cached}", frozen=True) as (builder, in_evaluation):
        assert frames_of(in_evaluation.build(example)) == frames_of(builder.build(example))
        ours, theirs = source_of(builder), source_of(in_evaluation)
        assert theirs.loader is not ours.loader and theirs.tower is ours.tower is not None
    assert any(cached.rglob("*")) and theirs.loader._is_closed


def test_the_limit_of_trainings_prompts_is_not_that_of_an_evaluation_that_sees_more():
    config = Config(model=ModelConfig(path="tiny"))
    bounded = load_config(None, ["--model.path=tiny", "--data.max_prompt_tokens=100"])
    more = load_config(None, ["--model.path=tiny", "--data.max_prompt_tokens=100", "--eval.video.fps=4"])
    faster = load_config(None, ["--model.path=tiny", "--data.max_prompt_tokens=100", "--eval.video.num_workers=9"])
    limits = [prompt_limits(c, command) for c in (config, bounded, more, faster) for command in ("train", "eval")]  # type: ignore[arg-type]
    assert [limit.max_prompt_tokens for limit in limits] == [None, None, 100, 100, 100, None, 100, 100]


def test_a_run_sees_more_in_its_held_out_scores_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    generate = LocalEngine.generate

    def recorded(self: LocalEngine, prompts: Sequence[Prompt], sampling: SamplingParams, *begun: Any) -> Any:
        seen.extend((sampling.num_completions, prompt.media[0].num_frames) for prompt in prompts)
        return generate(self, prompts, sampling, *begun)

    monkeypatch.setattr(LocalEngine, "generate", recorded)
    files = [f"--data.{name}=[{data}/{name}_grounding.jsonl]" for name in ("train", "eval")]
    sizes = [
        "--train.num_steps=1",
        "--train.prompts_per_step=2",
        "--rollout.group_size=2",
        "--rollout.max_new_tokens=4",
    ]
    run = [f"--train.output_dir={tmp_path / 'run'}", "--checkpoint.export=false", "--video.max_frames=8"]
    train(load_settings(Config, "tiny", [*files, *sizes, *run, *SMALL, "--eval.video.max_frames=16"]))
    assert {frames for num, frames in seen if num > 1} == {8}  # groups, and the comparison of engine and learner
    assert [frames for num, frames in seen if num == 1] == [16] * 4  # two clips, before and after
