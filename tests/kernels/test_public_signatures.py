"""What others call stays as it is: the names that the kernels export, and their signatures, in public_signatures.txt.

A change there breaks the code of users: give it a line in kernels/CHANGELOG.md. `python -m
tests.kernels.test_public_signatures` from the root of the repository prints the new text.
"""

from __future__ import annotations

import inspect
import re
import tomllib
import typing
from pathlib import Path

import vcr1_kernels
from vcr1_kernels import losses, reference
from vcr1_kernels.integrations import openrlhf, trl

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("public_signatures.txt")


def public_values() -> dict[str, object]:
    values = {name: getattr(vcr1_kernels, name) for name in vcr1_kernels.__all__}
    values |= {f"losses.{name}": getattr(losses, name) for name in losses.__all__}
    of_reference = {name: x for name, x in vars(reference).items() if inspect.isfunction(x)}
    values |= {f"reference.{name}": x for name, x in of_reference.items() if x.__module__ == reference.__name__}
    drop_ins = {
        "integrations.trl.use_fused_head": trl.use_fused_head,
        "integrations.openrlhf.use_fused_head": openrlhf.use_fused_head,
        "integrations.openrlhf.PolicyLoss": openrlhf.PolicyLoss,
    }
    return values | drop_ins


def signature(value: object) -> list[str]:
    """A parameter a line, those that only go by name marked, then the result; of an alias what it stands for."""
    if inspect.ismodule(value):
        return ["module"]
    if typing.get_origin(value) is not None:
        return [str(value)]
    if isinstance(value, type) and issubclass(value, tuple):
        return [f"fields {', '.join(value._fields)}"]
    assert callable(value)
    found = inspect.signature(value)
    by_name = inspect.Parameter.KEYWORD_ONLY
    lines = [("* " if parameter.kind == by_name else "") + str(parameter) for parameter in found.parameters.values()]
    return [*lines, f"-> {found.return_annotation}"]


def description() -> str:
    parts = [[name, *(f"    {line}" for line in signature(value))] for name, value in sorted(public_values().items())]
    return "\n".join(line for part in parts for line in part) + "\n"


def test_names_and_signatures():
    assert description() == TABLE.read_text(encoding="utf-8")


def test_the_changelog_begins_with_the_version_that_both_wheels_have():
    def version(project: str) -> str:
        return tomllib.loads((ROOT / project).read_text(encoding="utf-8"))["project"]["version"]

    headings = re.findall(r"^## (.+)$", (ROOT / "kernels/CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0].split()[0] == version("kernels/pyproject.toml") == version("pyproject.toml")


if __name__ == "__main__":
    print(description(), end="")
