"""What is raised for a wrong setting, and the check that raises it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is wrong. The message says which, what it is, and what is wanted."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)
