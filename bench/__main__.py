"""`python -m bench NAME [--output FOLDER]`: one of BENCHMARKS. Each ends in one JSON line."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import NoReturn

from bench.columns import explain
from bench.machine import machine_card

BENCHMARKS = {
    "compare": "two results of one benchmark: ratios, and which are beyond the spread",
    "decode": "video files to patches with each reader, the cache and the workers, and qwen-vl-utils' way",
    "decode_step": "one token of the embedded engine beside the stock forward: operators and milliseconds",
    "figures": "the figures of docs/images, from the results in bench/results",
    "learner": "an update of 7B counted on fake GPUs; no GPU needed",
    "head_memory": "what head and loss of 7B take, fused and plain, counted on fake GPUs; no GPU needed",
    "kernels": "each kernel against its floor and against other projects' kernels",
    "predict": "seconds, completions and MFU of a step on 1 to 1,024 GPUs; no GPU needed",
    "rewards": "rewards of N completions, the original's way and ours",
    "rollouts": "how full the engines of a rollout are, simulated on 8 and 64 GPUs; no GPU needed",
    "scaling": "how time and memory of an update grow with frames, answers and their length",
    "select": "training on rows drawn by difficulty, and on as many drawn at random; minutes on a CPU",
    "step": "one policy update, the original's way and ours, on the same groups",
    "update": "a GRPO update and a whole step: TRL's trainer, the original's recipe, ours",
    "weight_sync": "the learner's weights into the rollout engine, by each way, beside a copy in memory",
}


def stop(*_: object) -> NoReturn:
    """What `timeout` sends: the benchmarks catch it and report what they have."""
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    # only the chosen benchmark is imported: one with a missing package must not take the others along
    chosen = next((word for word in sys.argv[1:] if word in BENCHMARKS), None)
    for name, purpose in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=purpose, description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--output", type=Path, default=None, help="folder for NAME_DEVICE.json (default: none)")
        if name == chosen:
            benchmark = importlib.import_module(f"bench.{name}")
            benchmark.add_arguments(command)
            command.epilog = explain(benchmark.COLUMN_HEADS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    benchmark = importlib.import_module(f"bench.{arguments.name}")
    card = machine_card()
    print(" · ".join(f"{name} {value}" for name, value in card.items()), flush=True)
    result = {"benchmark": arguments.name, "machine": card, **benchmark.run(arguments)}
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{arguments.name}_{card['device']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    failure = benchmark.failed(result) if hasattr(benchmark, "failed") else None
    if failure:
        sys.exit(f"bench {arguments.name}: {failure}")


if __name__ == "__main__":
    main()
