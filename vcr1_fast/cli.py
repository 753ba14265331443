"""The command `vcr1-fast`: reads settings, calls one function, reports the outcome in one line.

Exit codes: 0 done, 1 the run failed, 2 the command line or the config file is wrong, 130 interrupted.
Commands import what they need when they run, so that `--help` and `config` answer without loading torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vcr1_fast import __version__
from vcr1_fast.config import Config, ConfigError
from vcr1_fast.config_io import UsageError, config_to_yaml, load_settings, settings_parser, split_config_path
from vcr1_fast.telemetry import is_main_rank, to_json
from vcr1_fast.types import SampleError


@dataclass(frozen=True, slots=True)
class Command:
    """One sub-command."""

    help: str
    run: Callable[[Any], object]  # takes the settings; what it returns is printed as JSON, None prints nothing
    settings: Callable[[], type]  # the dataclass of its settings


def _train(config: Config) -> object:
    from vcr1_fast.train import train

    return train(config)


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
    "train": Command("train a model with GRPO", _train, lambda: Config),
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
        "",
        "  vcr1-fast train CONFIG.yaml --train.num_steps=3 --rollout.group_size=8",
        "  vcr1-fast train --help        every setting, explained",
        "",
        "CONFIG is a YAML file or `tiny`, the example in the package. VCR1_DEBUG=1 shows the traceback of an error.",
    ]
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `vcr1-fast` script. Exits through SystemExit; a rank of several at once."""
    parser = argparse.ArgumentParser(
        prog="vcr1-fast",
        usage="vcr1-fast COMMAND [CONFIG] [--section.field=value ...]",
        description="GRPO training of video language models.",
        epilog=HELP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vcr1-fast {__version__}")
    parser.add_argument("command", choices=[*COMMANDS, "doctor"], metavar="COMMAND", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    parsed = parser.parse_args(arguments)
    if parsed.command == "doctor":
        raise SystemExit(_run_doctor(parsed.rest))
    code = _run(parsed.command, parsed.rest)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        from vcr1_fast.learner.sharding import exit_rank

        exit_rank(code)
    raise SystemExit(code)


def _run(name: str, tokens: list[str]) -> int:
    """Exit code of one command. The rank is in every error of a torchrun process but the first."""
    command = COMMANDS[name]
    settings_class = command.settings()
    if {"-h", "--help"} & set(tokens):
        parser = settings_parser(settings_class, f"vcr1-fast {name}")
        parser.description = command.help
        parser.print_help()
        return 0
    try:
        path, overrides = split_config_path(tokens)
        result = command.run(load_settings(settings_class, path, overrides))
    except (ConfigError, SampleError, OSError) as error:
        if os.environ.get("VCR1_DEBUG") == "1":
            raise
        _report_error(error)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        _report_error(InterruptedError("interrupted"))
        return 130
    if result is not None and is_main_rank():
        print(to_json(result), flush=True)
    return 0


def _run_doctor(tokens: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vcr1-fast doctor", description="Says which components are usable.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    as_json = parser.parse_args(tokens).json
    from vcr1_fast.doctor import doctor

    return doctor(as_json=as_json)


def _report_error(error: BaseException) -> None:
    """One line on stderr. A wrong command line is the same on all ranks, so the first alone reports it."""
    if isinstance(error, UsageError) and not is_main_rank():
        return
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number that str() puts before it
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    rank = "" if is_main_rank() else f" (rank {os.environ['RANK']})"
    print(f"vcr1-fast: error{rank}: {message}", file=sys.stderr, flush=True)
