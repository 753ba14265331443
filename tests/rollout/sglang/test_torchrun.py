"""Two ranks of torchrun, each with a real SGLang worker of its own, as a node of GPUs runs them colocated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollout.sglang.parity import check_gaps
from tests.rollout.sglang.test_whole_run import steps_of
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

LIMIT_S = 600  # on two busy cores 170 s; a worker that waits for torchrun's store waits for ever


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_each_rank_of_torchrun_starts_a_worker_and_draws_from_it(sglang_python: str, tmp_path: Path):
    clips = SynthConfig(output_dir=str(tmp_path / "data"), num_train=2, num_eval=1, kinds=("grounding",))
    write_dataset(clips, show_progress=False)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "vcr1_fast", "train", "tiny", "--rollout.engine=sglang", f"--rollout.sglang.python={sglang_python}"),
        *(f"--data.train=[{tmp_path / 'data' / 'train_grounding.jsonl'}]", "--data.eval=[]", "--video.num_workers=1"),
        *(f"--train.output_dir={tmp_path / 'run'}", "--train.num_steps=1", "--train.prompts_per_step=2"),
        *("--rollout.group_size=8", "--checkpoint.export=false"),
    ]
    with (tmp_path / "output").open("wb") as stdout, (tmp_path / "errors").open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            code = process.wait(LIMIT_S)
        finally:
            process.terminate()  # torchrun ends its ranks
            process.wait()
    assert code == 0, (tmp_path / "errors").read_text()[-3000:]
    result = json.loads((tmp_path / "output").read_text().splitlines()[-1])
    assert result["steps"] == 1 and result["engine"].startswith("sglang 0.5.")
    check_gaps(steps_of(tmp_path / "run"))
