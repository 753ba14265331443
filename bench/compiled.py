"""`python -m bench.compiled [--write]`: compiles every shipped kernel for sm_90 and checks its machine code.

Needs no GPU. The cases are those of `vcr1_kernels.compile_cases`, compiled in processes of their own: a process whose
kernels are interpreted cannot compile them. `bench.compile_checks` says what is wrong with one: spills, narrow loads,
too much shared memory, a dot without wgmma, float64, a binary for every length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from vcr1_kernels.compile_cases import CompileCase, collect

from bench.columns import split_at
from bench.compile_checks import Facts, Result, examine

ROOT = Path(__file__).parents[1]
README = ROOT / "kernels" / "README.md"
BEGIN = "<!-- python -m bench.compiled --write: begin -->"
END = "<!-- python -m bench.compiled --write: end -->"
NUM_PROCESSES = 2
TIMEOUT_S = 540


@dataclass(frozen=True)
class Report:
    triton: str  # version
    results: tuple[Result, ...]


def check(case_file: Path | None = None, triton_folder: Path | None = None) -> Report:
    """Examines the package's cases, or those of a Python file with a `compile_cases()`, in processes of their own.

    Args:
        triton_folder: a folder with another Triton (`pip install --no-deps --target FOLDER triton==...`).

    Raises: RuntimeError with its last output when a process fails.
    """
    places = [*([str(triton_folder.resolve())] if triton_folder else []), str(ROOT / "kernels"), str(ROOT)]
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "bench.compiled",
            *(["--cases", str(case_file.resolve())] if case_file else []),
        ]
        workers = [
            subprocess.Popen(
                [*command, "--worker", str(index)],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(NUM_PROCESSES)
        ]  # fmt: skip
        answers = []
        try:
            for worker in workers:
                output, errors = worker.communicate(timeout=TIMEOUT_S)
                if worker.returncode:
                    raise RuntimeError(f"compiling ended with {worker.returncode}: {errors[-2000:]}")
                answers.append(json.loads(output.splitlines()[-1]))
        finally:
            for worker in workers:
                worker.kill()  # does nothing to one that has ended
    parts = [[_result(fields) for fields in answer["results"]] for answer in answers]
    # Dealt out in turn, so taken back in turn: the order is that of the cases.
    in_order = [part[row] for row in range(len(parts[0])) for part in parts if row < len(part)]
    return Report(answers[0]["triton"], tuple(in_order))


def _result(fields: dict[str, Any]) -> Result:
    facts = None
    if fields["facts"] is not None:
        spans = {key: tuple(fields["facts"][key]) for key in ("load_bytes", "store_bytes")}
        facts = Facts(**{**fields["facts"], **spans})
    return Result(fields["name"], fields["num_warps"], fields["num_stages"], facts, tuple(fields["violations"]))


def _work(index: int, case_file: Path | None) -> None:
    """One process: every NUM_PROCESSES-th case; the answer is the last line of the output."""
    import triton

    cases = _cases_of(case_file) if case_file else collect()
    results = [asdict(examine(case)) for case in cases[index::NUM_PROCESSES]]
    print(json.dumps({"triton": triton.__version__, "results": results}))


def _cases_of(path: Path) -> list[CompileCase]:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.compile_cases()


COLUMNS = (
    "kernel", "warps", "stages", "registers", "shared memory, bytes", "blocks per SM", "spills",
    "loads, bytes", "stores, bytes", "wgmma", "exp",
)  # fmt: skip


def _cells(result: Result) -> list[str]:
    facts = result.facts
    if facts is None:
        return [result.name, str(result.num_warps), str(result.num_stages), *["-"] * (len(COLUMNS) - 3)]
    numbers = (
        result.num_warps, result.num_stages, facts.registers, facts.dynamic_shared, facts.blocks_per_sm,
        facts.spill_instructions, _span(facts.load_bytes), _span(facts.store_bytes), facts.wgmma, facts.exps,
    )  # fmt: skip
    return [result.name, *map(str, numbers)]


def _span(narrowest_and_widest: tuple[int, int]) -> str:
    return "-".join(dict.fromkeys(str(width) for width in narrowest_and_widest if width)) or "none"


def markdown(report: Report) -> str:
    """The generated section of kernels/README.md, the same on every machine with the same Triton."""
    lines = [
        f"Compiled for sm_90 by Triton {report.triton}. Loads and stores are those of the loops, per lane, narrowest",
        "to widest; wgmma and exp count instructions; blocks per SM follow from registers, threads and shared memory.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(_cells(result)) + " |" for result in report.results),
    ]
    return "\n".join(lines)


def generated_section(text: str) -> str:
    """What stands between the two markers. Raises ValueError when there are none."""
    return split_at(text, BEGIN, END)[1].strip()


def write_section(report: Report) -> None:
    before, _, after = split_at(README.read_text(encoding="utf-8"), BEGIN, END)
    README.write_text(f"{before}\n{markdown(report)}\n{after}", encoding="utf-8")


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sm_90, Triton {report.triton}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for result in report.results:
        table.add_row(*_cells(result), style="red" if result.violations else None)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    for result in report.results:
        for text in result.violations:
            console.print(f"{result.name}: {text}", style="red", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a case has violations."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in kernels/README.md")
    parser.add_argument(
        "--cases", type=Path, default=None, help="Python file with compile_cases() (default: the package)"
    )
    parser.add_argument("--triton", type=Path, default=None, help="folder with another Triton")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        _work(options.worker, options.cases)
        return 0
    report = check(options.cases, options.triton)
    _print_table(report)
    if options.write:
        write_section(report)
    return int(any(result.violations for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
