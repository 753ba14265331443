"""One update by the paper's settings against numbers that VideoChat-R1's own code gave.

data/original_loss.json was made once: `compute_loss` of src/open_r1/trainer/grpo_trainer_video_tg.py (OpenGVLab/
VideoChat-R1 at 73b2ea9), unmodified, ran on each prompt of golden_case.py under transformers 4.50.0, trl 0.15.1,
accelerate 1.4.0 and torch 2.13.0 on a CPU, with both models in float64 (their norms compute in float32 all the same),
sdpa attention, beta 0.04, `generate` replaced by the case's answers and the reward functions by its rewards. Two
backward passes of half the loss stand for its data parallelism, which averages over prompts. It holds
- loss: the mean of both losses; kl: of what it logs as `kl`, beta times which is the loss but for 2e-8 that rounding of
  float32 advantages leaves; kl_of_all_tokens: the sum of its k3 over the tokens of all answers
- logprobs: prompt -> answer -> those of `_get_per_token_logps`
- gradients: checkpoint name -> (norm of the gradient, its product with `golden_case.direction`); grad_norm: of all

The same run in float32 is 1.2e-6 off at most in a gradient, relative to its norm, and 1.8e-6 in a log-prob; ours is
1e-6 and 2.4e-6 off. Without the 1e-4 beside the advantages' standard deviation, its smallest constant, it is 1.4e-4.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner import golden_case
from tests.learner.conftest import random_model
from tests.learner.test_step import update_and_capture
from vcr1_fast.learner.advantages import with_advantages
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.sharding import World
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.settings.io import load_config
from vcr1_fast.types import Completion, Example, IntervalTruth, Patches, Prompt, RolloutGroup

HERE = Path(__file__).parent
PAPER = HERE.parents[1] / "configs" / "qwen2_5_vl_7b_grounding_paper_8xh100.yaml"
GOLDEN: dict[str, Any] = json.loads((HERE / "data" / "original_loss.json").read_text(encoding="utf-8"))
BOUND = 1e-5  # both sides round to float32: eight times what that alone did to the original


def fill(hf: Any, is_reference: bool = False) -> None:
    names = {family_of(hf.config).checkpoint_name(name): weight for name, weight in hf.named_parameters()}
    weights = golden_case.weights({name: tuple(weight.shape) for name, weight in names.items()}, is_reference)
    with torch.no_grad():
        for name, weight in names.items():
            weight.copy_(weights[name])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    model = random_model()  # of the case's configuration
    fill(model)
    folder = tmp_path_factory.mktemp("golden") / "model"
    model.save_pretrained(folder)
    return folder


def as_group(group: golden_case.Group) -> RolloutGroup:
    """Its engine log-probs are the original's, so that the largest gap of the update is the error of our forward."""
    ids_L, t = group.token_ids, group.grid_thw[0]
    second_per_grid_s = golden_case.SECOND_PER_GRID_S
    positions_3L = mrope_positions(ids_L, [group.grid_thw], [second_per_grid_s], golden_case.VIDEO_PAD, 2)
    patches = Patches(group.patches, group.grid_thw, second_per_grid_s, 2 * t, t * second_per_grid_s)
    example = Example(group.name, "temporal_grounding", "v.mp4", "q", 8.0, IntervalTruth(((1.0, 2.0),)))
    completions = tuple(
        Completion(torch.tensor(group.answer(index)), torch.tensor(logprobs), "stop")
        for index, logprobs in enumerate(GOLDEN["logprobs"][group.name])
    )
    rewards = tuple(sum(parts) for parts in zip(*group.rewards, strict=True))
    return RolloutGroup(Prompt(example, ids_L, positions_3L, (patches,)), completions, 0, rewards=rewards)


@pytest.mark.parametrize("tokens_per_microbatch", [100_000, 1], ids=["one row", "a row each"])
def test_an_update_is_the_originals(model_folder, tokens_per_microbatch):
    overrides = [f"--model.path={model_folder}", "--model.compute_dtype=float32", "--model.device=cpu"]
    overrides += [f"--train.tokens_per_microbatch={tokens_per_microbatch}", "--optimizer.max_grad_norm=1e9"]
    config = load_config(str(PAPER), overrides)
    learner = Learner(config, World(), 10)
    assert learner.reference is not None
    fill(learner.reference.hf, is_reference=True)
    groups = with_advantages([as_group(group) for group in golden_case.GROUPS], config.algorithm.scale_advantages)
    [report], gradients = update_and_capture(learner, groups)

    assert report.sums["tokens"] == sum(sum(group.lengths) for group in golden_case.GROUPS)
    assert report.largest_gap < 2e-5  # of log-probs of 3 to 7 nats
    assert report.sums["kl"] == pytest.approx(GOLDEN["kl_of_all_tokens"], rel=BOUND)
    # Advantages of a group sum to 0 and ratios are 1: the KL term alone is left.
    assert report.sums["loss"] == pytest.approx(GOLDEN["loss"], rel=BOUND)
    assert report.grad_norm == pytest.approx(GOLDEN["grad_norm"], rel=BOUND)
    named = {family_of(learner.policy.hf.config).checkpoint_name(name): g for name, g in gradients.items()}
    assert named.keys() == GOLDEN["gradients"].keys()
    for name, (norm, product) in GOLDEN["gradients"].items():
        gradient = named[name].double()
        assert abs(float(gradient.norm()) - norm) <= BOUND * norm, name
        own_product = float((gradient * golden_case.direction(name, tuple(gradient.shape))).sum())
        assert abs(own_product - product) <= BOUND * norm, name
