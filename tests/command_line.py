"""A command line as a user gives it."""

import pytest

from vcr1_fast import cli


def run(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[object, str, str]:
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, tokens)))
    return end.value.code, *capsys.readouterr()
