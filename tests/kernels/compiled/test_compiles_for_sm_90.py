"""Every shipped kernel configuration, compiled for sm_90 without a GPU, and proof that each check can fail."""

import ast
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton")

from vcr1_kernels import device
from vcr1_kernels.compile_cases import collect

from bench import cubin
from bench.compile_checks import Facts, Result, violations
from bench.compiled import README, Report, check, generated_section, markdown

HERE = Path(__file__).parent
# Folders with other versions of Triton: pip install --no-deps --target FOLDER triton==...; 3.6, 3.8 and 3.9 besides 3.7
OTHER_TRITONS = list(filter(None, os.environ.get("VCR1_TRITONS", "").split(os.pathsep)))
CASES = {case.name: case for case in collect()}
pytestmark = pytest.mark.slow

# What is wrong with each kernel of bad_kernels.py: the starts of all messages about it
WRONG = {
    "good rows": [],
    "good lengths": [],
    "good dot": [],
    "spills": ["spills: "],
    "narrow loads": [
        "loads: the widest of the main loop is 2 bytes",
        "loads: the narrowest of the main loop is 2 bytes",
    ],
    "narrow stores": ["stores: the narrowest of the main loop is 2 bytes"],
    "too much shared memory": ["shared memory: 294912 bytes"],
    "float64": ["float64: "],
    "dot on mma": ["dot: no wgmma", "dot: 4 mma"],
    "dot without tensor cores": ["dot: no wgmma"],
    "length as constant": ["lengths: 4 binaries"],
    "length specialised": ["lengths: 3 binaries"],
    "not compilable": ["does not compile: CompilationError"],
    "never launched so": ["does not compile: ValueError: ['num_cols'] are not specialised"],
    "other arguments": ["does not compile: ValueError: the signature names"],
}


@pytest.fixture(scope="module")
def report() -> Report:
    return check()


@pytest.fixture(scope="module")
def shipped(report: Report) -> dict[str, Result]:
    return {result.name: result for result in report.results}


@pytest.fixture(scope="module")
def bad() -> dict[str, Result]:
    return {result.name: result for result in check(HERE / "bad_kernels.py").results}


def test_names_are_unique_and_all_were_compiled(report: Report) -> None:
    assert [result.name for result in report.results] == [case.name for case in collect()]
    assert len(CASES) == len(report.results)


@pytest.mark.parametrize("name", CASES)
def test_shipped_kernel_compiles_well(name: str, shipped: dict[str, Result]) -> None:
    assert shipped[name].violations == ()
    assert shipped[name].facts is not None


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_caught(name: str, bad: dict[str, Result]) -> None:
    assert set(bad) == set(WRONG)
    found = bad[name].violations
    assert len(found) == len(WRONG[name]), found
    for text, start in zip(found, WRONG[name], strict=True):
        assert text.startswith(start)


def test_more_registers_than_an_sm_has_are_caught(shipped: dict[str, Result]) -> None:
    """No compiler emits this: the thread count is in the PTX and the assembler spills before it gets there."""
    case = next(iter(CASES.values()))
    facts = shipped[case.name].facts
    assert facts is not None
    changed = {**vars(facts), "registers": 200, "threads": 1024}
    assert violations(case, Facts(**changed)) == ["registers: 200 x 1024 threads, an SM has 65536"]


def test_every_kernel_has_a_case() -> None:
    """Entry points: the jitted functions of device/ that no other jitted function calls."""
    jitted, called = set(), set()
    for path in Path(device.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add(node.name)
                called |= {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    assert "patchify_kernel" in jitted
    assert {case.kernel.fn.__name__ for case in CASES.values()} == jitted - called


def test_the_table_in_the_readme_is_the_generated_one(report: Report) -> None:
    if report.triton != "3.7.1":
        pytest.skip(f"the table is of triton 3.7.1, this is {report.triton}")
    expected = markdown(report)
    assert generated_section(README.read_text(encoding="utf-8")) == expected, "run python -m bench.compiled --write"


@pytest.mark.skipif(not OTHER_TRITONS, reason="VCR1_TRITONS names no folders with other versions of triton")
@pytest.mark.parametrize("folder", OTHER_TRITONS)
def test_all_cases_hold_on_another_triton(folder: str, report: Report) -> None:
    other = check(triton_folder=Path(folder))
    assert other.triton != report.triton
    assert {result.name: result.violations for result in other.results} == dict.fromkeys(CASES, ())


SASS = """
kernel:
.text.kernel:
        /*0000*/                   LDG.E.U16 R0, desc[UR6][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
.L_x_0:
        /*0050*/                   STG.E.U8 desc[UR6][R2.64], R0 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   LDG.E.64 R4, desc[UR6][R2.64] ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_only_true_loops_count_as_loops() -> None:
    """Rare code at the end that branches back, and the trap behind the last EXIT, are no loops."""
    machine = cubin.parse(SASS)
    assert [i.opcode for i in machine.body] == ["LDG.E.128", "MUFU.EX2", "BRA"]
    assert machine.loads() == [16]
    assert machine.stores() == []
    assert machine.count("LDG") == 3
    without_loop = cubin.parse(SASS.replace("@P1  BRA `(.L_x_1)", "NOP"))
    assert without_loop.loads() == [2, 16, 8]
    assert without_loop.stores() == [1]
