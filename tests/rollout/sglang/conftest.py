"""The interpreters that have SGLang, and one engine for the whole folder: a start costs 15 to 30 s of CPU.

Set VCR1_SGLANG_PYTHON to the interpreter of an environment made by install.sh, or make it at .venv-sglang. What needs
one is marked `sglang`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.learner.conftest import with_large_weights
from tests.rollout.sglang.forked_worker import Forked
from vcr1_fast.learner.model import load_tokenizer
from vcr1_fast.rollout.sgl import process as sglang_process
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.tiny.architecture import tiny_config, untrained_model
from vcr1_fast.types import Completion, Prompt
from vcr1_fast.video.formats import QWEN2_5_VL, QWEN3_VL, VideoFormat

SCRIPTED_WEIGHTS = [("model.language_model.w", torch.ones(3)), ("model.visual.w", torch.ones(300, 300))]
REPOSITORY = Path(__file__).resolve().parents[3]
MakePrompt = Callable[..., Prompt]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if {"sglang_python", "oldest_python"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("sglang")


@pytest.fixture(scope="session")
def sglang_python() -> str:
    named = os.environ.get("VCR1_SGLANG_PYTHON")
    path = Path(named) if named else REPOSITORY / ".venv-sglang" / "bin" / "python"
    if not path.is_file():
        pytest.skip(
            f"no interpreter with SGLang at {path}: run tests/rollout/sglang/install.sh .venv-sglang, or set "
            "VCR1_SGLANG_PYTHON"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the engine's processes: the models are too small to share out
    return str(path)


@pytest.fixture(scope="session")
def oldest_python(sglang_python: str) -> str:
    """Of the oldest version that is supported; install.sh makes it beside the other."""
    path = Path(sglang_python).parents[1] / "oldest" / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no SGLang of the oldest version at {path}: run tests/rollout/sglang/install.sh .venv-sglang")
    return str(path)


@pytest.fixture(scope="session")
def settings(sglang_python: str) -> SGLangConfig:
    """Small buckets, so that several are sent."""
    return settings_for(sglang_python)


def settings_for(python: str) -> SGLangConfig:
    """Small buckets, so that several are sent; long prompts go through the model in several pieces."""
    return SGLangConfig(
        python=python,
        bucket_mb=1,
        timeout_s=300,
        backoff_s=0.1,
        engine_args={"chunked_prefill_size": 256},
    )


@pytest.fixture(scope="session")
def random_folder(make_tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A random model with a head of its own, written as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("random") / "model"
    make_tiny_model(seed=11).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_engine(settings: SGLangConfig, random_folder: Path, tiny_tokenizer) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(random_folder, tiny_tokenizer, settings, can_penalise=True)
    yield engine
    engine.close()


@dataclass(frozen=True)
class Family:
    """One architecture in the real engine."""

    engine: SGLangEngine
    make_model: Callable[[int], Any]  # a fresh one of this seed, with weights that the engine can take
    video: VideoFormat


def packaged_qwen3(settings: SGLangConfig) -> Family:
    """Its head is tied, and its config.json is written as those that are published."""
    tokenizer = load_tokenizer("tiny3")
    config = tiny_config(tokenizer, "qwen3_vl")
    engine = SGLangEngine(PACKAGED["tiny3"], tokenizer, settings)
    return Family(engine, lambda seed: with_large_weights(untrained_model(config, seed), seed), QWEN3_VL)


@pytest.fixture(scope="session")
def qwen3(settings: SGLangConfig) -> Iterator[Family]:
    family = packaged_qwen3(settings)
    yield family
    family.engine.close()


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest, sglang_python: str, make_tiny_model) -> Family:
    """Asks for `sglang_python` by itself: by it tests are marked."""
    if request.param == "qwen3_vl":
        return request.getfixturevalue("qwen3")
    engine = request.getfixturevalue("random_engine")
    return Family(engine, lambda seed: make_tiny_model(seed=seed), QWEN2_5_VL)


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def oldest(
    request: pytest.FixtureRequest, oldest_python: str, random_folder: Path, tiny_tokenizer, make_tiny_model
) -> Iterator[Family]:
    """In an engine of the oldest version."""
    settings = settings_for(oldest_python)
    if request.param == "qwen3_vl":
        family = packaged_qwen3(settings)
    else:
        engine = SGLangEngine(random_folder, tiny_tokenizer, settings)
        family = Family(engine, lambda seed: make_tiny_model(seed=seed), QWEN2_5_VL)
    yield family
    family.engine.close()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """For engines and servers, whose workers are scripted from now on."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setenv("SCRIPTED_WORKER_FOLDER", str(tmp_path))
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    monkeypatch.setattr(sglang_process, "subprocess", forking)
    return folder


@pytest.fixture
def start(tmp_path, tiny_tokenizer, checkpoint):
    """start(plan, **settings): an engine whose workers' starts behave as planned, with weights."""
    engines = []
    settings = {"backoff_s": 0.01, "timeout_s": 30.0, "start_timeout_s": 60.0}

    def begin(plan: list[str], *, has_weights: bool = True, **changes) -> SGLangEngine:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        engine = SGLangEngine(checkpoint, tiny_tokenizer, SGLangConfig(**{**settings, **changes}))
        engines.append(engine)
        if has_weights:
            engine.load_weights(SCRIPTED_WEIGHTS, 1)
        return engine

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture
def prompts(make_prompt: MakePrompt) -> list[Prompt]:
    """For scripted workers, whose answers begin with the first id of the prompt."""
    return [make_prompt((1, 2, 2), f"{letter} is here") for letter in "abcdef"]


def first_ids(answers: list[list[Completion]]) -> list[int]:
    """Of groups of three: they are in order and nobody else's where these are `wanted`."""
    assert all(len(group) == 3 for group in answers)
    return [int(group[0].token_ids_R[0]) for group in answers]


def wanted(prompts: list[Prompt]) -> list[int]:
    return [int(p.token_ids_L[0]) for p in prompts]


def pids(answers: list[list[Completion]]) -> set[int]:
    """Of the workers: scripted ones give their process id as log-prob."""
    return {int(-group[0].logprobs_R[0]) for group in answers}
