"""The status line says which half is there and, if none is, why and what to do."""

import builtins
import importlib
import types

import pytest

from vcr1_fast import native


def reload_with(monkeypatch, outcome):
    """The native module as it would be if importing _native gave `outcome`."""
    real = importlib.import_module

    def fake(name, *args):
        if name != "vcr1_fast._native":
            return real(name, *args)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib, "import_module", fake)
    spec = importlib.util.find_spec("vcr1_fast.native")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("outcome", "status", "is_available"),
    [
        (types.SimpleNamespace(has_cuda=True), "CPU and CUDA", True),
        (types.SimpleNamespace(has_cuda=False), "CPU", True),
        (
            ModuleNotFoundError("No module named 'vcr1_fast._native'"),
            "not built (there is no vcr1_fast._native;",
            False,
        ),
        (builtins.ImportError("undefined symbol: PyFoo"), "not built (undefined symbol: PyFoo;", False),
    ],
)
def test_status(monkeypatch, outcome, status, is_available):
    module = reload_with(monkeypatch, outcome)
    assert module.is_available() is is_available
    assert module.status().startswith(status)
    assert (module.unavailable_reason() is None) is is_available
    if not is_available:
        assert "VCR1_NATIVE=cpu pip install" in module.status()
        assert not module.has_cuda()


def test_this_installation_agrees_with_itself():
    assert native.is_available() == (native.module is not None) == (not native.status().startswith("not built"))
