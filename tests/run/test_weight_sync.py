from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.recording_engine import RecordingEngine
from tests.tiny_policy import TinyPolicy, run_ranks
from vcr1_fast.run.weight_sync import WeightSync

WORKER = Path(__file__).with_name("sharded_weight_sync.py")
EMBEDDING = "model.language_model.embed_tokens.weight"


def test_one_process_gets_every_weight_under_its_checkpoint_name():
    policy, engine = TinyPolicy(), RecordingEngine()
    report = WeightSync(policy, engine).push()
    wanted = dict(policy.hf.named_parameters())
    assert list(engine.loaded) == list(wanted)
    assert all(torch.equal(engine.loaded[name], weight) for name, weight in wanted.items())
    assert not any(weight.requires_grad for weight in engine.loaded.values())
    assert (engine.policy_version, report.policy_version, report.num_tensors) == (1, 1, len(wanted))
    assert report.num_bytes == 4 * sum(weight.numel() for weight in wanted.values())
    assert 0 < report.duration_s < 60


def test_later_pushes_bring_the_new_values_and_leave_out_frozen_towers():
    policy, engine = TinyPolicy(), RecordingEngine()
    policy.hf.model.visual.requires_grad_(False)
    sync = WeightSync(policy, engine, policy_version=6)
    first = sync.push()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1.0)
    second = sync.push()
    assert (first.policy_version, second.policy_version, sync.policy_version) == (7, 8, 8)
    assert any("visual" in name for name in engine.pushes[0])
    assert set(engine.pushes[1]) == {name for name in engine.pushes[0] if "visual" not in name}
    assert torch.equal(engine.loaded[EMBEDDING], policy.hf.get_parameter(EMBEDDING))
    assert second.num_bytes < first.num_bytes


def test_an_engine_that_forgets_gets_every_weight_each_time():
    policy, engine = TinyPolicy(), RecordingEngine()
    policy.hf.model.visual.requires_grad_(False)
    sync = WeightSync(policy, engine, skips_frozen=False)
    assert sync.push().num_tensors == sync.push().num_tensors == len(list(policy.hf.parameters()))
    assert list(engine.pushes[1]) == list(engine.pushes[0])


def test_tied_weights_travel_once():
    engine = RecordingEngine()
    WeightSync(TinyPolicy(tied=True), engine).push()
    assert EMBEDDING in engine.loaded and "lm_head.weight" not in engine.loaded


class Broken(RecordingEngine):
    """Fails on the third weight of its first push."""

    is_broken = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        if not self.is_broken:
            return super().load_weights(weights, policy_version)
        for index, _ in enumerate(weights):
            if index == 2:
                self.source = weights
                self.is_broken = False
                raise RuntimeError("engine died")


def test_after_a_failed_push_all_gathers_were_made_and_the_next_one_brings_everything():
    policy, engine = TinyPolicy(), Broken()
    policy.hf.model.visual.requires_grad_(False)
    sync = WeightSync(policy, engine)
    with pytest.raises(RuntimeError, match="engine died"):
        sync.push()
    assert list(engine.source) == []  # used up, so no other rank waits
    assert sync.policy_version == 0
    assert sync.push().policy_version == 1
    assert set(engine.loaded) == {name for name, _ in policy.hf.named_parameters()}


def test_two_ranks_both_get_whole_weights(tmp_path: Path):
    run_ranks(WORKER)
