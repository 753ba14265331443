"""Factors of adapters: what is sent of them and when, and the sums that SGLang's process makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.rollout.sglang.test_delivery import BUCKET_BYTES, Worker
from tests.rollout.sglang.test_weights import FusedModel, checkpoint_of
from vcr1_fast.rollout.sgl import lora as sglang_lora
from vcr1_fast.rollout.sgl import workers as sglang_workers
from vcr1_fast.rollout.sgl.adapters import Adapters
from vcr1_fast.rollout.sgl.check import checksum
from vcr1_fast.rollout.sgl.lora import add_adapters
from vcr1_fast.rollout.sgl.workers import Workers
from vcr1_fast.settings.learning import SGLangConfig

SCALE, RANK = 0.5, 2
ADAPTED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def factors_of(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for name, weight in checkpoint_of(model).items():
        if any(f".{target}.weight" in name for target in ADAPTED):
            stem = name.removesuffix(".weight")
            factors[f"{stem}.lora_A"] = torch.randn(RANK, weight.shape[1], generator=generator)
            factors[f"{stem}.lora_B"] = torch.randn(weight.shape[0], RANK, generator=generator)
    return factors


def apply(model: nn.Module, factors: dict[str, torch.Tensor], folder: Path, *, is_fresh: bool = True) -> list[str]:
    """Through the loader's own door: bytes and an order, in two buckets. `is_fresh`: the model has its start."""
    wrong: list[str] = []
    names = list(factors)
    parts = [names[::2], names[1::2]]
    for index, part in enumerate(parts):
        entries, chunks, start = [], [], 0
        for name in part:
            flat_B = factors[name].reshape(-1).view(torch.uint8)
            place = {"start": start, "stop": start + flat_B.numel(), "checksum": checksum(factors[name])}
            entries.append({"name": name, "dtype": "float32", "shape": list(factors[name].shape), **place})
            chunks.append(flat_B)
            start += flat_B.numel()
        order = {"path": str(folder / "report.json"), "scale": SCALE, "entries": entries}
        order |= {"is_first": index == 0, "is_last": index == 1, "is_fresh": is_fresh and index == 0}
        note = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
        add_adapters(model, [("bytes", torch.cat(chunks)), ("order", note)])
        wrong += json.loads((folder / "report.json").read_text())
    return wrong


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_stand_where_the_matrices_stood_and_nothing_else_changes(tmp_path, device):
    model = FusedModel().to(device)
    start = {name: value.clone() for name, value in checkpoint_of(model).items()}
    for seed, is_fresh in ((1, True), (2, False)):
        factors = factors_of(model, seed)
        assert apply(model, factors, tmp_path, is_fresh=is_fresh) == []
        for name, held in checkpoint_of(model).items():
            stem = name.removesuffix(".weight")
            want = start[name].cpu()
            if f"{stem}.lora_A" in factors:  # always on top of the start, not of the last sum
                want = want + SCALE * factors[f"{stem}.lora_B"] @ factors[f"{stem}.lora_A"]
                assert not torch.allclose(held, start[name], atol=0.1)
            torch.testing.assert_close(held.cpu(), want, rtol=1e-6, atol=1e-6, msg=name)


def test_new_matrices_are_the_start_from_then_on(tmp_path):
    model = FusedModel()
    factors = factors_of(model, 1)
    assert apply(model, factors, tmp_path) == []
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(2.0)
    assert apply(model, factors, tmp_path) == []
    stem = "model.block.q_proj"
    want = 2.0 + SCALE * factors[f"{stem}.lora_B"] @ factors[f"{stem}.lora_A"]
    torch.testing.assert_close(checkpoint_of(model)[f"{stem}.weight"], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda factors: factors.pop("model.block.q_proj.lora_A"), "only one factor came"),
        (lambda factors: factors.update({"model.block.z_proj.lora_A": torch.ones(2, 6)}), "only one factor came"),
        (
            lambda factors: factors.update({f"model.z_proj.lora_{f}": torch.ones(2, 2) for f in "AB"}),
            "'model.z_proj.weight' is not a weight",
        ),
        (lambda factors: factors.update({"model.block.q_proj.lora_A": torch.ones(2, 99)}), "has no place for"),
    ],
)
def test_factors_that_do_not_fit_are_named(tmp_path, break_it, message):
    model = FusedModel()
    factors = factors_of(model, 1)
    break_it(factors)
    wrong = apply(model, factors, tmp_path)
    assert len(wrong) == 1 and message in wrong[0]


