"""`python -m vcr1_fast.fake_gpu`: cases as JSON on standard input, one JSON line for each on standard output."""

from __future__ import annotations

import json
import sys

from vcr1_fast.fake_gpu import shim


def main() -> None:
    cases = json.load(sys.stdin)
    try:
        shim.load()
    except shim.FakeGpuError as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    from vcr1_fast.fake_gpu.cases import run_cases

    for report in run_cases(cases):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
