"""Where numbers go beside metrics.jsonl: the real writers where they are installed, and what a broken one costs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
import sys
import time
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vcr1_fast.run.telemetry import Telemetry
from vcr1_fast.run.writers import IDS_FILE
from vcr1_fast.settings import checks
from vcr1_fast.settings.config import Config, ConfigError, TrainConfig

CONFIG = "model:\n  path: tiny\ntrain:\n  seed: 7\n"
PICTURE = np.zeros((4, 6, 3), np.uint8)


def log_three_steps(folder: Path, writer: str) -> None:
    """Two steps and a killed one, then the run goes on from the second."""
    first = Telemetry(folder, log_to=(writer,), config_yaml=CONFIG)
    for step in (1, 2, 3):
        first.log_step(step, {"reward": step / 10, "kl": float("nan")}, num_steps=4)
    first.log_media(2, {"samples": "said: <b>a</b>"}, {"clip": PICTURE})
    first.close()
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which begin with the second
    second = Telemetry(folder, log_to=(writer,), config_yaml=CONFIG, resume_step=2)
    second.log_step(3, {"reward": 0.9}, num_steps=4)
    second.log_eval(3, {"miou": 0.5})
    second.close()


def test_tensorboard_has_numbers_configuration_and_pictures(tmp_path: Path) -> None:
    log_three_steps(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("reward")] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    [text] = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")}
    assert text == "".join(f"    {line}\n" for line in CONFIG.splitlines())
    [picture] = events.Images("clip")
    assert (picture.step, picture.height, picture.width) == (2, 4, 6)
    assert not (tmp_path / IDS_FILE).exists()


def wandb_records(file: Path) -> list[bytes]:
    """Those of a .wandb file: after 7 bytes a log as LevelDB writes it. Blocks of 32 KiB; CRC, length, kind, data."""
    data, at, records, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(whole)
            whole = b""
    return records


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    log_three_steps(tmp_path, "wandb")
    logged, ids, seeds = [], set(), set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in map(Record.FromString, wandb_records(file)):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                seeds |= {item.value_json for item in record.run.config.update if item.key == "train"}
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                logged.append(items)
    assert ids == {json.loads((tmp_path / IDS_FILE).read_text())["wandb"]}
    assert [json.loads(seed) for seed in seeds] == [{"seed": 7}]
    steps = [(int(row["step"]), float(row["reward"])) for row in logged if "reward" in row]
    assert steps == [(1, 0.1), (2, 0.2), (3, 0.3), (3, 0.9)]  # the killed step and the one that came for it
    assert all("kl" not in row for row in logged)
    [media] = [row for row in logged if "clip" in row or "clip/_type" in row]
    assert "image-file" in str(media) and "table-file" in str(media)
    assert "step 3/4" in capfd.readouterr().out  # what the run prints stays where it was


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "kept")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "kept")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    log_three_steps(tmp_path / "run", "trackio")
    assert capfd.readouterr().out.count("\n") == 5  # four steps and a held-out score: its greetings are not among them
    with contextlib.closing(sqlite3.connect(next((tmp_path / "kept").glob("*.db")))) as kept:
        rows = kept.execute("select run_name, step, metrics from metrics order by id").fetchall()
        [(config,)] = kept.execute("select config from configs").fetchall()
    assert {row[0] for row in rows} == {f"run-{json.loads((tmp_path / 'run' / IDS_FILE).read_text())['trackio']}"}
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    rewards = [(step, metrics["reward"]) for step, metrics in values if "reward" in metrics]
    assert rewards == [(1, 0.1), (2, 0.2), (3, 0.3), (3, 0.9)]
    assert (3, {"eval/miou": 0.5}) in values and json.loads(config)["train"] == {"seed": 7}
    [media] = [metrics for _, metrics in values if "clip" in metrics]
    assert media["clip"]["_type"] == "trackio.image" and media["samples"]["_value"] == "    said: <b>a</b>\n"


class BrokenRun:
    """Of a service that takes the first step and is down after it."""

    def __init__(self) -> None:
        self.num_logged = 0

    def define_metric(self, *_: str, **__: object) -> None: ...

    def log(self, values: dict[str, object]) -> None:
        self.num_logged += 1
        if self.num_logged > 1:
            raise ConnectionError("no network")

    def finish(self) -> None:
        raise ConnectionError("no network")


def put_wandb(monkeypatch: pytest.MonkeyPatch, init: object) -> None:
    module = types.SimpleNamespace(init=init, Settings=lambda **_: None, Table=lambda **_: None, Image=lambda _: None)
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize("fails_at", ["start", "step"])
def test_a_service_that_is_down_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, fails_at) -> None:
    def init(**_: object) -> BrokenRun:
        if fails_at == "start":
            raise RuntimeError("api_key not configured")
        return BrokenRun()

    put_wandb(monkeypatch, init)
    telemetry = Telemetry(tmp_path, log_to=("wandb", "tensorboard"), config_yaml=CONFIG)
    for step in (1, 2, 3):
        telemetry.log_step(step, {"reward": 0.5}, num_steps=3)
    telemetry.log_media(3, {"samples": "x"}, {"clip": PICTURE})
    telemetry.close()
    reason = {"start": "api_key not configured", "step": "no network"}[fails_at]
    assert capsys.readouterr().err == f"cannot write wandb ({reason}); the run goes on without it\n"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]


def test_other_ranks_open_no_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wandb(monkeypatch, lambda **_: pytest.fail("opened on rank 1"))
    telemetry = Telemetry(tmp_path, rank=1, log_to=("wandb",))
    telemetry.log_step(1, {"reward": 0.5}, num_steps=1)
    telemetry.log_media(1, {"samples": "x"}, {})
    telemetry.close()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_not_installed_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(train=TrainConfig(log_to=("tensorboard", "trackio")))
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "trackio" else True)
    with pytest.raises(ConfigError, match=r"names trackio, which is not installed: pip install 'trackio>=0.40,<1', or"):
        checks.check_settings(config, "train")
    checks.check_settings(config, "eval")  # which logs no steps


def test_extras_are_what_the_message_says() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {name: [wanted] for name, wanted in checks.SERVICES.items()} == {
        name: project["optional-dependencies"][name] for name in ("wandb", "trackio")
    }
