"""`python -m bench select`: rows drawn by difficulty (`vcr1-fast select`) against as many drawn at random.

TimeLens' recipe, small: the packaged model, the overlap alone as reward, advantages not scaled, no KL, a frozen tower,
a constant rate, one epoch of what was drawn. Answers keep the form that the packaged model was taught. Of the pool a
quarter are events of half the clip, a quarter shorter ones, and one half clips twice as long as the model was taught,
which it cannot read. Greedy answers to the pool once; then for each seed and each draw a run of equal steps; then
greedy answers to the same held-out clips of the kinds that can be learned. Every stage is a command that a user types.

The bells were fixed before a held-out clip of this pool was answered: 0.05 is TimeLens', 0.5 half of what can be
earned. Two other pools are in bench/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.columns import heads_of, print_rows
from vcr1_fast.commands.select import select_command
from vcr1_fast.evaluate import evaluate_command
from vcr1_fast.evaluation.samples import read_samples, write_lines
from vcr1_fast.settings.io import load_config
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.train import train

CLIPS = SynthConfig(kinds=("grounding",))
KINDS = {  # the share of the pool, and its clips
    "easy": (0.25, replace(CLIPS, time_step_s=4.0, seed=101)),
    "middling": (0.25, replace(CLIPS, seed=102)),
    "too long": (0.5, replace(CLIPS, duration_s=16.0, seed=103)),
}
HELD_OUT = ("easy", "middling")
RANDOM = "random"
BELLS = {"0.05 ± 0.2": (0.05, 0.2), "0.5 ± 0.2": (0.5, 0.2)}  # mean, standard deviation
PROMPTS_PER_STEP = 8
RECIPE = (
    "--model.freeze=[visual.patch_embed.*, visual.blocks.*]",
    "--task.reward_weights={format: 0.0, iou: 1.0}",
    "--algorithm.scale_advantages=none",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
    f"--train.prompts_per_step={PROMPTS_PER_STEP}",
    "--video.num_workers=0",  # starting one takes as long as ten steps
)
COLUMNS = {
    "draw": ("rows drawn", "random, or by difficulty: mean ± standard deviation of the bell (vcr1-fast select)"),
    **{kind: (f"{kind}, %", f"share of {kind} rows among those drawn, mean over the seeds") for kind in KINDS},
    "miou": ("mIoU", "on the held-out clips of all kinds after the run, mean over the seeds"),
    "low": ("lowest", "that of the worst seed"),
    "high": ("highest", "that of the best seed"),
    "gain": ("to random", "mIoU less that of the random draw of the same seed, mean over the seeds"),
    "gain_error": ("+-", "its standard error over the seeds"),
    **{f"{kind}_miou": (f"on {kind}", f"mIoU on held-out {kind} clips, mean over the seeds") for kind in HELD_OUT},
}
COLUMN_HEADS = heads_of(COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pool", type=int, default=512, help="rows of the pool")
    parser.add_argument("--held-out", type=int, default=48, help="held-out clips of each kind")
    parser.add_argument("--target", type=int, default=128, help=f"rows drawn, {PROMPTS_PER_STEP} a step, once each")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each draw; a seed is of its draw and its answers")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        pool, held_out = write_clips(Path(folder), arguments.pool, arguments.held_out)
        asked = commands.answers("pool", "tiny", pool)
        pool_miou, before = by_kind(asked), by_kind(commands.answers("before", "tiny", held_out))
        print(json.dumps({"pool": pool_miou}), flush=True)
        for seed in range(arguments.seeds):
            for draw in (RANDOM, *BELLS):
                drawn = Path(folder) / f"{len(runs)}.jsonl"
                draw_rows(draw, asked, drawn, arguments.target, seed)
                steps, chosen = arguments.target // PROMPTS_PER_STEP, f"--data.only={drawn}"
                model = commands.train(drawn.stem, pool, steps, f"--train.seed={seed}", chosen)
                after = by_kind(commands.answers(drawn.stem, model, held_out))
                runs.append({"draw": draw, "seed": seed, "drawn": shares(drawn), "miou": after})
                print(json.dumps(runs[-1]), flush=True)
    rows = [summary(draw, runs) for draw in (RANDOM, *BELLS)]
    print_rows(rows, COLUMNS, f"{arguments.target} of {arguments.pool} rows; before: mIoU {before['all']:.3f}")
    sizes = {name: getattr(arguments, name) for name in ("pool", "held_out", "target", "seeds")}
    return {"sizes": sizes, "before": before, "pool_miou": pool_miou, "rows": rows, "runs": runs}


@dataclass(frozen=True)
class Commands:
    """What a user would type, in a folder of its own."""

    folder: Path

    def answers(self, name: str, model: str, files: Sequence[Path]) -> Path:
        """samples.jsonl of greedy answers (vcr1-fast eval)."""
        settings = (f"--data.eval=[{','.join(map(str, files))}]", "--data.train=[]")
        folder = self.folder / "answers" / name
        settings = (*settings, f"--model.path={model}", f"--eval.output_dir={folder}")
        evaluate_command(load_config("tiny", [*RECIPE, *settings]))
        return folder / "samples.jsonl"

    def train(self, name: str, files: Sequence[Path], steps: int, *settings: str) -> str:
        """The folder of the trained model (vcr1-fast train)."""
        folder = self.folder / "runs" / name
        data = (f"--data.train=[{','.join(map(str, files))}]", "--data.eval=[]")
        where = (f"--train.num_steps={steps}", f"--train.output_dir={folder}")
        train(load_config("tiny", [*RECIPE, *data, *where, *settings]))
        return str(folder / "model")


def draw_rows(draw: str, asked: Path, output: Path, target: int, seed: int) -> None:
    """Write the file for data.only."""
    if draw == RANDOM:
        names = sorted(sample.id for sample in read_samples(str(asked)))
        write_lines(output, [{"id": name} for name in random.Random(seed).sample(names, target)])
    else:
        select_command(str(asked), str(output), target, *BELLS[draw], seed, "miou")


def write_clips(folder: Path, num_pool: int, num_held_out: int) -> tuple[list[Path], list[Path]]:
    """Annotation files of the pool and of what is held out; ids begin with the kind."""
    pool, held_out = [], []
    for kind, (frac, clips) in KINDS.items():
        counts = {"num_train": round(frac * num_pool), "num_eval": num_held_out if kind in HELD_OUT else 0}
        config = replace(clips, output_dir=str(folder / kind.replace(" ", "_")), **counts)
        files = write_dataset(config, show_progress=False).annotation_files
        for file in files:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            write_lines(file, [row | {"id": f"{kind}:{row['id']}"} for row in rows])
        pool.append(files[0])
        held_out += files[1:] if kind in HELD_OUT else []
    return pool, held_out


def by_kind(samples: Path) -> dict[str, float]:
    """Mean IoU of each kind, and of "all"."""
    scores = {sample.id: sample.metrics["miou"] for sample in read_samples(str(samples))}
    kinds = {kind: [s for name, s in scores.items() if name.startswith(f"{kind}:")] for kind in KINDS}
    return {kind: statistics.fmean(found) for kind, found in {**kinds, "all": [*scores.values()]}.items() if found}


def shares(drawn: Path) -> dict[str, float]:
    """Percent of each kind."""
    names = [json.loads(line)["id"].split(":")[0] for line in drawn.read_text(encoding="utf-8").splitlines()]
    return {kind: 100 * names.count(kind) / len(names) for kind in KINDS}


def summary(draw: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of COLUMNS. Without a second seed there is no error."""
    own, base = ([one for one in runs if one["draw"] == name] for name in (draw, RANDOM))
    scores = [one["miou"]["all"] for one in own]
    row: dict[str, Any] = {"draw": draw} | {kind: statistics.fmean(one["drawn"][kind] for one in own) for kind in KINDS}
    row |= {"miou": statistics.fmean(scores), "low": min(scores), "high": max(scores)}
    if draw != RANDOM:
        gains = [score - other["miou"]["all"] for score, other in zip(scores, base, strict=True)]
        row["gain"] = statistics.fmean(gains)
        row["gain_error"] = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return row | {f"{k}_miou": statistics.fmean(one["miou"][k] for one in own) for k in HELD_OUT}
