"""Weights from files, and nothing else: what transformers reads, to the bit, or an error that names what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.learner.loading import empty_model, load_whole
from vcr1_fast.run.model_folder import model_folder, weight_files
from vcr1_fast.settings.error import ConfigError

CPU = torch.device("cpu")
TINY = model_folder("tiny")


def published(name: str) -> str:
    """A weight's name before transformers 4.52."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The packaged model in two shards with an index, under the published names."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (TINY / name).is_file():
            shutil.copy(TINY / name, target)
    weights = {published(name): value for name, value in load_file(TINY / "model.safetensors").items()}
    names = sorted(weights)
    shards = {"model-00001.safetensors": names[:30], "model-00002.safetensors": names[30:]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, target / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, members in shards.items() for name in members},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def change(folder: Path, file: str, edit) -> None:
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_transformers_reads_to_the_bit(folder: Path, dtype: torch.dtype):
    ours = load_whole(folder, dtype, CPU)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    named, wanted = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert named.keys() == wanted.keys() and not ours.training
    assert all(torch.equal(named[name], wanted[name]) and named[name].dtype == dtype for name in wanted)
    buffers, wanted_buffers = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == wanted_buffers.keys() and len(buffers) >= 4  # frequencies of both rotary embeddings
    for name, buffer in wanted_buffers.items():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_a_tied_head_stays_tied_with_or_without_its_weight_in_the_file(make_tiny_model, tmp_path: Path):
    hf = make_tiny_model(tied=True)
    hf.save_pretrained(tmp_path)
    for has_head in (False, True):
        if has_head:
            change(tmp_path, "model.safetensors", lambda w: w.update({"lm_head.weight": torch.zeros(288, 64)}))
        loaded = load_whole(tmp_path, torch.float32, CPU)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.lm_head.weight, hf.lm_head.weight)


def test_parameters_have_no_memory_before_they_are_read():
    hf = empty_model(TINY, torch.float32)
    assert all(parameter.is_meta for parameter in hf.parameters())
    assert not any(buffer.is_meta for buffer in hf.buffers())


def test_files_that_the_index_does_not_name_are_never_read(folder: Path):
    stale = {name: torch.full((2, 2), 9.0) for name in ("model.norm.weight", "nobody")}
    save_file(stale, folder / "model-00003.safetensors", {"format": "pt"})
    assert [path.name for path in weight_files(folder)] == ["model-00001.safetensors", "model-00002.safetensors"]
    load_whole(folder, torch.float32, CPU)


BROKEN = {
    "missing": (lambda w: w.pop("model.norm.weight"), r"lacks model\.language_model\.norm\.weight"),
    "in excess": (lambda w: w.update({"base_model.x": torch.ones(1)}), r"has in excess base_model\.x"),
    "shape": (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight is \[3\] in the checkpoint"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_do_not_fit_are_named(folder: Path, what: str):
    edit, message = BROKEN[what]
    change(folder, "model-00002.safetensors", edit)
    with pytest.raises(ConfigError, match=message):
        load_whole(folder, torch.float32, CPU)


def test_folders_that_are_no_checkpoint(folder: Path):
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_whole(folder, torch.float32, CPU)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    refused("model_type 'qwen2_vl', wanted one of qwen2_5_vl")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model-00001.safetensors").rename(folder / "gone")
    refused(r"names 2 files, but model-00001\.safetensors of them is not there")
    (folder / "gone").rename(folder / "model-00001.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    refused("has 2 safetensors files and no model.safetensors.index.json")
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    refused(r"no safetensors file.*its \.bin files are not read: convert them")
