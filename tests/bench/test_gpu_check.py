"""gpu_check.sh and the benchmarks it calls, as far as they go without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_summary import at_most, kernel_bars, read_stages

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"


def run_bench(name: str, folder: Path) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--quick", "--seconds", "200", "--output", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    stored = json.loads((folder / f"{name}_{last['machine']['device']}.json").read_text(encoding="utf-8"))
    assert stored == last
    return last


def test_the_script_calls_what_exists():
    assert os.access(SCRIPT, os.X_OK)
    text = SCRIPT.read_text(encoding="utf-8")
    modules = set(re.findall(r"-m (bench[\w.]*)(?: (\w+))?", text))
    assert {name for module, name in modules if module == "bench"} == {"decode", "kernels", "step", "weight_sync"}
    for module, name in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or (ROOT / "bench" / f"{name}.py").is_file()
    assert "build_ext --inplace" in text and (ROOT / "setup.py").is_file()
    for test in re.findall(r"tests/\S+\.py", text):
        assert "mark.gpu" in (ROOT / test).read_text(encoding="utf-8")


def test_the_stages_fit_into_nine_minutes():
    text = SCRIPT.read_text(encoding="utf-8")
    limit_s = int(re.search(r"LIMIT_S:-(\d+)", text)[1])
    kill_s = int(re.search(r"timeout -k (\d+)", text)[1])
    assert limit_s + kill_s <= 540
    before_step = [int(n) for n in re.findall(r"stage (?:wheels|build|tests|sanitizer|kernels) (\d+)", text)]
    assert len(before_step) == 5 and sum(before_step) <= limit_s - 50  # something is left for the last stage


def test_the_wheels_are_pinned():
    lines = (ROOT / "bench" / "gpu_wheels.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in wanted)
    assert any("pip download" in line for line in lines)


def test_kernels_in_quick_mode(tmp_path: Path):
    result = run_bench("kernels", tmp_path)
    assert result["is_gpu"] is False and "mean nothing for a GPU" in result["warning"]
    assert result["left_out"] == []
    ops = {row["op"] for row in result["rows"]}
    assert len(ops) == 6 and {"head, forward and backward", "patchify to bfloat16"} <= ops
    for row in result["rows"]:
        assert row["median_ms"] > 0 and row["repeats"] >= 3 and row["floor_ms"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["median_ms"])
        assert all(error < 1e-2 for error in row["errors"].values()), row
    ours = [row for row in result["rows"] if row["way"].startswith("vcr1") and "patchify" not in row["op"]]
    assert len(ours) >= 6
    assert all(error < 1e-5 for row in ours for error in row["errors"].values())
    assert all(row["reason"] for row in result["absent"])


def kernel_row(op: str, way: str, ms: float, percent: float, errors: dict | None = None) -> dict:
    return {
        "op": op, "way": way, "size": "3B T=8192", "tokens": 8192, "median_ms": ms, "percent_of_floor": percent,
        "errors": errors or {}, "peak_extra_bytes": 105, "expected_extra_bytes": 100,
    }  # fmt: skip


def test_bars_are_judged_on_a_gpu_only():
    head = "head, forward and backward"
    errors = {"grad_hidden_relative": 5e-3, "grad_weight_relative": float("nan"), "logprob_max_abs": 1e-5}
    rows = [
        kernel_row(head, "vcr1 policy loss", 20.0, 90.0, errors),
        kernel_row(head, "TRL chunked logprob", 25.0, 70.0),
        kernel_row("prefix attention, forward and backward", "vcr1 flash", 2.0, 40.0),
        kernel_row("prefix attention, forward and backward", "vcr1 triton", 4.0, 20.0),
        kernel_row("prefix attention, forward and backward", "two calls on repeated K/V", 5.0, 20.0),
    ]
    on_gpu = {bar.what: bar for bar in kernel_bars({"is_gpu": True, "rows": rows})}
    assert on_gpu["head 3B T=8192: % of 3 products"].holds is True
    assert on_gpu["head 3B T=8192: x TRL"].measured == 1.25 and on_gpu["head 3B T=8192: x TRL"].holds is False
    assert on_gpu["head 3B T=8192: memory / (chunk + dW + dX)"].holds is True
    assert on_gpu["head, worst grad_hidden_relative"].holds is False
    assert on_gpu["head, worst grad_weight_relative"].holds is False
    assert on_gpu["head, worst logprob_max_abs"].holds is True
    assert on_gpu["prefix attention 3B T=8192, vcr1 flash: x repeated K/V"].measured == 2.5
    assert on_gpu["logits, forward: % of the byte floor"].holds is None  # not measured
    assert all(bar.holds is None for bar in kernel_bars({"is_gpu": False, "rows": rows}))
    assert at_most("x", None, 1.0, is_gpu=True).holds is None


def test_stages_are_read_back(tmp_path: Path):
    """Details with a tab, with half of a character, and with what splitlines() takes for the end of a line."""
    path = tmp_path / "stages.tsv"
    path.write_bytes(b"build\tok\t12\ta\tb\ntests\texit 1\t3\t\xe2\x94\nkernels\tok\t4\t1\r2\x0c3\n")
    stages = read_stages(path)
    assert stages[1] == {"name": "tests", "result": "exit 1", "seconds": "3", "detail": "\N{REPLACEMENT CHARACTER}"}
    assert [stage["detail"] for stage in stages] == ["a\tb", "\N{REPLACEMENT CHARACTER}", "1\r2\x0c3"]


# In place of python3, whose tests fail, and of compute-sanitizer. Each stage ends with a long line of 3-byte characters
# after markup, an odd byte and a tab; the summary is the real one.
STUB = r"""#!/usr/bin/env bash
case "$*" in
  "-c import xdist") exit 1 ;;
  "-c import av") exit 0 ;;
  "-m bench.gpu_summary "*) exec "$REAL_PYTHON" "$@" ;;
  *--tool*) echo "without a cache: $PYTORCH_NO_CUDA_MEMORY_CACHING"; exit 0 ;;
  "-m bench kernels "*) cp "$KERNELS" "$5/kernels_fake.json" ;;