def test_damaged_factors_are_named_and_nothing_is_added(tmp_path, monkeypatch):
    model = FusedModel()
    before = {name: value.clone() for name, value in checkpoint_of(model).items()}
    cut_out = sglang_lora._cut_out
    monkeypatch.setattr(sglang_lora, "_cut_out", lambda flat_B, entry: cut_out(flat_B, entry) + 1)
    wrong = apply(model, dict(list(factors_of(model, 1).items())[:2]), tmp_path)
    assert any("did not arrive as it was sent" in problem for problem in wrong)
    assert all(torch.equal(value, before[name]) for name, value in checkpoint_of(model).items())


class AdapterWorker(Worker):
    """Notes each message: where from, whether it ends the load, and whether the sums begin anew."""

    def __init__(self, **how: object) -> None:
        super().__init__({}, **how)  # pyright: ignore[reportArgumentType]
        self.came: list[tuple[str, bool, bool | None]] = []
        self.name, self.num_stops = "scripted", 0

    def ask(self, kind, fields, tensors, timeout_s):  # type: ignore[no-untyped-def]
        if kind == "weights":
            self.came.append((fields["source"], fields["ends"], fields.get("is_fresh")))
        return super().ask(kind, fields, tensors, timeout_s)

    def _adapters(self, fields, tensors):  # type: ignore[no-untyped-def]
        bytes_B = tensors["bytes_B"]
        return bytes_B if isinstance(bytes_B, torch.Tensor) else bytes_B.bytes_B


MATRIX = [("model.q_proj.weight", torch.ones(4, 3)), ("visual.w", torch.ones(2))]
FACTORS = [("model.q_proj.lora_A", torch.ones(2, 3)), ("model.q_proj.lora_B", torch.ones(4, 2))]


@pytest.fixture
def workers(tmp_path, monkeypatch):
    worker = AdapterWorker()
    monkeypatch.setattr(sglang_workers, "make_workers", lambda *_: [worker])
    config = SGLangConfig(backoff_s=0.0, adapters_only=True)
    made = Workers(config, {"device": "cpu"}, tmp_path, torch.float32, adapter_scale=SCALE)
    yield made, worker
    made.close()


def test_matrices_travel_once_and_factors_end_every_load(workers):
    made, worker = workers
    made.load([*MATRIX, *FACTORS], 1)
    made.load([(name, value * 2) for name, value in FACTORS], 2)
    assert worker.came == [("bytes", False, None), ("adapters", True, True), ("adapters", True, False)]
    assert worker.versions[-1] == 2 and made.has_weights
    assert torch.equal(worker.held["model.q_proj.lora_B"], torch.full((4, 2), 2.0))


def test_a_worker_that_is_started_again_gets_matrices_and_the_newest_factors(workers):
    made, worker = workers
    made.load([*MATRIX, *FACTORS], 1)
    made.load([(name, value * 3) for name, value in FACTORS], 2)
    worker.came.clear()
    made.revive(made.seats[0], "was killed")
    assert worker.came == [("bytes", False, None), ("adapters", True, True)]
    assert torch.equal(worker.held["model.q_proj.lora_A"], torch.full((2, 3), 3.0))


def test_a_model_without_adapters_is_loaded_all_the_same(workers):
    """An evaluation of a checkpoint with the settings of its training."""
    made, worker = workers
    made.load(MATRIX, 0)
    assert worker.came == [("bytes", False, None), ("adapters", True, True)] and made.has_weights


def test_factors_alone_before_any_matrix_are_refused(workers):
    made, _ = workers
    with pytest.raises(ValueError, match="no load may be empty"):
        made.load(FACTORS, 1)


@pytest.mark.parametrize("given", [FACTORS[:1], [*FACTORS, ("model.z.lora_A", torch.ones(1, 1))]])
def test_other_factors_than_the_first_are_refused(given):
    adapters = Adapters(BUCKET_BYTES, torch.float32, SCALE)
    assert list(adapters.keeping([*MATRIX, *FACTORS])) == MATRIX
    with pytest.raises(ValueError, match="1 factors of adapters are missing, new or of another shape"):
        list(adapters.keeping(given))
    adapters.close()
