"""Which files hold a checkpoint's weights: what the index says counts, and nothing else in the folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vcr1_fast.run.model_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    model_digest,
    require_tokenizer,
    settings_files,
    stored_weights,
    weight_files,
)
from vcr1_fast.settings.error import ConfigError


def write(folder: Path, index: dict[str, str] | None = None, **files: tuple[str, ...]) -> Path:
    """`files`: of each file the weights in it, [2, 3] each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for stem, names in files.items():
        save_file({name: np.zeros((2, 3), np.float16) for name in names}, folder / f"{stem}.safetensors")
    if index is not None:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
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


def test_a_model_is_known_by_the_contents_of_what_is_read_of_it(tmp_path):
    first, copy = (write(tmp_path / name, model=("a", "b")) for name in ("first", "copy"))
    digest = model_digest(first)
    (copy / "README.md").write_text("what nobody loads")
    shutil.copyfile(copy / SINGLE_FILE, copy / "model-00002-of-00002.safetensors")  # stale
    assert model_digest(copy) == digest
    weights = (copy / SINGLE_FILE).read_bytes()
    for place in (-1, len(weights) // 2):  # of the same length and time
        (copy / SINGLE_FILE).write_bytes(weights[:place] + bytes([weights[place] ^ 1]) + weights[place:][1:])
        os.utime(copy / SINGLE_FILE, ns=(0, (first / SINGLE_FILE).stat().st_mtime_ns))
        assert model_digest(copy) != digest
    (copy / SINGLE_FILE).write_bytes(weights)
    assert model_digest(copy) == digest
    for name, text in (("config.json", '{"rope_theta": 2}'), ("tokenizer.json", "{}"), ("chat_template.jinja", "x")):
        before = (copy / name).read_bytes() if (copy / name).exists() else None
        (copy / name).write_text(text)
        assert model_digest(copy) != digest
        (copy / name).unlink() if before is None else (copy / name).write_bytes(before)
    assert model_digest(copy) == digest


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
    (folder / SINGLE_FILE).write_bytes(LFS_POINTER)
    with pytest.raises(ConfigError, match=r"model.safetensors is a Git LFS pointer .*: run `git lfs pull` in"):
        stored_weights(folder)
    for content in ("{", "[]", '{"weight_map": [1]}'):
        (folder / INDEX_FILE).write_text(content)
        with pytest.raises(ConfigError, match=r"index.json is damaged \(.*\): download it again"):
            weight_files(folder)


def test_the_settings_of_a_model_are_the_files_that_are_read(tmp_path):
    names = ["config.json", "generation_config.json", "merges.txt", "processor_config.json", "tokenizer_config.json"]
    names.append("vocab.json")
    others = ["README.md", "optimizer.json", "trainer_state.json", "model.safetensors.index.json", "modeling.py"]
    for name in (*names, *others):
        (tmp_path / name).write_text("{}")
    assert sorted(path.name for path in settings_files(tmp_path)) == names
    require_tokenizer(tmp_path)
    for name in ("merges.txt", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "aside")
        with pytest.raises(ConfigError, match=r"no whole tokenizer, wanted tokenizer_config.json, and"):
            require_tokenizer(tmp_path)
        (tmp_path / "aside").rename(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", LFS_POINTER, "config.json is a Git LFS pointer"),
        ("merges.txt", LFS_POINTER, "merges.txt is a Git LFS pointer"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 1, "b"', r"tokenizer.json is damaged \(.*char"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config.json is damaged \(a JSON list, wanted an object\)"),
        ("generation_config.json", b"\xff", r"generation_config.json is damaged \(.*decode"),
        ("chat_template.jinja", None, r"chat_template.jinja cannot be read \(Is a directory\)"),
    ],
)
def test_damaged_settings_are_named(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        settings_files(tmp_path)
