"""Folders of a trained model: what other programs read in them, their dtype and files, and what a failure leaves."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import vcr1_fast.run.folder as run_folder
from tests.run.test_checkpoint import make, state, train
from tests.tiny_policy import TinyPolicy, tiny_tokenizer
from vcr1_fast.learner.lora import add_adapters
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import export
from vcr1_fast.run.checkpoint import save_checkpoint
from vcr1_fast.run.export import export_adapter, export_hugging_face, stored_dtype
from vcr1_fast.settings.config import LoRAConfig


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_loaded_by_transformers_with_equal_weights(tmp_path: Path, tied: bool):
    policy = TinyPolicy(tied=tied)
    source = tmp_path / "source"
    source.mkdir()
    (source / "preprocessor_config.json").write_text("{}")
    for _ in range(2):  # the second replaces the first
        folder = export_hugging_face(policy, tiny_tokenizer(), tmp_path / "model", source=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert "preprocessor_config.json" in names
    # The names of the published checkpoints, which other engines expect.
    assert "model.embed_tokens.weight" in load_file(folder / "model.safetensors")
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wanted = policy.hf.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("does the dog jump") == [2, 3, 4, 5]


def test_export_in_bfloat16(tmp_path: Path):
    policy = TinyPolicy()
    folder = export_hugging_face(policy, tiny_tokenizer(), tmp_path / "model", dtype=torch.bfloat16)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and policy.hf.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, policy.hf.lm_head.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_in_several_files_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    policy = TinyPolicy(tied=True)
    one = export_hugging_face(policy, tiny_tokenizer(), tmp_path / "one", dtype=dtype)
    monkeypatch.setattr(export, "FILE_BYTES", 30_000 * dtype.itemsize)  # of 47,536 weights
    two = export_hugging_face(policy, tiny_tokenizer(), tmp_path / "two", dtype=dtype)
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in two.glob("*.safetensors")) == files
    parts = [load_file(two / name) for name in files]
    assert all(sum(tensor.numel() for tensor in part.values()) <= 30_000 for part in parts)
    whole, got = load_file(one / "model.safetensors"), parts[0] | parts[1]
    assert whole.keys() == got.keys() and all(torch.equal(tensor, got[name]) for name, tensor in whole.items())
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in zip(files, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == dtype.itemsize * sum(tensor.numel() for tensor in whole.values())
    for name in ("config.json", "generation_config.json"):
        assert (two / name).read_text() == (one / name).read_text()
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(two, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == dtype


def test_export_says_its_dtype_where_the_starting_model_said_one(tmp_path: Path):
    """Sections of config.json have a dtype of their own in folders that newer transformers wrote."""
    policy = TinyPolicy()
    policy.hf.config.text_config.dtype = torch.float32
    folder = export_hugging_face(policy, tiny_tokenizer(), tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    assert "dtype" not in config["vision_config"]


def test_the_dtype_of_a_folder_is_that_of_most_of_its_numbers(tmp_path: Path):
    weights = {"a": torch.zeros(3), "b": torch.zeros(9, dtype=torch.int64)}
    save_file(weights, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.float32
    save_file(weights | {"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_what_is_written_has_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
):
    previous = os.umask(umask)
    try:
        parts = make()
        train(parts, 1)
        folders = [save_checkpoint(tmp_path / "run", *parts, state(1), SINGLE_PROCESS, keep=2)]
        folders.append(export_hugging_face(parts[0], tiny_tokenizer(), tmp_path / "model"))
        add_adapters(parts[0].hf, LoRAConfig(rank=2), 0)
        folders.append(export_adapter(parts[0], tmp_path / "adapter", LoRAConfig(rank=2), "base"))
    finally:
        os.umask(previous)
    for folder in folders:
        inside = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.suffix == ".safetensors" for path in inside) >= 1
        assert {stat.S_IMODE(path.stat().st_mode) for path in inside} == {file_mode}
        assert stat.S_IMODE(folder.stat().st_mode) == folder_mode


def test_export_does_not_replace_another_folder_and_leaves_nothing_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match=r"exists and has no config\.json; choose another path"):
        export_hugging_face(TinyPolicy(), tiny_tokenizer(), tmp_path / "photos")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export_hugging_face(TinyPolicy(), tiny_tokenizer(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
