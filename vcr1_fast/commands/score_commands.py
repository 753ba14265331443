"""Command lines of the commands that look at scores and runs: baselines, suite, score, compare, select, watch, report.

Called by cli.py; what each of them needs it imports when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run_suite(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast suite",
        usage="vcr1-fast suite list | NAME FILE... --output OUT.jsonl [options] | NAME --samples samples.jsonl",
        description="Reads a benchmark as it is published and writes one JSONL for data.eval; with --samples, the mean "
        "that the benchmark reports of what eval then gave.",
    )
    from vcr1_fast.evaluation.suites import SUITES
    from vcr1_fast.evaluation.suites.command import print_suites, score_command, suite_command
    from vcr1_fast.evaluation.suites.subtitles import Subtitles

    parser.add_argument("suite", choices=("list", *SUITES), metavar="NAME", help="`list` describes them all")
    parser.add_argument("files", metavar="FILE", nargs="*", help="annotation files; `list` says which")
    parser.add_argument("--output", metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--videos", metavar="FOLDER", help="folder of the videos; default: that of the first FILE")
    parser.add_argument("--only", metavar="AXIS=VALUE", action="append", default=[], help="such as duration=short")
    parser.add_argument("--subtitles", metavar="FOLDER", help="of .srt files named as the videos, for the questions")
    parser.add_argument("--subtitle-frames", metavar="N", type=int, help="only those seen at N evenly spaced frames")
    parser.add_argument("--samples", metavar="samples.jsonl", help="of vcr1-fast eval, to be averaged")
    options = parser.parse_args(tokens)
    if options.suite == "list":
        return print_suites()
    if options.samples:
        return score_command(options.suite, options.samples)
    if not options.files or not options.output:
        parser.error("wanted at least one FILE and --output OUT.jsonl")
    if any("=" not in wanted for wanted in options.only):
        parser.error("--only wants AXIS=VALUE, such as duration=short")
    if options.subtitle_frames is not None and (options.subtitle_frames < 1 or not options.subtitles):
        parser.error("--subtitle-frames wants a number of frames >= 1, and --subtitles")
    only = dict(wanted.split("=", 1) for wanted in options.only)
    subtitles = Subtitles(Path(options.subtitles), options.subtitle_frames) if options.subtitles else None
    return suite_command(options.suite, options.files, options.output, options.videos, only, subtitles)


def run_score(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast score",
        description="Scores answers that were made elsewhere, by the rule of the benchmark: a table, and one JSON line "
        "with metrics, readable, well_formed and n. Missing answers count as wrong.",
    )
    parser.add_argument("name", metavar="TASK|SUITE", help="such as temporal_grounding, or videomme")
    parser.add_argument(
        "annotations", metavar="FILE", nargs="+", help="annotation file of any known schema; of a suite as published"
    )
    parser.add_argument("answers", metavar="ANSWERS.jsonl", help='one {"id": ..., "answer": "..."} a line')
    parser.epilog = (
        "Ground truths are taken as the files have them; --task.recipe=fixed repairs them first, as eval does by "
        "default. Also --task.think=false and all of --task and --judge in `vcr1-fast eval --help-all`. Ids of a suite "
        "are those that `vcr1-fast suite` writes, or these without the suite's name in front."
    )
    num_files = next((i for i, token in enumerate(tokens) if token.startswith("--") and "." in token), len(tokens))
    options = parser.parse_args(tokens[:num_files])  # a value that follows its setting after a blank is no file
    from vcr1_fast.commands.score import score_command

    return score_command(options.name, options.annotations, options.answers, tokens[num_files:])


def run_compare(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast compare",
        description="Says whether run B scores the same examples differently from run A: paired bootstrap interval of "
        "the difference and sign-flip permutation test, both by video.",
    )
    parser.add_argument("a", metavar="A", help="samples.jsonl that vcr1-fast eval wrote")
    parser.add_argument("b", metavar="B", help="another one, of the same annotation files")
    options = parser.parse_args(tokens)
    from vcr1_fast.evaluation.compare import compare_command

    return compare_command(options.a, options.b)


def run_select(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast select",
        description="Draws the rows worth training on from the scores that a model has on a pool, and writes their ids "
        "for data.only. A row of score s is drawn with weight exp(-(s - MEAN)^2 / (2 STD^2)), divided by how many rows "
        "of the pool lie in its twentieth of [0, 1] (TimeLens, arXiv 2512.14698).",
    )
    parser.add_argument("answers", metavar="ANSWERS.jsonl", help="samples.jsonl of vcr1-fast eval on the pool")
    parser.add_argument("--output", metavar="OUT.jsonl", required=True, help="file to write")
    parser.add_argument("--target", metavar="N", type=int, required=True, help="rows to draw")
    parser.add_argument("--mean", type=float, default=0.05, help="score that is drawn most often (default: 0.05)")
    parser.add_argument("--std", type=float, default=0.2, help="how far around it (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--metric", default="miou", help="whose values count (default: miou); reward: ANSWERS is rewards.jsonl of a run"
    )
    options = parser.parse_args(tokens)
    if options.target < 1 or not options.std > 0:
        parser.error("wanted --target >= 1 and --std > 0")
    from vcr1_fast.commands.select import select_command

    return select_command(**vars(options))


def run_baselines(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast baselines",
        description="Scores answers that need no model (whole video, first box, most frequent answer, ...).",
    )
    parser.add_argument("task", metavar="TASK", help="such as temporal_grounding or object_tracking")
    parser.add_argument("annotations", metavar="FILE", help="annotation file of any known schema; videos are not read")
    parser.add_argument("--json", action="store_true", help="the JSON line alone, without the table")
    parser.add_argument(
        "--recipe",
        choices=("paper", "fixed"),
        default="paper",
        help="paper (default): against the ground truth as it is, as benchmarks do. fixed: against the repaired one",
    )
    parser.epilog = "Captioning asks a judge: --judge.url, --judge.model, ... as in `vcr1-fast eval --help-all`."
    options, overrides = parser.parse_known_args(tokens)
    from vcr1_fast.commands.baselines import baselines_command

    return baselines_command(options.task, options.annotations, options.recipe, options.json, overrides)


def run_watch(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast watch",
        description="Shows the numbers of a run as a table and follows it until its end or Ctrl-C. What each of them "
        "means stands in docs/metrics.md.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run, its train.output_dir")
    parser.add_argument("--all", action="store_true", help="every metric, not the main ones alone")
    parser.add_argument("--once", action="store_true", help="as it is now; without a terminal always so")
    options = parser.parse_args(tokens)
    from vcr1_fast.commands.watch import watch_command

    return watch_command(options.run, shows_all=options.all, follows=sys.stdout.isatty() and not options.once)


def run_report(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast report",
        description="Writes one HTML file about a run: held-out scores, curves, clips with what was answered. It loads "
        "nothing from anywhere and has no script. With RUN2, both runs side by side.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, its train.output_dir; one or two")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the first RUN")
    options = parser.parse_args(tokens)
    if len(options.runs) > 2:
        parser.error("wanted one RUN or two")
    from vcr1_fast.report import report_command

    report_command(options.runs, options.output)
    return None
