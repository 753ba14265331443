"""`train()` on fake GPUs, from clips to the exported model; vcr1_fast/fake_gpu/whole_run.py says what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.logged import logged
from vcr1_fast.fake_gpu.process import Case, run
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

FROZEN = ("--model.freeze_vision=true", "--model.lora.rank=4")
SCRIPTED = ("--algorithm.beta=0", "--rollout.max_new_tokens=64")  # its rewards differ
RUNS = {  # name to number of GPUs, model, settings
    "all of it": (1, "tiny", ()),
    "scripted answers": (1, "tiny", SCRIPTED),
    "frozen tower and adapters": (1, "tiny", FROZEN),
    "Qwen3-VL, frozen tower and adapters": (1, "tiny3", FROZEN),
    "8 ranks": (8, "tiny", ("--data.eval=[]",)),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    data, out = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("runs")
    write_dataset(SynthConfig(output_dir=str(data), num_train=8, num_eval=2, kinds=("grounding",)), show_progress=False)
    cases = []
    for name, (num_gpus, model, changes) in RUNS.items():
        settings = {
            "train.output_dir": out / name.replace(" ", "_"),
            "train.num_steps": 2,
            "train.prompts_per_step": 2 * num_gpus,
            "data.train": f"[{data}/train_grounding.jsonl]",
            "data.eval": f"[{data}/eval_grounding.jsonl]",
            "rollout.group_size": 2,
            "rollout.max_new_tokens": 4,
            "algorithm.beta": 0.04,
            "video.num_workers": 0,
            "video.reader": "pyav",
            "model.device": "cuda",
        }
        overrides = (*(f"--{key}={value}" for key, value in settings.items()), *changes)
        engine = "tests.fake_gpu.scripted:open_engine" if changes is SCRIPTED else ""
        cases.append(Case(name, num_gpus, model, {}, trains=True, engine=engine, overrides=overrides))
    return {report["name"]: report for report in run(cases)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_from_clips_to_an_exported_model(name: str, reports: dict[str, dict[str, Any]]):
    report = reports[name]
    assert "error" not in report, report["traceback"]
    folder = Path(report["result"]["run"])
    assert report["result"]["steps"] == 2 and (folder / "model" / "model.safetensors").is_file()
    lines = logged(folder)
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2]
    assert (folder / "checkpoints" / "step_000002").is_dir() == (RUNS[name][0] == 1)
    is_scripted = name == "scripted answers"
    assert report["result"]["engine"].startswith("scripted" if is_scripted else "local")
    # by rewards alone, without a KL term, both groups of a step reach the update
    assert [line["step_tokens/executed"] > 0 for line in lines if "grad_norm" in line] == [True, True]


def test_only_loading_and_the_local_engine_make_the_host_wait_for_copies(reports: dict[str, dict[str, Any]]):
    """The learner's update, its weight push and the reading of clips do not."""
    sites = {site.rpartition(":")[0] for site in reports["all of it"]["run"]["blocking_copies"]}
    allowed = {"learner/loading.py", "rollout/local_engine.py", "rollout/grouped_cache.py", "tasks/native_cuda.py"}
    assert sites <= {f"vcr1_fast/{file}" for file in allowed}
