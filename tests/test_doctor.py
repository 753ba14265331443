"""The doctor never fails to answer, and its exit code says whether the main job can run."""

import json

import pytest

import vcr1_fast.doctor as doctor_module
from vcr1_fast.doctor import COMPONENTS, Component, UnusableError, doctor, examine


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
    assert [row["component"] for row in report["components"]] == [component.name for component in components]


def test_a_reason_with_square_brackets_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(doctor_module, "COMPONENTS", (BROKEN,))
    doctor()
    assert "cannot open [x]" in capsys.readouterr().out


def test_this_machine():
    findings = {finding.component: finding for finding in examine(COMPONENTS)}
    for name in ("python", "torch", "transformers", "PyAV", "tensorboard", "vcr1_kernels", "torch.distributed gloo"):
        assert findings[name].usable, findings[name].detail
    import torch

    assert findings["torch"].detail == torch.__version__
    assert findings["CUDA device"].usable == torch.cuda.is_available()
    assert all(finding.detail and (finding.usable or finding.advice) for finding in findings.values())


def test_an_optional_package_that_is_absent_is_called_not_installed():
    with pytest.raises(UnusableError, match="not installed"):
        doctor_module._load("vcr1_no_such_package.inner", "vcr1-no-such-package")
