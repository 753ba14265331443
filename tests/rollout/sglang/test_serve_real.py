"""The real SGLang engine behind `vcr1-fast serve`: over TCP it answers as a child of the trainer does."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vcr1_kernels import patchify

from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.serve import Server
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.rollout.sglang_pixels import pack
from vcr1_fast.rollout.sglang_remote import byte_levels
from vcr1_fast.types import SamplingParams

KEY = b"k" * 32
GREEDY = SamplingParams(2, 16, temperature=0.0)


@pytest.fixture
def prompts(make_prompt):
    """With patches of real frames, which travel as bytes."""
    generator = torch.Generator().manual_seed(3)

    def with_frames(prompt):
        t, h, w = prompt.patches.grid_thw
        frames = torch.randint(0, 256, (2 * t, 14 * h, 14 * w, 3), dtype=torch.uint8, generator=generator)
        return replace(prompt, patches=replace(prompt.patches, values_PC=patchify(frames, torch.float32)))

    made = [with_frames(make_prompt((2, 4, 4), "when", 1.0, 1)), with_frames(make_prompt((5, 8, 4), "where", 0.7, 2))]
    assert all("bytes_PC" in pack({"values_PC": prompt.patches.values_PC}, byte_levels()) for prompt in made)
    return made


@pytest.mark.slow
def test_over_tcp_it_answers_as_a_child_does_also_after_a_kill(
    random_engine, random_folder, settings, make_tiny_model, tiny_tokenizer, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", KEY.hex())
    weights = make_tiny_model(seed=6).state_dict()
    random_engine.load_weights(weights.items(), 50)
    local = random_engine.generate(prompts, GREEDY)

    server = Server(settings, random_folder, bind=("127.0.0.1", 0), gpus=[None], key=KEY, logs=tmp_path / "logs")
    try:
        server.start(300)
        station = server.stations[0]
        elsewhere = replace(settings, placement="disaggregated", addresses=(show(station.address),))
        engine = SGLangEngine(random_folder, tiny_tokenizer, elsewhere)
        engine.load_weights(weights.items(), 50)
        pid = station._child.pid
        for num_restarts in range(2):
            remote = engine.generate(prompts, GREEDY)
            assert engine.num_restarts == num_restarts
            for mine, theirs in zip(local, remote, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert a.token_ids_R.tolist() == b.token_ids_R.tolist()
                    # the same engine, weights and pixels; only what is batched together may differ
                    torch.testing.assert_close(a.logprobs_R, b.logprobs_R, atol=1e-5, rtol=0)
            if not num_restarts:
                os.killpg(pid, signal.SIGKILL)
        assert station.num_workers == 2 and station.facts["sglang"] == engine._workers.seats[0].worker.version
        pid = station._child.pid
        engine.close()
    finally:
        server.close()
    assert not Path(f"/proc/{pid}").exists()
