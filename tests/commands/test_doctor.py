"""The doctor never fails to answer, and its exit code says whether the main job can run."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import yaml
from vcr1_kernels.flash_routes import flash_ops

import vcr1_fast.commands.doctor as doctor_module
from vcr1_fast import __version__
from vcr1_fast.commands.doctor import COMPONENTS, Component, UnusableError, doctor, examine
from vcr1_fast.commands.version import CHECKOUT, commit_of


def fails_with(error: BaseException):
    def check() -> str:
        raise error

    return check


GOOD = Component("good", lambda: "1.0", "nothing", is_required=True)
MISSING = Component("missing", fails_with(UnusableError("not installed")), "pip install missing")
BROKEN = Component("broken", fails_with(OSError("libx.so:\n  cannot open [x]")), "pip install broken")
EXITING = Component("exiting", fails_with(SystemExit(3)), "remove it")
NEEDED = Component("needed", fails_with(ImportError("undefined symbol")), "pip install needed", is_required=True)


def test_whatever_a_check_raises_is_a_finding():
    findings = examine((GOOD, MISSING, BROKEN, EXITING))
    assert [(f.usable, f.detail) for f in findings] == [
        (True, "1.0"),
        (False, "not installed"),
        (False, "OSError: libx.so: cannot open [x]"),
        (False, "SystemExit: 3"),
    ]
    assert [f.advice for f in findings] == ["", "pip install missing", "pip install broken", "remove it"]


@pytest.mark.parametrize(("components", "code"), [((GOOD, MISSING, BROKEN), 0), ((GOOD, NEEDED), 1)])
def test_only_a_required_component_makes_the_exit_code(monkeypatch, capsys, components, code):
    monkeypatch.setattr(doctor_module, "COMPONENTS", components)
    assert doctor() == code
    table = capsys.readouterr().out
    for component in components:
        assert component.name in table
    assert ("not ready, because of: needed" in table) == (code == 1)
    assert doctor(as_json=True) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] == (code == 0)
    assert (report["version"], report["commit"]) == (__version__, commit_of(CHECKOUT) or None)
    assert platform.machine() in report["platform"]
    assert [row["component"] for row in report["components"]] == [component.name for component in components]


def test_what_an_issue_report_asks_for_is_in_it():
    """A form of GitHub: name, description, a body of typed parts, each with its own id."""
    form = yaml.safe_load((CHECKOUT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    parts = {part["id"]: part for part in form["body"]}
    assert len(parts) == len(form["body"]) and form["name"] and form["description"]
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in parts.values())
    assert parts["doctor"]["attributes"]["label"] == "vcr1-fast doctor --json"
    assert {"python", "torch", "CUDA device", "torch.distributed nccl", "sglang"} <= {c.name for c in COMPONENTS}


def test_a_reason_with_square_brackets_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(doctor_module, "COMPONENTS", (BROKEN,))
    doctor()
    assert "cannot open [x]" in capsys.readouterr().out


def test_this_machine():
    findings = {finding.component: finding for finding in examine(COMPONENTS)}
    for name in ("python", "torch", "transformers", "PyAV", "tensorboard", "vcr1_kernels", "torch.distributed gloo"):
        assert findings[name].usable, findings[name].detail
    assert findings["torch"].detail == torch.__version__
    assert findings["CUDA device"].usable == torch.cuda.is_available()
    assert all(finding.detail and (finding.usable or finding.advice) for finding in findings.values())


def test_an_optional_package_that_is_absent_is_called_not_installed():
    with pytest.raises(UnusableError, match="not installed"):
        doctor_module._load("vcr1_no_such_package.inner", "vcr1-no-such-package")


def test_kernels_are_compared_where_there_is_a_gpu(monkeypatch):
    """Without one it says why not; with one every kernel is compared in the sizes of a public model."""
    from vcr1_fast import native
    from vcr1_fast.learner import kernel_proof
    from vcr1_fast.learner.kernel_choice import KernelChoice
    from vcr1_fast.learner.kernel_memory import Verdict
    from vcr1_fast.tasks import native_cuda

    def row(*verdicts: Verdict):
        found = kernel_proof.Proof(KernelChoice(), verdicts, 1.25, 30.0)
        monkeypatch.setattr(kernel_proof, "prove", lambda *arguments, **options: (asked.append(arguments), found)[1])
        return examine(tuple(c for c in COMPONENTS if c.name == "kernels, compared"))[0]

    asked, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not row().usable and row().detail.startswith("not run: torch sees no GPU") and not row().required
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(native_cuda, "choose_half", lambda world: chosen.append(world))
    numbers = {"output": "out", "distance": 1e-3, "plain_distance": 2e-3, "allowed": 1e-2}
    held = row(Verdict("attention", "flash", "held", **numbers), Verdict("patchify", "triton", "held", **numbers))
    assert held.usable and held.detail.startswith("Qwen2.5-VL-7B: kernel attention (flash) held: out 1.0e-03")
    assert held.detail.endswith("1.2 s, after 30.0 s of compilation")
    subject, world = asked[0]
    assert (subject.shapes.hidden_size, world.device) == (3584, torch.device("cuda", 0))
    assert f"rewards: {native.in_use()}" in held.detail and chosen[0] == world
    failed = row(
        Verdict("attention", "flash", "failed", "raised E: no"),
        Verdict("attention", "triton", "held", **numbers),
        Verdict("patchify", "triton", "failed", "disagrees", **numbers),
    )
    assert not failed.usable and failed.detail.startswith("2 of 3 ways do not hold; ")
    assert "patchify takes its plain path" in failed.detail and "attention takes" not in failed.detail
    assert "kernel attention (flash) failed: raised E: no" in failed.detail


def fake_interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def probed(sglang: str, torch: str = "2.13.0+cpu", ninja: str = "/n", nvcc: str = "/c") -> str:
    """A shell script in the place of an interpreter: what it finds, behind a banner."""
    libraries = [torch, "", ""] if "cpu" in torch else [torch, "13.0", "2.30.7"]
    found = {"ninja": ninja, "nvcc": None if "cpu" in torch else nvcc}
    return f"echo a banner; echo '{json.dumps({'sglang': sglang, 'libraries': libraries, 'found': found})}'"


def sglang_row(capsys, python: str) -> dict[str, object]:
    doctor(as_json=True, sglang_python=python)
    return next(row for row in json.loads(capsys.readouterr().out)["components"] if row["component"] == "sglang")


@pytest.mark.parametrize(
    ("script", "usable", "words"),
    [
        (probed("0.5.21.post1"), True, "0.5.21.post1 on torch 2.13.0+cpu, no NCCL, ninja /n, in {python}"),
        (probed("0.5.23", "2.14.1", nvcc=""), False, "no nvcc to compile kernels with when it starts"),
        (
            probed("0.5.23", "2.14.1"),
            True,
            "0.5.23 on torch 2.14.1, NCCL 2.30.7, ninja /n, nvcc /c, in {python}; here NCCL none: to broadcast "
            "weights, `pip install torch==2.14.1` here",
        ),
        (probed("0.5.9"), False, "0.5.9 in {python}, wanted 0.5.17 or later"),
        ("echo ModuleNotFoundError: no triton >&2; exit 1", False, "{python}: ModuleNotFoundError: no triton"),
        ("kill -9 $$", False, "it ended with -9"),
    ],
)
def test_sglang_is_asked_for_in_its_own_interpreter(monkeypatch, capsys, tmp_path, script, usable, words):
    monkeypatch.setattr(doctor_module, "COMPONENTS", [c for c in COMPONENTS if c.name in ("python", "sglang")])
    python = fake_interpreter(tmp_path, script)
    row = sglang_row(capsys, python)
    assert row["usable"] == usable
    assert words.format(python=python) in str(row["detail"])
    assert ("make sglang" in str(row["advice"])) != usable


def test_sglang_without_an_interpreter_to_ask(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor_module, "COMPONENTS", [c for c in COMPONENTS if c.name == "sglang"])
    missing = str(tmp_path / "none")
    assert sglang_row(capsys, missing)["detail"] == f"{missing} is not an interpreter that can be run"
    monkeypatch.chdir(tmp_path)
    assert doctor_module.sglang_interpreter() == sys.executable
    made = tmp_path / ".venv-sglang" / "bin"
    made.mkdir(parents=True)
    fake_interpreter(made, probed("0.5.17"))
    assert "0.5.17 on torch 2.13.0+cpu, no NCCL, ninja /n, in .venv-sglang/bin/python" in doctor_module._sglang(
        doctor_module.sglang_interpreter()
    )


@pytest.mark.parametrize(
    ("installed", "on_gpu", "is_usable", "detail"),
    [
        ({}, False, False, "installed: none"),
        ({"flash-attn-4": "4.0.0b36"}, False, True, "installed: flash-attn-4 4.0.0b36"),
        ({}, True, False, "installed: none; torch's built-in flash attention is used (flash-attn 3 is not installed"),
        ({"flash-attn-4": "4.0.0b36", "flash-attn": "2.8.3"}, False, False, "overwrite each other's flash_attn/cute"),
    ],
)
def test_flash_attention_is_named_and_two_that_overwrite_each_other_are_seen(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], on_gpu: bool, is_usable: bool, detail: str
):
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor_module.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    flash_ops.cache_clear()
    [found] = examine([component for component in COMPONENTS if component.name == "flash-attn"])
    flash_ops.cache_clear()
    assert found.usable is is_usable and detail in found.detail
