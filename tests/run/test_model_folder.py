"""Which files hold a checkpoint's weights: what the index says counts, and nothing else in the folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vcr1_fast.run.model_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    checkpoint_name,
    model_digest,
    module_name,
    stored_weights,
    weight_files,
)
from vcr1_fast.settings.error import ConfigError


def write(folder: Path, index: dict[str, str] | None = None, **files: tuple[str, ...]) -> Path:
    """`files`: of each file the weights in it, [2, 3] each."""
    folder.mkdir(exist_ok=True)
    for stem, names in files.items():
        save_file({name: np.zeros((2, 3), np.float16) for name in names}, folder / f"{stem}.safetensors")
    if index is not None:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


INDEX = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


def test_the_index_says_which_files_count(tmp_path):
    folder = write(tmp_path, INDEX, one=("a",), two=("b", "c"), stale=("a",), model=("a",))
    assert weight_files(folder) == [folder / "one.safetensors", folder / "two.safetensors"]
    stored = stored_weights(folder)
    assert {name: weight.file.name for name, weight in stored.items()} == INDEX
    assert {(weight.shape, weight.dtype) for weight in stored.values()} == {((2, 3), "F16")}


def test_without_an_index_the_single_file_counts(tmp_path):
    folder = write(tmp_path, model=("a", "b"), stale=("c",))
    assert weight_files(folder) == [folder / SINGLE_FILE]
    assert sorted(stored_weights(folder)) == ["a", "b"]
    digest = model_digest(folder)
    (folder / "stale.safetensors").unlink()
    assert model_digest(folder) == digest


@pytest.mark.parametrize(
    ("index", "files", "message"),
    [
        (None, {}, "has no weights, wanted model.safetensors, or model.safetensors.index.json"),
        (None, {"part": ("a",)}, "has part.safetensors, wanted model.safetensors"),
        (INDEX, {"one": ("a",)}, r"but two.safetensors is not there: download the missing files$"),
        (INDEX, {"one": ("a",), "model": ("a",)}, r"two.safetensors is not there: .* delete the index if model.safet"),
        (INDEX, {"one": ("a", "b"), "two": ("b", "c")}, "b is in one.safetensors and in two.safetensors of"),
        (INDEX, {"one": ("a", "b"), "two": ("c",)}, "does not say where b is, or says it wrongly"),
        (INDEX, {"one": ("a", "d"), "two": ("b", "c")}, "does not say where d is, or says it wrongly"),
        (INDEX, {"one": ("a",), "two": ("b",)}, "does not say where c is, or says it wrongly"),
        ({"a": "../one.safetensors"}, {"one": ("a",)}, "names '../one.safetensors', wanted safetensors files beside"),
        ({"a": "one.bin"}, {"one": ("a",)}, "names 'one.bin', wanted safetensors files beside"),
        ({}, {"one": ("a",)}, "names 'no file', wanted safetensors files beside"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, index, files, message):
    folder = write(tmp_path, index, **files)
    with pytest.raises(ConfigError, match=message):
        stored_weights(folder)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"has pytorch_model.bin, wanted model.safetensors.* save_pretrained it to"):
        weight_files(tmp_path)


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path, model=("a",))
    whole = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged \(.*\): download it again"):
        stored_weights(folder)
    for content in ("{", "[]", '{"weight_map": [1]}'):
        (folder / INDEX_FILE).write_text(content)
        with pytest.raises(ConfigError, match=r"index.json is damaged \(.*\): download it again"):
            weight_files(folder)


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
    assert module_name(old) == module_name(new) == new
    assert checkpoint_name(old) == checkpoint_name(new) == old
