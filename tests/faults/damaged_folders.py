"""Damage to a whole run's folder before it is started again, and to the folder of the model that it starts from."""

from __future__ import annotations

import random
import shutil

from tests.faults import damage
from tests.faults.runs import run
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_is_refused_or_same, check_same, resumed_step, what_is_left
from vcr1_fast.run.model_folder import model_folder

HISTORY = ("metrics.jsonl", "rewards.jsonl", "config.yaml", "quarantine.jsonl")  # beside the checkpoints


def damage_a_run(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """Killed after three steps, then damaged: the weights at its end must be those of the undisturbed run."""
    variant = rng.choice(runs.variants)
    undisturbed = runs.undisturbed(variant)
    folder = shutil.copytree(undisturbed.after_three, bench.empty_folder() / "run")
    bench.fault = f"{variant}: {damage.damage_a_file(rng, folder)}"
    ended = run(runs.arguments(variant, folder), folder.parent / "resumed").checked()
    if ended.code != 0:
        ended.refusal()
        if len(list((folder / "checkpoints").glob("step_*"))) > 1:
            raise LostError(f"refused, though another checkpoint is good: {ended.refusal()}")
        return
    is_checkpoint = "checkpoints/" in bench.fault
    if resumed_step(ended) < (1 if variant != "lora" else 0) + (0 if is_checkpoint else 2):
        raise LostError(f"it went on from step {resumed_step(ended)}")
    want = undisturbed.left
    if is_checkpoint:
        check_same(what_is_left(folder, ended), want)
    else:  # history that was damaged stays so
        import hashlib

        weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        if weights != want.weights:
            raise LostError("damage beside the checkpoints changed the weights")


def damage_a_model(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """A file of model.path is cut, emptied, deleted, or a pointer of git-lfs: one line, or all as it was."""
    variant, folder = rng.choice(runs.variants), bench.empty_folder()
    model = folder / "model"
    left_out = shutil.ignore_patterns("*.py", "__pycache__", "*.yaml", "qwen3_vl")
    shutil.copytree(model_folder("tiny"), model, ignore=left_out)
    path = rng.choice(sorted(model.iterdir()))
    name = rng.choice(["cut", "empty", "delete", "pointer", "text"])
    if name == "pointer":
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 4469624\n"
        )
    elif name == "text":
        path.write_text("<html><body>404 Not Found</body></html>\n")
    where = damage.WAYS[name](rng, path) if name in damage.WAYS else ""
    bench.fault = f"{variant}: {name} {path.name}{where} of model.path"
    ended = run(runs.arguments(variant, folder / "run", f"--model.path={model}"), folder / "log")
    check_is_refused_or_same(runs, variant, folder / "run", ended)
