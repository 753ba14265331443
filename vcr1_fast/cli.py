"""The command `vcr1-fast`: reads settings, calls one function, reports the outcome in one line.

Exit codes are those of run/exit_codes.py.
Commands import what they need when they run, so that `--help` and `config` answer without loading torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vcr1_fast.commands.model_commands import run_ask, run_export, run_predict
from vcr1_fast.commands.version import version_line
from vcr1_fast.run.exit_codes import FAILED, STOPPED_BY_SIGNAL, WRONG_USAGE
from vcr1_fast.run.stop_signals import StoppedBySignal, heed_no_interrupt, heed_one_interrupt, heed_usr1
from vcr1_fast.run.telemetry import is_main_rank, to_json
from vcr1_fast.run.terminal import printable_output
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import UsageError, config_to_yaml, load_settings, settings_parser, split_config_path
from vcr1_fast.types import RunError, SampleError


@dataclass(frozen=True, slots=True)
class Command:
    """One sub-command."""

    help: str
    run: Callable[[Any], object]  # takes the settings; what it returns is printed as JSON, None prints nothing
    settings: Callable[[], type]  # the dataclass of its settings
    plan: Callable[[Any, int | None, bool], object] | None = None  # what --dry-run[=GPUS] [--fast] does instead


def _train(config: Config) -> object:
    from vcr1_fast.train import train

    return train(config)


def _plan(config: Config, num_gpus: int | None, is_fast: bool) -> object:
    from vcr1_fast.commands.plan import plan_command

    return plan_command(config, num_gpus, is_fast)


def _sft(config: Config) -> object:
    from vcr1_fast.sft import sft

    return sft(config)


def _evaluate(config: Config) -> object:
    from vcr1_fast.evaluate import evaluate_command

    return evaluate_command(config)


def _synth(config: Any) -> object:
    from vcr1_fast.synth.dataset import write_dataset

    return write_dataset(config)


def _synth_settings() -> type:
    from vcr1_fast.synth.config import SynthConfig

    return SynthConfig


def _print_config(config: Config) -> None:
    print(config_to_yaml(config), end="")


COMMANDS = {
    "train": Command("train a model with GRPO", _train, lambda: Config, _plan),
    "sft": Command("supervised cold start", _sft, lambda: Config),
    "eval": Command("score a model on the held-out annotation files", _evaluate, lambda: Config),
    "synth": Command("write synthetic videos with exact annotations", _synth, _synth_settings),
    "config": Command("print every setting as the run would see it", _print_config, lambda: Config),
}
HELP_EPILOG = "\n".join(
    [
        "commands:",
        *(f"  {name:8s}{command.help}" for name, command in COMMANDS.items()),
        "  doctor  say what is installed, what works and why the rest does not",
        "  serve CONFIG  start rollout workers on this node, for trainers on other nodes",
        "  baselines TASK FILE  score answers that need no model on an annotation file",
        "  suite NAME FILE...  read a public benchmark as it is published, write a JSONL for data.eval; `suite list`",
        "  score TASK|SUITE FILE ANSWERS.jsonl  score answers that were made elsewhere",
        "  watch RUN  the numbers of a run as a table that follows it",
        "  report RUN [RUN2]  one HTML file about a run, or two side by side: scores, curves, clips",
        "  ask MODEL VIDEO QUESTION  one question about one video, its answer drawn with --save",
        "  predict FILE --output OUT.jsonl  answers to rows without labels",
        "  export RUN OUT  a checkpoint as a Hugging Face folder, or its adapter",
        "  compare A B  whether two samples.jsonl of eval differ, with intervals and p-values",
        "",
        "  vcr1-fast train CONFIG.yaml --train.num_steps=3 --rollout.group_size=8",
        "  vcr1-fast train CONFIG.yaml --dry-run=8    memory, seconds and disk of a run on 8 GPUs, from its worst step",
        "                                             on fake ones; with --fast from sums alone",
        "  vcr1-fast train --help        every setting, explained",
        "",
        "CONFIG is a YAML file or `tiny`, the example in the package. VCR1_DEBUG=1 shows the traceback of an error.",
    ]
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `vcr1-fast` script. Exits through SystemExit; a rank of several at once."""
    heed_usr1()
    heed_one_interrupt()
    parser = argparse.ArgumentParser(
        prog="vcr1-fast",
        usage="vcr1-fast COMMAND [CONFIG] [--section.field=value ...]",
        description="GRPO training of video language models.",
        epilog=HELP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version_line())
    choices = [*COMMANDS, *PLAIN_COMMANDS]
    parser.add_argument("command", choices=choices, metavar="COMMAND", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    parsed = parser.parse_args(arguments)
    run = PLAIN_COMMANDS.get(parsed.command) or partial(_run_with_settings, parsed.command)
    code = exit_code_of(lambda: run(parsed.rest), _again(parsed.command, parsed.rest))
    heed_no_interrupt()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        from vcr1_fast.learner.sharding import exit_rank

        exit_rank(code)
    raise SystemExit(code)


def _again(command: str, rest: list[str]) -> str:
    """What to type to go on with an interrupted command; "" for one that begins anew."""
    is_one = int(os.environ.get("WORLD_SIZE", "1")) == 1  # how several were started, torchrun knows
    return (shlex.join(["vcr1-fast", command, *rest]) if is_one else "the same command") if command in GO_ON else ""


def exit_code_of(run: Callable[[], object], again: str = "") -> int:
    """Does what every command does around its work: the result in one line of JSON, an error in one line on stderr.

    `run` gives the result, None for none, or an exit code. What it raises unforeseen is shown with its traceback.
    `again`: the command that goes on after a stop.
    """
    with printable_output() as stdout:
        code = _code_of(run, again)
        stdout.flush()
        if isinstance(stdout.error, BrokenPipeError):  # `vcr1-fast compare A B | head -1`
            return code or STOPPED_BY_SIGNAL + signal.SIGPIPE
        if stdout.error is not None and code == 0:
            _report_error(OSError(f"done, but not all of the output could be written: {stdout.error.strerror}"))
            return FAILED
        return code


def _code_of(run: Callable[[], object], again: str) -> int:
    try:
        result = run()
    except KeyboardInterrupt:
        _report_error(InterruptedError("interrupted" + (f"; to go on from what is saved: {again}" if again else "")))
        return STOPPED_BY_SIGNAL + signal.SIGINT
    except StoppedBySignal as stopped:
        if is_main_rank():
            print(f"vcr1-fast: {stopped}" + (f": {again}" if again else ""), file=sys.stderr, flush=True)
        return STOPPED_BY_SIGNAL + stopped.signum
    except Exception as error:
        is_foreseen = isinstance(error, ConfigError | SampleError | RunError | OSError)
        if _is_of_a_lost_rank(error):
            error, is_foreseen = RunError(f"another rank has ended, see what it said ({str(error)[:200]})"), True
        if not is_foreseen or os.environ.get("VCR1_DEBUG") == "1":
            traceback.print_exc()
        kind = f"unforeseen {type(error).__name__}, please report it with the lines above: "
        _report_error(error, "" if is_foreseen else kind)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    if isinstance(result, int):
        return result
    if result is not None and is_main_rank():
        print(to_json(result), flush=True)
    return result.get("exit_code", 0) if isinstance(result, dict) else 0


def _is_of_a_lost_rank(error: Exception) -> bool:
    """Whether a collective broke because a process at its other end is gone: what gloo and NCCL then raise."""
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return (
        is_one_of_several and isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _run_with_settings(name: str, tokens: list[str]) -> object:
    """One of COMMANDS. Returns its result; raises as `load_settings`, and what the command raises."""
    command = COMMANDS[name]
    settings_class = command.settings()
    if {"-h", "--help"} & set(tokens):
        parser = settings_parser(settings_class, f"vcr1-fast {name}")
        parser.description = command.help
        parser.print_help()
        return None
    is_dry_run, num_gpus, is_fast, tokens = _take_dry_run(name, tokens)
    path, overrides = split_config_path(tokens)
    settings = load_settings(settings_class, path, overrides)
    if name in ("train", "sft", "eval"):
        check_settings(settings, name)  # before torch is loaded
    return command.plan(settings, num_gpus, is_fast) if is_dry_run and command.plan else command.run(settings)


def _take_dry_run(name: str, tokens: list[str]) -> tuple[bool, int | None, bool, list[str]]:
    """Whether --dry-run[=GPUS] is among the tokens, its number of GPUs, whether --fast is, and the other tokens.

    Raises UsageError.
    """
    flags = [token for token in tokens if token.partition("=")[0] == "--dry-run"]
    is_fast = "--fast" in tokens
    if not flags:
        if is_fast:
            raise UsageError("--fast goes with --dry-run alone")
        return False, None, False, tokens
    _, equals, value = flags[-1].partition("=")
    if COMMANDS[name].plan is None:
        raise UsageError(f"vcr1-fast {name} has no --dry-run, only train has")
    if equals and (not value.isdecimal() or int(value) < 1):
        raise UsageError(f"--dry-run is {value!r}, wanted a number of GPUs >= 1, or --dry-run alone")
    rest = [token for token in tokens if token not in flags and token != "--fast"]
    return True, int(value) if equals else None, is_fast, rest


def _run_doctor(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(prog="vcr1-fast doctor", description="Says which components are usable.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--sglang-python", metavar="PATH", help="look for SGLang there (rollout.sglang.python)")
    arguments = parser.parse_args(tokens)
    from vcr1_fast.commands.doctor import doctor

    return doctor(as_json=arguments.json, sglang_python=arguments.sglang_python)


def _run_baselines(tokens: list[str]) -> object:
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
    parser.epilog = "Captioning asks a judge: --judge.url, --judge.model, ... as in `vcr1-fast eval --help`."
    options, overrides = parser.parse_known_args(tokens)
    from vcr1_fast.commands.baselines import baselines_command

    return baselines_command(options.task, options.annotations, options.recipe, options.json, overrides)


def _run_score(tokens: list[str]) -> object:
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
        "default. Also --task.think=false and all of --task and --judge in `vcr1-fast eval --help`. Ids of a suite are "
        "those that `vcr1-fast suite` writes, or these without the suite's name in front."
    )
    num_files = next((i for i, token in enumerate(tokens) if token.startswith("--") and "." in token), len(tokens))
    options = parser.parse_args(tokens[:num_files])  # a value that follows its setting after a blank is no file
    from vcr1_fast.commands.score import score_command

    return score_command(options.name, options.annotations, options.answers, tokens[num_files:])


def _run_compare(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast compare",
        description="Says whether run B scores the same examples differently from run A: paired bootstrap interval of "
        "the difference and sign-flip permutation test, both by video.",
    )
    parser.add_argument("a", metavar="A", help="samples.jsonl that vcr1-fast eval wrote")
    parser.add_argument("b", metavar="B", help="another one, of the same annotation files")
    options = parser.parse_args(tokens)
    from vcr1_fast.evaluation.compare import compare_command, comparison_as_dict

    return comparison_as_dict(compare_command(options.a, options.b))


def _run_suite(tokens: list[str]) -> object:
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


def _run_serve(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast serve",
        allow_abbrev=False,
        usage="vcr1-fast serve CONFIG [--bind HOST:PORT] [--workers N] [--logs FOLDER] [--section.field=value ...]",
        description="Starts SGLang workers on this node, one for each GPU, for trainers that run elsewhere.",
        epilog="Settings as in `vcr1-fast train --help`; used here: model.path, model.device and rollout.sglang.",
    )
    parser.add_argument(
        "--bind", default="", help="where the first worker listens, the next ones on the ports after it"
    )
    parser.add_argument("--workers", type=int, help="fewer than there are GPUs; without GPUs, how many")
    parser.add_argument("--logs", default="", help="folder of the workers' logs; default: serve/ in train.output_dir")
    options, rest = parser.parse_known_args(tokens)
    path, overrides = split_config_path(rest)
    config = load_settings(Config, path, overrides)
    from vcr1_fast.rollout.serve import serve

    serve(config, options.bind, options.logs, options.workers)
    return None


def _run_watch(tokens: list[str]) -> object:
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


def _run_report(tokens: list[str]) -> object:
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


GO_ON = ("train", "sft", "eval", "predict")  # those that go on where they stopped when they are started again
PLAIN_COMMANDS = {  # those without settings alone
    "doctor": _run_doctor,
    "baselines": _run_baselines,
    "score": _run_score,
    "compare": _run_compare,
    "suite": _run_suite,
    "serve": _run_serve,
    "watch": _run_watch,
    "report": _run_report,
    "ask": run_ask,
    "predict": run_predict,
    "export": run_export,
}


def _report_error(error: BaseException, kind: str = "") -> None:
    """One line on stderr. A wrong command line is the same on all ranks, so the first alone reports it."""
    if isinstance(error, UsageError) and not is_main_rank():
        return
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number that str() puts before it
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    rank = "" if is_main_rank() else f" (rank {os.environ['RANK']})"
    print(f"vcr1-fast: error{rank}: {kind}{message}", file=sys.stderr, flush=True)
