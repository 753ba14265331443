"""`python -m bench packing [--output FOLDER]`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import packing
from bench.machine import machine_card

BENCHMARKS = {"packing": packing.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--output", type=Path, default=None, help="folder for NAME_DEVICE.json (default: not stored)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each point; the median counts")
    arguments = parser.parse_args()
    card = machine_card()
    print(" · ".join(f"{name} {value}" for name, value in card.items()), flush=True)
    result = {"benchmark": arguments.name, "machine": card, "rows": BENCHMARKS[arguments.name](arguments.repeats)}
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{arguments.name}_{card['device']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
