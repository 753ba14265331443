from dataclasses import replace

import pytest
import torch

from tests.learner.test_lora import with_lora
from tests.learner.test_step import make_config
from vcr1_fast.learner.freezing import num_trained
from vcr1_fast.learner.sharding import SINGLE_PROCESS, named_weights
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.settings.config import Config, ConfigError

GROUPS = ((5, 3, 8), (1, 9, 2))


@pytest.fixture
def config(make_model, tmp_path) -> Config:
    make_model().save_pretrained(tmp_path / "model")
    return make_config(tmp_path / "model")


def frozen(config: Config, *patterns: str, **model) -> Config:
    return replace(config, model=replace(config.model, freeze=patterns, **model))


def learner_of(config: Config) -> Learner:
    return Learner(config, SINGLE_PROCESS, 10)


def trained(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in learner.policy.hf.named_parameters() if weight.requires_grad}


def test_what_a_pattern_names_stays_as_it_is(config, make_group, tmp_path):
    """Names are the published ones, without `model.` before `visual.`; the rest is trained as ever."""
    config = frozen(config, "visual.patch_embed.*", "model.layers.0.*", "lm_head.weight")
    learner = learner_of(config)
    before = {name: weight.detach().clone() for name, weight in learner.policy.hf.named_parameters()}
    learner.update_grpo([make_group(seed, lengths) for seed, lengths in enumerate(GROUPS)])
    moved = {n for n, weight in learner.policy.hf.named_parameters() if not torch.equal(weight, before[n])}
    kept = [n for n in before if n.startswith(("model.visual.patch_embed", "model.language_model.layers.0."))]
    assert kept and moved.isdisjoint({*kept, "lm_head.weight"})
    assert {"model.language_model.embed_tokens.weight", "model.language_model.layers.1.mlp.up_proj.weight"} <= moved
    assert set(trained(learner)) == before.keys() - {*kept, "lm_head.weight"}
    assert num_trained(config.model) == sum(weight.numel() for weight in trained(learner).values())

    parts = (learner.policy, learner.optimizer, learner.schedule)
    path = save_checkpoint(tmp_path / "run", *parts, RunState(1, 0, 0, 0, "", ""), SINGLE_PROCESS, keep=1)
    again = learner_of(config)
    load_checkpoint(path, again.policy, again.optimizer, again.schedule, SINGLE_PROCESS)
    both = zip(named_weights(again.policy).values(), named_weights(learner.policy).values(), strict=True)
    assert all(torch.equal(now, was) for now, was in both)
    for other in (frozen(config, "visual.patch_embed.*"), frozen(config, *config.model.freeze, "model.norm.weight")):
        changed = learner_of(other)
        with pytest.raises(ConfigError, match=r"model.freeze and model.freeze_vision to those the run began with"):
            load_checkpoint(path, changed.policy, changed.optimizer, changed.schedule, SINGLE_PROCESS)


@pytest.mark.parametrize(
    ("patterns", "model", "message"),
    [
        (("visual.patchembed.*",), {}, r"model.freeze names 'visual.patchembed.\*', but no weight is called so"),
        (("*",), {}, r"leaves nothing to train"),
        (("model.*", "lm_head.weight"), {"freeze_vision": True}, r"leaves nothing to train"),
        (("visual.*",), {}, r"takes in the whole vision tower: set model.freeze_vision=true"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(config, patterns, model, message):
    with pytest.raises(ConfigError, match=message):
        learner_of(frozen(config, *patterns, **model))


def test_patterns_take_adapters_away(config):
    config = frozen(with_lora(config), "model.layers.0.*")
    names = set(trained(learner_of(config)))
    assert names and all(".layers.1." in name and "lora_" in name for name in names)
    assert num_trained(config.model) == sum(w.numel() for w in trained(learner_of(config)).values())
