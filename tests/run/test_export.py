"""Folders of a trained model: what other programs read in them, their dtype and files, and what a failure leaves."""

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import vcr1_fast.run.folder as run_folder
from tests.run.test_checkpoint import make, state, train
from tests.tiny_policy import TinyPolicy, tiny_folder
from vcr1_fast.learner.lora import add_adapters
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import export
from vcr1_fast.run.checkpoint import save_checkpoint
from vcr1_fast.run.export import (
    ExportPlan,
    export_adapter,
    export_hugging_face,
    plan_export,
    stored_dtype,
    try_export,
    with_dtype,
)
from vcr1_fast.run.run import open_run
from vcr1_fast.settings.config import CheckpointConfig, Config, LoRAConfig, TrainConfig, VideoConfig


def plan(tmp_path: Path, name: str = "model", dtype: torch.dtype | None = None, *, tied: bool = False) -> ExportPlan:
    return plan_export(tiny_folder(tmp_path / "source", tied=tied), tmp_path / name, dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_loaded_by_transformers_with_equal_weights(tmp_path: Path, tied: bool):
    policy = TinyPolicy(tied=tied)
    for _ in range(2):  # the second replaces the first
        folder = export_hugging_face(policy, plan(tmp_path, tied=tied))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]
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
    written = sum(path.stat().st_size for path in folder.iterdir())
    heads = 200 * len(wanted)  # bytes of the names in safetensors' own head
    assert written - heads <= plan(tmp_path, tied=tied).num_bytes <= written + model.lm_head.weight.nbytes


def test_all_but_the_weights_is_the_starting_models_byte_for_byte(tmp_path: Path):
    source = tiny_folder(tmp_path / "source")
    odd = b'{"do_sample": false,   "temperature": 1e-06}'  # what save_pretrained refuses to write
    for name in ("generation_config.json", "processor_config.json", "preprocessor_config.json"):
        (source / name).write_bytes(odd)
    (source / "README.md").write_text("of the starting model")
    export = plan_export(source, tmp_path / "model", further={"vcr1_fast.json": b"{}"})
    kept = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix in (".json", ".jinja")}
    shutil.rmtree(source)  # what is exported days later was read when the run started
    folder = export_hugging_face(TinyPolicy(), export)
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert kept.keys() >= names | {"processor_config.json", "preprocessor_config.json"}
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert written == kept | {"vcr1_fast.json": b"{}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_in_several_files_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    policy = TinyPolicy(tied=True)
    one = export_hugging_face(policy, plan(tmp_path, "one", dtype, tied=True))
    monkeypatch.setattr(export, "FILE_BYTES", 30_000 * dtype.itemsize)  # of 47,536 weights
    two = export_hugging_face(policy, plan(tmp_path, "two", dtype, tied=True))
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in two.glob("*.safetensors")) == files
    parts = [load_file(two / name) for name in files]
    assert all(sum(tensor.numel() for tensor in part.values()) <= 30_000 for part in parts)
    whole, got = load_file(one / "model.safetensors"), parts[0] | parts[1]
    assert whole.keys() == got.keys() and all(torch.equal(tensor, got[name]) for name, tensor in whole.items())
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in zip(files, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == dtype.itemsize * sum(tensor.numel() for tensor in whole.values())
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(two, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == dtype


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"torch_dtype": "float32", "a": "dtype"}', b'{"torch_dtype": "bfloat16", "a": "dtype"}'),
        (b'{"dtype" :"float16",\n "v": {"dtype": null}}', b'{"dtype" :"bfloat16",\n "v": {"dtype": "bfloat16"}}'),
        (b'{"v": {"torch_dtype": "float32"}}', b'{\n  "torch_dtype": "bfloat16","v": {"torch_dtype": "bfloat16"}}'),
        (b'{\n  "a": "\\"dtype\\": null"\n}', b'{\n  "torch_dtype": "bfloat16",\n  "a": "\\"dtype\\": null"\n}'),
    ],
)
def test_the_config_says_the_dtype_of_the_weights(before: bytes, after: bytes):
    """Sections have one of their own in folders that newer transformers wrote; the oldest have none."""
    assert with_dtype(before, torch.bfloat16) == after
    assert with_dtype(after, torch.bfloat16) == after
    json.loads(after)


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
        folders.append(export_hugging_face(parts[0], plan(tmp_path)))
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
    for attempt in (
        lambda: try_export(tmp_path / "photos", "config.json", {}),
        lambda: export_hugging_face(TinyPolicy(), plan(tmp_path, "photos")),
    ):
        with pytest.raises(FileExistsError, match=r"exists and has no config\.json; choose another path"):
            attempt()
    try_export(tmp_path / "model", "config.json", {"config.json": b"{}"})
    with pytest.raises(OSError, match=r"will take 1000000000\.00 GB, but .* GB free: make"):
        try_export(tmp_path / "model", "config.json", {}, 10**18)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export_hugging_face(TinyPolicy(), plan(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "source"]


def test_what_cannot_be_exported_is_known_before_the_first_step(tmp_path: Path):
    """Through `open_run`, which every command that trains begins with."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    config = Config(train=TrainConfig(output_dir=str(tmp_path / "run")), video=VideoConfig(num_workers=0))
    with pytest.raises(FileExistsError, match=r"cannot export to .*model: it exists and has no config\.json"):  # noqa: SIM117
        with open_run(config, "train"):
            pass
    with open_run(replace(config, checkpoint=CheckpointConfig(export=False)), "train") as run:
        assert run.export is None
    (tmp_path / "run" / "model").rmdir()
    with open_run(config, "sft") as run:
        assert run.export is not None and json.loads(run.export.files["vcr1_fast.json"])["reader"] == run.source.name
    assert not (tmp_path / "run" / "model").exists()