esac
printf 'from 1\rto 2\0\n%.0s' {1..30}
printf 'x[/x] \xff\t'
printf '─%.0s' {1..300}
printf '\n{"a": 1}\n   \n'
case "$*" in "-m pytest "*) exit 3 ;; esac
"""


def run_with_stubs(tmp_path: Path, *arguments: str, locale: str = "C") -> subprocess.CompletedProcess[bytes]:
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    kernels = {"is_gpu": True, "rows": [kernel_row("logits, forward", "vcr1", 2.0, 90.0)], "left_out": ["[/all] of it"]}
    (tmp_path / "kernels.json").write_text(json.dumps(kernels), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LC_ALL": locale, "PYTHON": str(tmp_path / "python")}
    environment |= {"REAL_PYTHON": sys.executable, "KERNELS": str(tmp_path / "kernels.json")}
    words = [SCRIPT, "", tmp_path / "out", *arguments]
    return subprocess.run(words, env=environment, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("parts", "stages"),
    [
        (["step"], ["step"]),
        (["tests"], ["build", "tests"]),
        (["head", "decode"], ["head", "decode"]),
        (["weight_sync", "kernels"], ["kernels", "weight_sync"]),
    ],
)
def test_parts_run_alone(tmp_path: Path, parts: list[str], stages: list[str]):
    done = run_with_stubs(tmp_path, *(word for part in parts for word in ("--only", part)))
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["name"] for stage in found] == stages, done.stdout
    log = (tmp_path / "out" / "gpu_check.log").read_text(encoding="utf-8", errors="replace")
    assert ("bench kernels --op head " in log) == ("head" in parts)


def test_a_part_that_is_none_is_refused(tmp_path: Path):
    done = run_with_stubs(tmp_path, "--only", "heads")
    assert done.returncode == 2 and b"--only got 'heads', wanted build, tests" in done.stderr


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_the_script_ends_with_its_tables_whatever_a_stage_prints(tmp_path: Path, locale: str):
    done = run_with_stubs(tmp_path, locale=locale)
    assert (done.returncode, done.stderr) == (1, b"")
    told = done.stdout.decode("utf-8", errors="surrogateescape")
    assert set(re.findall("[\udc80-\udcff]", told)) == {"\udcff"}  # the stage's own, and no half of a character

    names = ["build", "tests", "sanitizer", "kernels", "step", "weight_sync", "decode"]
    line = "x[/x] \ufffd " + "─" * 102  # 110 characters
    stages = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))["stages"]
    assert [(stage["name"], stage["result"]) for stage in stages] == [
        (name, "exit 3" if name == "tests" else "ok") for name in names
    ]
    assert [stage["detail"] for stage in stages] == [
        "without a cache: 1" if name == "sanitizer" else line for name in names
    ]
    assert told.count("from 1 to 2") == 24 and told.count("─" * 192) == 1  # the last 25 lines of the stage that failed
    tables = told[told.index("gpu_check: stages") :]
    assert tables.count("x[/x]") == 6 and "left out: [/all] of it" in tables
    assert re.search(r"logits, forward: % of the byte floor +│ 90 +│ >= 85 +│ yes", tables)
