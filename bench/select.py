"""`python -m bench select`: rows drawn by difficulty (`vcr1-fast select`) against as many drawn at random.

TimeLens' recipe, small: the packaged model, the overlap alone as reward, advantages not scaled, no KL, a frozen tower,
a constant rate, one epoch of what was drawn. Answers keep the form that the packaged model was taught. The pool has
rows that the model nearly has, rows of middling difficulty, hard rows, and rows whose label is that of another clip.
Greedy answers to the pool once; then for each seed and each draw a run of equal steps; then greedy answers to the same
held-out clips, which have no wrong labels. Every stage is the command that a user types.

The bells were fixed before a held-out clip was answered. 0.05 is TimeLens'. 0.3 comes from the pool: where the greedy
answer scored 0, four sampled ones earned anything for 6 of 25 hard rows, and for 1 of 45 wrong ones.
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
WRONG = "wrong"
KINDS = {  # the share of the pool, and its clips
    "easy": (0.5, replace(CLIPS, time_step_s=4.0, seed=101)),  # events of half the clip
    "middling": (0.2, replace(CLIPS, seed=102)),
    "hard": (0.2, replace(CLIPS, duration_s=12.0, seed=103)),  # the model was taught on 8 s
    WRONG: (0.1, replace(CLIPS, seed=104)),
}
RANDOM = "random"
BELLS = {"0.05 ± 0.2": (0.05, 0.2), "0.3 ± 0.2": (0.3, 0.2)}  # mean, standard deviation
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
    **{f"{kind}_miou": (f"on {kind}", f"mIoU on held-out {kind} clips, mean over the seeds") for kind in [*KINDS][:-1]},
}
COLUMN_HEADS = heads_of(COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pool", type=int, default=640, help="rows of the pool")
    parser.add_argument("--held-out", type=int, default=48, help="held-out clips of each kind")
    parser.add_argument("--target", type=int, default=192, help=f"rows drawn, {PROMPTS_PER_STEP} a step, once each")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each draw; a seed is of its draw and its answers")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Experiment(Path(folder), arguments.target)
        pool, held_out = write_clips(bench.folder, arguments.pool, arguments.held_out)
        asked = bench.answers("pool", pool)
        before = by_kind(read_scores(bench.answers("start", held_out)))
        runs: list[dict[str, Any]] = []
        for seed in range(arguments.seeds):
            for draw in (RANDOM, *BELLS):
                drawn = bench.draw(draw, asked, seed)
                model = bench.train(pool, drawn, seed)
                after = by_kind(read_scores(bench.answers(f"{drawn.stem}-after", held_out, model)))
                runs.append({"draw": draw, "seed": seed, "drawn": shares(drawn), "miou": after})
                print(json.dumps(runs[-1]), flush=True)
        pool_miou = by_kind(read_scores(asked))
    rows = [summary(draw, runs) for draw in (RANDOM, *BELLS)]
    print_rows(rows, COLUMNS, f"{arguments.target} of {arguments.pool} rows; before: mIoU {before['all']:.3f}")
    sizes = {name: getattr(arguments, name) for name in ("pool", "held_out", "target", "seeds")}
    return {"sizes": sizes, "before": before, "pool_miou": pool_miou, "rows": rows, "runs": runs}


@dataclass(frozen=True)
class Experiment:
    """The commands, in a folder of their own."""

    folder: Path
    target: int

    def answers(self, name: str, files: Sequence[Path], model: str = "tiny") -> Path:
        """samples.jsonl of greedy answers (vcr1-fast eval)."""
        settings = (f"--model.path={model}", f"--data.eval=[{','.join(map(str, files))}]", "--data.train=[]")
        folder = self.folder / "answers" / name
        evaluate_command(load_config("tiny", [*RECIPE, *settings, f"--eval.output_dir={folder}"]))
        return folder / "samples.jsonl"

    def draw(self, name: str, asked: Path, seed: int) -> Path:
        """The file for data.only."""
        output = self.folder / f"{name.split()[0]}-{seed}.jsonl"
        if name == RANDOM:
            drawn = random.Random(seed).sample(sorted(read_scores(asked)), self.target)
            write_lines(output, [{"id": row} for row in drawn])
        else:
            select_command(str(asked), str(output), self.target, *BELLS[name], seed, "miou")
        return output

    def train(self, pool: Sequence[Path], drawn: Path, seed: int) -> str:
        """The folder of the trained model."""
        run_folder = self.folder / "runs" / drawn.stem
        settings = (
            f"--data.train=[{','.join(map(str, pool))}]",
            "--data.eval=[]",
            f"--data.only={drawn}",
            f"--train.num_steps={self.target // PROMPTS_PER_STEP}",
            f"--train.seed={seed}",
            f"--train.output_dir={run_folder}",
        )
        train(load_config("tiny", [*RECIPE, *settings]))
        return str(run_folder / "model")


def write_clips(folder: Path, num_pool: int, num_held_out: int) -> tuple[list[Path], list[Path]]:
    """Annotation files of the pool and of what is held out; ids begin with the kind."""
    pool, held_out = [], []
    for kind, (frac, clips) in KINDS.items():
        counts = {"num_train": round(frac * num_pool), "num_eval": 0 if kind == WRONG else num_held_out}
        written = write_dataset(replace(clips, output_dir=str(folder / kind), **counts), show_progress=False)
        for file in written.annotation_files:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            labels = [row["intervals"] for row in rows]
            if kind == WRONG:
                labels = [*labels[1:], *labels[:1]]
            for row, label in zip(rows, labels, strict=True):
                row |= {"id": f"{kind}:{row['id']}", "intervals": label}
            write_lines(file, rows)
        pool.append(written.annotation_files[0])
        held_out += written.annotation_files[1:] if kind != WRONG else []
    return pool, held_out


def read_scores(samples: Path) -> dict[str, float]:
    return {sample.id: sample.metrics["miou"] for sample in read_samples(str(samples))}


def by_kind(scores: Mapping[str, float]) -> dict[str, float]:
    """The mean of each kind, and of "all"."""
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
    return row | {f"{k}_miou": statistics.fmean(one["miou"][k] for one in own) for k in [*KINDS][:-1]}
