"""Every YAML that ships loads, and every key in it is one that exists."""

import re
from pathlib import Path
from typing import get_args

import pytest

from vcr1_fast.commands.plan import plan_command
from vcr1_fast.settings.checks import RunCommand, check_settings
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_config, load_settings
from vcr1_fast.synth.config import SynthConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NUM_GPUS = {path: int(found[1]) for path in CONFIGS if (found := re.search(r"_(\d+)xh100$", path.stem))}
EXPERIMENTS = ("grounding", "tracking", "grounded_qa", "quality", "captioning", "cotraining")  # of VideoChat-R1


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path: Path):
    config = load_config(str(path), [])
    assert isinstance(config, Config)
    assert config != Config(), "a config that changes nothing"
    for command in get_args(RunCommand):
        check_settings(config, command, 8 * config.train.replicate if config.train.replicate > 1 else 1)


@pytest.mark.parametrize("config_class", [Config, SynthConfig])
def test_packaged_config_loads(config_class: type):
    config = load_settings(config_class, "tiny", [])
    assert isinstance(config, config_class) and config != config_class()


def test_every_config_is_listed_in_the_readme_of_the_folder():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in CONFIGS if path.name not in text] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_every_experiment_of_the_paper_has_both_recipes(experiment: str, recipe: str):
    suffix = "_paper" if recipe == "paper" else ""
    config = load_config(str(ROOT / "configs" / f"qwen2_5_vl_7b_{experiment}{suffix}_8xh100.yaml"), [])
    assert config.task.recipe == recipe
    files = [*config.data.sources("train"), *config.data.sources("eval")]
    assert all(file.path.startswith("data/") for file in files)
    assert len({file.video_root for file in files}) == {"cotraining": 4, "tracking": 2}.get(experiment, 1)
    assert (config.train.prompts_per_step, config.rollout.group_size) == (8, 8)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_papers_settings(experiment: str):
    """Section 2.1 of the facts on VideoChat-R1: 8 prompts x 8, KL 0.04 by k3, 1e-6 linear to 0, 1,024 tokens at 1.0
    from the 50 likeliest."""
    config = load_config(str(ROOT / "configs" / f"qwen2_5_vl_7b_{experiment}_paper_8xh100.yaml"), [])
    algorithm, rollout, optimizer = config.algorithm, config.rollout, config.optimizer
    assert (algorithm.loss, algorithm.scale_advantages, algorithm.beta, algorithm.kl) == ("grpo", "group", 0.04, "k3")
    assert (algorithm.minibatches_per_rollout, algorithm.mask_truncated) == (1, False)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens) == (1.0, 1.0, 50, 1024)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-6, "linear", 0)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.0, 1.0)
    assert (config.video.fps, config.video.total_pixels) == (2.0, 3584 * 28 * 28)
    assert not config.model.freeze_vision


@pytest.mark.parametrize("path", NUM_GPUS, ids=lambda path: path.name)
def test_dry_run_of_a_config_for_h100s_fits_into_80_gb(path: Path, capsys):
    config = load_config(str(path), [])
    result = plan_command(config, NUM_GPUS[path], is_fast=True)
    assert result["exceeds"]["80 GB (A100, H100)"] == []
    assert min(result["phases_gb"].values()) > 30 and max(result["phases_gb"].values()) < 72  # a tenth is left
    told = capsys.readouterr().out
    assert ("SGLang, weights and KV" if config.rollout.engine == "sglang" else "rollout engine") in told


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in NUM_GPUS], ids=lambda path: path.name)
def test_dry_run_of_the_other_configs(path: Path):
    assert plan_command(load_config(str(path), []), is_fast=True)["tokens"]["row"] > 0


def test_the_two_placements_of_sglang():
    """Colocated, SGLang's 24 GB, weights and 131,072 tokens of 57,344 bytes, come beside the learner's; apart, the
    learner has the GPU to itself."""
    path = str(ROOT / "configs" / "qwen2_5_vl_7b_grounding_sglang_2x8xh100.yaml")
    same = ["--model.gradient_checkpointing=full", "--train.reduce_gradients=each_row"]  # else by what is left
    here = ["--rollout.sglang.placement=colocated", "--rollout.sglang.addresses=[]"]
    apart, colocated = load_config(path, same), load_config(path, same + here)
    assert apart.rollout.sglang.placement == "disaggregated"
    assert apart.rollout.sglang.of_rank(7, 8).addresses == ("rollout-node:29807",)
    phases = [plan_command(config, 8, is_fast=True)["phases_gb"]["update"] for config in (colocated, apart)]
    assert phases[0] - phases[1] == pytest.approx(2 * 8.292166656 + 131_072 * 57_344e-9, abs=0.02)
