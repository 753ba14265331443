"""What a family says of its architecture: the names of its weights."""

import pytest

from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_old_and_new_names(old, new):
    family = Qwen25VL()
    assert family.module_name(old) == family.module_name(new) == new
    assert family.checkpoint_name(old) == family.checkpoint_name(new) == old


def test_parts_are_where_the_names_say(make_model):
    family, hf = Qwen25VL(), make_model()
    assert hf.get_submodule(family.tower_name) is family.tower(hf)
    assert hf.get_submodule(family.layers_name) is family.decoder(hf).layers
    inside = {name.rsplit(".", 1)[-1] for name, _ in family.decoder(hf).layers[0].named_modules()}
    assert inside >= set(family.lora_targets)
