"""python -m tests.faults --minutes N [--seed S] [--only KIND ...] [--out FILE.json]

Drives the product with faults and prints what survived. Exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults import file_operations


def main() -> int:
    from tests.faults.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="how long, all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of everything random; a trial follows from it")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), default=sorted(KINDS), metavar="KIND")
    parser.add_argument("--trials", type=int, help="so many of each kind, instead of a time")
    parser.add_argument("--short", action="store_true", help="the few trials of `make test`")
    parser.add_argument("--trial", type=int, help="this one alone, as the line of a failure says")
    parser.add_argument("--out", type=Path, help="JSON of the table and of each failure")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the last trial, and say where it is")
    options = parser.parse_args()
    if options.minutes == float("inf") and options.trials is None and options.trial is None and not options.short:
        parser.error("give --minutes, --trials, --trial or --short")
    folder = Path(os.environ.get("FAULTS_FOLDER") or tempfile.mkdtemp(prefix="vcr1-faults-"))
    os.environ |= {"FAULTS_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    file_operations.start_again_with_it("tests.faults", folder)
    try:
        return _run(options, folder)
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run(options: argparse.Namespace, folder: Path) -> int:
    from tests.faults.kinds import KINDS, make_kinds
    from tests.faults.trials import Bench, run_trials, table, write_report

    missing = [] if file_operations.is_loaded() else [kind for kind in options.only if KINDS[kind].needs_library]
    if missing:
        print(f"faults: no C compiler, so not tried: {', '.join(missing)}", file=sys.stderr)
    names = [kind for kind in options.only if kind not in missing and (KINDS[kind].num_short or not options.short)]
    kinds = make_kinds(folder, names, ["lag"] if options.short else None)
    num_each = 1 if options.trial is not None else options.trials
    counts = None if num_each is None else dict.fromkeys(names, num_each)
    if options.short:
        counts = {kind: KINDS[kind].num_short for kind in names}
    tallies, failures = run_trials(
        kinds,
        Bench(folder),
        options.seed,
        limit_s=options.minutes * 60,
        counts=counts,
        only_number=options.trial,
    )
    print(table(tallies), flush=True)
    if options.out:
        write_report(options.out, tallies, failures, seed=options.seed, minutes=options.minutes)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
