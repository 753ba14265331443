import dataclasses
import json
import logging
import math
import os
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2_5_VLForConditionalGeneration

import vcr1_fast.run.checkpoint as checkpoint
from tests.run.sharded_checkpoint import CONFIG, whole_state
from tests.tiny_policy import TinyPolicy, run_ranks, tiny_folder, tokens
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import checkpoint_files, checkpoint_layout, folder, random_state
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.checkpoint_files import latest_checkpoint, resolve_resume
from vcr1_fast.run.folder import prepare_output_dir
from vcr1_fast.run.tensor_files import write_tensors
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.types import RunError

WORKER = Path(__file__).with_name("sharded_checkpoint.py")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ordinary errors may clean up after it."""


def make(seed: int = 0, tied: bool = False) -> tuple[TinyPolicy, AdamW, LambdaLR]:
    policy = TinyPolicy(tied=tied, seed=seed)
    optimizer = build_optimizer(policy, CONFIG)
    return policy, optimizer, build_schedule(optimizer, CONFIG, 10)


def train(parts: tuple[TinyPolicy, AdamW, LambdaLR], num_updates: int) -> list[float]:
    """Updates on random tokens drawn from all three global generators; returns the losses."""
    policy, optimizer, schedule = parts
    losses = []
    for _ in range(num_updates):
        seed = random.randrange(1 << 20) + int(np.random.randint(1 << 20)) + int(torch.randint(1 << 20, ()))
        loss = policy(tokens(seed))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(step: int) -> RunState:
    return RunState(step, 10 * step, 100 * step, step + 1, "pyav 18.1", f"train:\n  num_steps: {step}\n")


def save(run: Path, parts: tuple[TinyPolicy, AdamW, LambdaLR], step: int, keep: int = 10) -> Path:
    return save_checkpoint(run, *parts, state(step), SINGLE_PROCESS, keep)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return prepare_output_dir(tmp_path / "run")


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_continues_bit_for_bit(run: Path, tied: bool):
    parts = make(tied=tied)
    seed_all(3)
    random.gauss(0, 1)  # the generators of normal numbers keep a spare one, which must survive too
    np.random.normal()
    train(parts, 2)
    path = save(run, parts, 2)
    assert path == run / "checkpoints" / "step_000002"
    saved = whole_state(parts[0], parts[1])
    losses = train(parts, 2)
    normals = (random.gauss(0, 1), np.random.normal())

    fresh = make(seed=9, tied=tied)
    seed_all(99)
    assert load_checkpoint(path, *fresh, SINGLE_PROCESS) == state(2)
    loaded = whole_state(fresh[0], fresh[1])
    assert loaded.keys() == saved.keys()
    # The decoder, `one`, and the head unless it is tied have moments; the vision tower was not fed.
    num_decoder = len(list(parts[0].hf.model.language_model.parameters()))
    assert sum(name.startswith("exp_avg_sq ") for name in saved) == num_decoder + (1 if tied else 2)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert fresh[2].get_last_lr() == [group["lr"] for group in fresh[1].param_groups] == pytest.approx([0.008, 0.008])
    assert train(fresh, 2) == losses
    assert (random.gauss(0, 1), np.random.normal()) == normals
    for name, tensor in whole_state(parts[0], parts[1]).items():
        assert torch.equal(whole_state(fresh[0], fresh[1])[name], tensor), name


def test_state_file_is_readable_and_says_what_made_it(run: Path):
    path = save(run, make(), 7)
    document = json.loads((path / "state.json").read_text())
    assert (document["step"], document["position"], document["reader"]) == (7, 70, "pyav 18.1")
    assert document["versions"]["torch"] == torch.__version__
    assert sorted(document["files"]) == sorted(
        str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != "state.json"
    )
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}  # nothing pickled


def test_tensors_are_spread_over_files_of_bounded_size(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_layout, "FILE_BYTES", 100_000)
    parts = make()
    train(parts, 1)
    path = save(run, parts, 1)
    sizes = [p.stat().st_size for p in path.glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) < 150_000  # one header and one tensor over the bound at most
    fresh = make(seed=1)
    load_checkpoint(path, *fresh, SINGLE_PROCESS)
    assert torch.equal(fresh[0].hf.lm_head.weight, parts[0].hf.lm_head.weight)


def test_weights_alone_can_be_loaded(run: Path):
    parts = make()
    path = save(run, parts, 1)
    fresh = make(seed=1)
    draws = random.getstate()
    load_checkpoint(path, fresh[0], None, None, SINGLE_PROCESS)
    assert torch.equal(fresh[0].hf.lm_head.weight, parts[0].hf.lm_head.weight)
    assert random.getstate() == draws


def test_loading_moments_into_a_used_optimizer_forgets_its_own(run: Path):
    path = save(run, make(), 0)  # before the first update: no moments
    used = make()
    train(used, 1)
    load_checkpoint(path, *used, SINGLE_PROCESS)
    assert not used[1].state


MOMENTS = [("write_file", 1), ("write_state", 1), ("_flush", 1), ("rename", 1), ("rename", 2)]


@pytest.mark.parametrize(("operation", "number"), MOMENTS, ids=lambda part: str(part))
@pytest.mark.parametrize("has_older", [False, True])
def test_a_save_killed_at_any_moment_loses_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int, has_older: bool
):
    """Before it is complete the previous one stands; afterwards the next start gives it its name.

    At the second rename an older one of that step has made room: neither has the name then.
    """
    if number == 2 and not has_older:
        return  # there is only one rename
    is_complete = operation in ("_flush", "rename")
    parts, older = make(), make(seed=3)
    first, second = save(run, parts, 1), save(run, older, 2)
    if not has_older:
        shutil.rmtree(second)
    train(parts, 1)
    calls: list[str] = []

    def mortal(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if calls.count(operation) >= number or (calls.append(name), calls.count(operation))[1] >= number:
                raise Killed  # and from then on whatever is asked for
            return action(*arguments, **options)

        return act

    with monkeypatch.context() as patch:
        for module, name in ((checkpoint, "write_file"), (checkpoint, "write_state"), (folder, "_flush")):
            patch.setattr(module, name, mortal(name, getattr(module, name)))
        patch.setattr(os, "rename", mortal("rename", os.rename))
        patch.setattr(shutil, "rmtree", mortal("rmtree", shutil.rmtree))
        with pytest.raises(Killed):
            save(run, parts, 2)
    assert latest_checkpoint(run) == (second if has_older and number == 1 else first)
    prepare_output_dir(run)
    want = parts if is_complete else older
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    if not is_complete and not has_older:
        assert names == ["step_000001"]
        return
    assert names == ["step_000001", "step_000002"]
    fresh = make(seed=9)
    load_checkpoint(second, *fresh, SINGLE_PROCESS)
    assert torch.equal(fresh[0].hf.lm_head.weight, want[0].hf.lm_head.weight)


def test_generators_are_seeded_apart_on_each_rank_but_torch():
    drawn = []
    for seed, rank in ((1, 0), (1, 0), (1, 1), (2, 0)):
        random_state.seed_generators(seed, rank)
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    first, again, other_rank, other_seed = drawn
    assert first == again and first[0] == other_rank[0] != other_seed[0]
    assert len({first[1], other_rank[1], other_seed[1]}) == len({first[2], other_rank[2], other_seed[2]}) == 3


def test_tensors_on_a_full_disk_are_an_oserror_and_their_mode_is_the_folders(tmp_path: Path):
    tmp_path.chmod(0o750)
    write_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # Python ignores the signal, so writing fails
    try:
        with pytest.raises(OSError, match=r"b\.safetensors cannot be written: .*File too large"):
            write_tensors({"b": torch.zeros(1 << 16)}, tmp_path / "b.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_what_is_not_finite_is_never_saved(run: Path, value: float, which: str):
    """A checkpoint of it would be resumed from for ever; the one before stays."""
    parts = make()
    train(parts, 1)
    first = save(run, parts, 1)
    weight = parts[0].hf.lm_head.weight
    with torch.no_grad():
        (weight if which == "model" else parts[1].state[weight]["exp_avg_sq"]).view(-1)[7] = value
    with pytest.raises(RunError, match=rf"after step 2 {which}\..*lm_head.weight is not finite, so no checkpoint"):
        save(run, parts, 2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [first.name]


def test_a_failed_save_gives_its_space_back(run: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save(run, make(), 2)
    assert list((run / "checkpoints").iterdir()) == []


def test_a_failure_while_torch_plans_is_an_oserror(run: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_layout._Listing, "write_data", fail)
    with pytest.raises(OSError, match=r"cannot plan checkpoint .*No space left on device"):
        save(run, make(), 2)
    assert list((run / "checkpoints").iterdir()) == []


def test_the_last_saved_are_kept_even_after_going_back(run: Path):
    parts = make()
    for step in (10, 20, 30):
        save(run, parts, step, keep=2)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_000020", "step_000030"]
    save(run, parts, 15, keep=1)  # a run that was resumed from step 10 kept elsewhere
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000015"]
    assert latest_checkpoint(run) == run / "checkpoints" / "step_000015"


def test_saving_a_step_again_replaces_it(run: Path):
    parts = make()
    save(run, parts, 1)
    train(parts, 1)
    path = save(run, parts, 1)
    fresh = make(seed=1)
    load_checkpoint(path, *fresh, SINGLE_PROCESS)
    assert torch.equal(fresh[0].hf.lm_head.weight, parts[0].hf.lm_head.weight)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000001"]


def cut_tensors(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def lose_tensors(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state.json is damaged: JSONDecodeError": lambda path: (path / "state.json").write_text("{"),
    "state.json is damaged: it does not fit": lambda path: flip_bit(
        path / "state.json", 8 * (path / "state.json").read_bytes().index(b'"position": ') + 8 * 12
    ),
    r"bytes, wanted \d+": cut_tensors,
    r"no file .*\.safetensors": lose_tensors,
    r"shard-00001.* has CRC-32 \w{8}, wanted \w{8}": lambda path: flip_bit(next(path.glob("*.safetensors")), 800_000),
    "rng/rank_00000.safetensors has CRC-32": lambda path: flip_bit(path / "rng" / "rank_00000.safetensors", 8_001),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_refused(run: Path, caplog: pytest.LogCaptureFixture, reason: str):
    parts = make()
    first, second = save(run, parts, 1), save(run, parts, 2)
    DAMAGE[reason](second)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run) == first
    assert re.search(f"passing over checkpoint .*step_000002: .*{reason}", caplog.text)
    with pytest.raises(ConfigError, match=f"is not a complete checkpoint .*{reason}"):
        resolve_resume(str(second), run)
    DAMAGE[reason](first)
    with pytest.raises(
        ConfigError, match=r"no checkpoint that can be read .*restore one from a copy, or to start anew"
    ):
        resolve_resume("auto", run)
    with pytest.raises(ConfigError, match=r"train.resume is never, but .* holds checkpoints"):
        resolve_resume("never", run)


def test_no_flipped_bit_is_loaded(run: Path):
    """Of all files of a checkpoint, state.json most: its bits are few, and each of them means something."""
    path = save(run, make(), 1)
    rng = random.Random(5)
    files = [(path / "state.json", 150), *((file, 25) for file in path.rglob("*.safetensors"))]
    for file, count in files:
        whole = file.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), count):
            flip_bit(file, bit)
            if checkpoint_files.is_intact(path):  # white space of state.json alone means nothing
                assert file.name == "state.json" and json.loads(file.read_bytes()) == json.loads(whole), bit
            file.write_bytes(whole)
    assert checkpoint_files.is_intact(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / "state.json").read_text())
    change(document)
    del document["crc32"]
    document["crc32"] = checkpoint_files.crc32_of_document(document)
    (path / "state.json").write_text(json.dumps(document))


def test_checkpoints_of_other_formats(run: Path):
    """Those of before the digests are read; one of a newer version is neither read nor replaced."""
    parts = make()
    first, second = save(run, parts, 1), save(run, parts, 2)
    document = json.loads((first / "state.json").read_text()) | {"format": 1}
    document["files"] = {name: entry["bytes"] for name, entry in document["files"].items()}
    del document["crc32"]
    (first / "state.json").write_text(json.dumps(document))
    assert resolve_resume(str(first), run) == first
    assert load_checkpoint(first, *parts, SINGLE_PROCESS) == state(1)
    rewrite(second, lambda document: document.update(format=3))
    with pytest.raises(ConfigError, match=r"step_000002 has format 3, this version .* up to 2: install 0\."):
        resolve_resume("auto", run)


def test_a_checkpoint_of_another_model_is_refused(run: Path):
    path = save(run, make(), 1)
    policy = TinyPolicy()
    policy.hf.lm_head = torch.nn.Linear(32, 66, bias=False)
    with pytest.raises(ConfigError, match=r"hf.lm_head.weight is \(67, 32\), wanted \(66, 32\): set model.path"):
        load_checkpoint(path, policy, None, None, SINGLE_PROCESS)
    policy = TinyPolicy()
    policy.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"model.extra is absent, wanted \(3,\)"):
        load_checkpoint(path, policy, None, None, SINGLE_PROCESS)


def test_resolve_resume(run: Path, tmp_path: Path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert resolve_resume("auto", run) is None
    assert resolve_resume("never", run) is None
    (run / "checkpoints" / "step_000003.tmp-1").mkdir()
    assert resolve_resume("never", run) is None
    first, second = save(run, make(), 1), save(run, make(), 2)
    assert resolve_resume("auto", run) == second
    assert resolve_resume(str(first), run) == first
    with pytest.raises(ConfigError, match=r"holds checkpoints \(latest: step_000002\): choose another"):
        resolve_resume("never", run)
    with pytest.raises(ConfigError, match=r"which is not a complete checkpoint \(no file state.json\)"):
        resolve_resume(str(tmp_path), run)


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"output_dir is .*file/run, which cannot be written \(Not a"):
        prepare_output_dir(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="which cannot be written"):
        prepare_output_dir("/proc/run")


def test_preparing_deletes_only_what_a_save_left(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`adapter` was killed between the two renames of its replacement."""
    names = ("model.tmp-12", "notes.tmp-old", "model", "checkpoints/step_000001.tmp-old-3", "adapter.tmp-old-12")
    for name in (*names, "adapter.tmp-12/new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a.tmp-1").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert prepare_output_dir(tmp_path) == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tmp-1", "adapter", "checkpoints", "model", "notes.tmp-old"]
    assert (tmp_path / "adapter" / "new").is_dir()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert caplog.text.count("left by a save that did not finish") == 2


