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
from typing import Any

from vcr1_fast.commands.model_commands import run_ask, run_export, run_init, run_predict
from vcr1_fast.commands.score_commands import (
    run_baselines,
    run_compare,
    run_report,
    run_score,
    run_select,
    run_suite,
    run_watch,
)
from vcr1_fast.commands.settings_help import SHORT_HELP, short_help
from vcr1_fast.commands.version import version_line
from vcr1_fast.run.exit_codes import FAILED, STOPPED_BY_SIGNAL, WRONG_USAGE
from vcr1_fast.run.stop_signals import StoppedBySignal, heed_no_interrupt, heed_one_interrupt, heed_usr1
from vcr1_fast.run.telemetry import is_main_rank, to_json
from vcr1_fast.run.terminal import printable_output
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import (
    UsageError,
    config_to_yaml,
    load_settings,
    setting_types,
    settings_parser,
    split_config_path,
)
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


def _data(config: Config) -> object:
    from vcr1_fast.commands.data import data_command

    return data_command(config)


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
    "data": Command("count rows and videos, found and missing, of the annotation files", _data, lambda: Config),
    "config": Command("print every setting as the run would see it", _print_config, lambda: Config),
}
HELP_EPILOG = "\n".join(
    [
        "commands:",
        *(f"  {name:8s}{command.help}" for name, command in COMMANDS.items()),
        "  init OUT.yaml  write a commented configuration for data of your own, that fits",
        "  doctor  say what is installed, what works and why the rest does not",
        "  serve CONFIG  start rollout workers on this node, for trainers on other nodes",
        "  baselines TASK FILE  score answers that need no model on an annotation file",
        "  suite NAME FILE...  read a public benchmark as it is published, write a JSONL for data.eval; `suite list`",
        "  score TASK|SUITE FILE ANSWERS.jsonl  score answers that were made elsewhere",
        "  select ANSWERS.jsonl --target N --output OUT.jsonl  the rows worth training on, by what a model scores",
        "  watch RUN  the numbers of a run as a table that follows it",
        "  report RUN [RUN2]  one HTML file about a run, or two side by side: scores, curves, clips",
        "  ask MODEL VIDEO QUESTION  one question about one video, its answer drawn with --save",
        "  predict FILE --output OUT.jsonl  answers to rows without labels",
        "  export RUN OUT  a checkpoint as a Hugging Face folder, or its adapter",
        "  completion bash|zsh  a script that completes commands and settings",
        "  compare A B  whether two samples.jsonl of eval differ, with intervals and p-values",
        "",
        "  vcr1-fast train CONFIG.yaml --train.num_steps=3 --rollout.group_size=8",
        "  vcr1-fast train CONFIG.yaml --dry-run=8    memory, seconds and disk of a run on 8 GPUs, from its worst step",
        "                                             on fake ones; with --fast from sums alone",
        "  vcr1-fast train --help        the settings that matter most; --help-all: every one",
        "",
        "CONFIG is a YAML file, `tiny` or `tiny3` of the package. VCR1_DEBUG=1 shows the traceback of an error.",
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
    if {"-h", "--help", "--help-all"} & set(tokens):
        if name in SHORT_HELP and "--help-all" not in tokens:
            print(short_help(name, command.help, settings_class))
            return None
        parser = settings_parser(settings_class, f"vcr1-fast {name}")
        parser.description = command.help
        parser.print_help()
        return None
    is_dry_run, num_gpus, is_fast, tokens = _take_dry_run(name, tokens)
    path, overrides = split_config_path(tokens)
    settings = load_settings(settings_class, path, overrides)
    if name in ("train", "sft", "eval") and not is_dry_run:  # whose plan asks for its own number of GPUs
        check_settings(settings, name, int(os.environ.get("WORLD_SIZE", "1")))  # before torch is loaded
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


def _run_serve(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast serve",
        allow_abbrev=False,
        usage="vcr1-fast serve CONFIG [--bind HOST:PORT] [--workers N] [--logs FOLDER] [--section.field=value ...]",
        description="Starts SGLang workers on this node, one for each GPU, for trainers that run elsewhere.",
        epilog="Settings as in `vcr1-fast train --help-all`; used here: model.path, model.device and rollout.sglang.",
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


def _run_completion(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast completion",
        description="Prints a script that completes commands and settings: source <(vcr1-fast completion bash)",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(tokens).shell
    from vcr1_fast.commands.completion import completion_script

    with_settings = {name: setting_types(command.settings()) for name, command in COMMANDS.items()}
    print(completion_script(shell, with_settings | {name: {} for name in PLAIN_COMMANDS}), end="")
    return None


GO_ON = ("train", "sft", "eval", "predict")  # those that go on where they stopped when they are started again
PLAIN_COMMANDS = {  # those without settings alone
    "init": run_init,
    "doctor": _run_doctor,
    "baselines": run_baselines,
    "score": run_score,
    "compare": run_compare,
    "select": run_select,
    "suite": run_suite,
    "serve": _run_serve,
    "watch": run_watch,
    "report": run_report,
    "ask": run_ask,
    "predict": run_predict,
    "export": run_export,
    "completion": _run_completion,
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
