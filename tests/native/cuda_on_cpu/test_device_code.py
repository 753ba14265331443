"""csrc's device code runs on a CPU, a thread for each CUDA thread, and equals the CPU half bit for bit.

g++ compiles overlap.cu with the CUDA header of this folder. Its barriers are checked by the thread sanitizer, which
must find a race as soon as one of them is left out; indices by the address sanitizer.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE, CSRC = Path(__file__).parent, Path(__file__).parents[3] / "csrc"
RACE = "WARNING: ThreadSanitizer: data race"
NUM_BARRIERS = 3

Compare = Callable[..., subprocess.CompletedProcess[str]]


def as_cpp() -> str:
    """overlap.cu with the launches and barriers of cuda_runtime_api.h."""
    source = (CSRC / "overlap.cu").read_text(encoding="utf-8")
    launch = re.compile(r"(\w+)<<<([^,]+), (\w+), 0, [^;]+?>>>\(([^;]*)\);")
    source, num_launches = launch.subn(r"run_grid(\2, \3, [=] { \1(\4); });", source)
    assert num_launches == 3 and "<<<" not in source
    pieces = source.split("__syncthreads()")
    assert len(pieces) == 1 + NUM_BARRIERS
    source = pieces[0] + "".join(f"barrier_at({n}){piece}" for n, piece in enumerate(pieces[1:], start=1))
    source, num_limits = re.subn(r"kMaxBlocks = \d+;", "kMaxBlocks = 3;", source)  # a block takes several groups
    assert num_limits == 1
    return source


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compare]:
    """build(sanitizers) compiles compare.cpp with both halves and gives a function that runs it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder, programs = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("programs")
    (folder / "overlap_cu.cpp").write_text(as_cpp(), encoding="utf-8")
    halves = [f'#include "{name}"\n' for name in ("overlap_cu.cpp", "overlap.cpp", "parallel.cpp", "compare.cpp")]
    (folder / "all.cpp").write_text("".join(halves), encoding="utf-8")  # one file: the headers are read once

    def build_with(sanitizers: str) -> Compare:
        program = programs / (sanitizers or "plain")  # not beside the sources: <thread> would be one of these
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-pthread"]
        flags += [f"-I{place}" for place in (folder, CSRC, HERE)]
        if sanitizers:
            flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        command = [compiler, *flags, str(folder / "all.cpp"), "-o", str(program)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if sanitizers and re.search(r"cannot find \S*(lib[atu]\w*san|-l[atu]\w*san)", compiled.stderr):
            pytest.skip(f"g++ has no library for -fsanitize={sanitizers}")
        assert compiled.returncode == 0, compiled.stderr

        def compare(rounds: int, num_answers: int, skipped_barrier: int = 0) -> subprocess.CompletedProcess[str]:
            arguments = [str(program), *map(str, (rounds, num_answers, skipped_barrier))]
            run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
            if "ThreadSanitizer: unexpected memory mapping" in run.stderr:
                pytest.skip("this kernel places memory where the thread sanitizer cannot be (vm.mmap_rnd_bits > 28)")
            return run

        return compare

    return build_with


def counts(run: subprocess.CompletedProcess[str]) -> tuple[int, int, int]:
    """values, fractions, different of a run without an error."""
    assert (run.returncode, run.stderr) == (0, ""), run.stderr[-4000:]
    found = re.fullmatch(r"values (\d+), fractions (\d+), different (\d+)\n", run.stdout)
    assert found, run.stdout
    return int(found[1]), int(found[2]), int(found[3])


def test_device_code_equals_the_cpu_half_bit_for_bit(build):
    values, fractions, different = counts(build("")(rounds=5, num_answers=260))
    assert different == 0
    assert values >= 20_000 and fractions >= values // 5


def test_no_index_is_out_of_bounds(build):
    values, _, different = counts(build("address,undefined")(rounds=3, num_answers=200))
    assert values > 10_000 and different == 0


def test_no_data_race_and_one_for_every_barrier_left_out(build):
    compare = build("thread")
    values, _, different = counts(compare(rounds=2, num_answers=60))
    assert values > 1_500 and different == 0
    for barrier in range(1, NUM_BARRIERS + 1):
        assert RACE in compare(2, 60, barrier).stderr, f"nobody needs barrier {barrier} of overlap.cu"