def test_a_checkpoint_from_before_the_task_scale_still_loads(run: Path):
    parts = make()
    train(parts, 1)
    scaled = dataclasses.replace(state(1), task_scale={"video_quality": [0.5, 0.25]})
    path = save_checkpoint(run, *parts, scaled, SINGLE_PROCESS, keep=2)
    assert load_checkpoint(path, *parts, SINGLE_PROCESS) == scaled
    rewrite(path, lambda document: document.pop("task_scale"))
    assert load_checkpoint(path, *parts, SINGLE_PROCESS) == state(1)


def test_checkpoints_move_between_one_process_and_two_ranks(run: Path):
    parts = make()
    train(parts, 2)
    save(run, parts, 2)
    one = whole_state(parts[0], parts[1])
    tiny_folder(run / "start")
    run_ranks(WORKER, str(run))
    want = load_file(run / "want.safetensors")
    assert {n.removeprefix("loaded ") for n in want if n.startswith("loaded ")} == one.keys()
    assert all(torch.equal(want[f"loaded {name}"], tensor) for name, tensor in one.items())

    path = run / "checkpoints" / "step_000003"
    assert len(list(path.glob("*.safetensors"))) == len(list(path.glob("rng/*"))) == 2  # one file of each rank
    fresh = make(seed=4)
    assert load_checkpoint(path, *fresh, SINGLE_PROCESS) == RunState(3, 30, 300, 4, "pyav 18", "a: 1\n")
    for name, tensor in whole_state(fresh[0], fresh[1]).items():
        assert torch.equal(tensor, want[f"saved {name}"]), name
    assert not torch.equal(want["saved hf.lm_head.weight"], one["hf.lm_head.weight"])  # the two ranks did train
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model")
    assert all(torch.equal(tensor, fresh[0].hf.state_dict()[name]) for name, tensor in model.state_dict().items())
