"""What is raised for a wrong setting, and the check that raises it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is wrong. The message says which, what it is, and what is wanted."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def require_least(settings: object, section: str, least: int, *names: str, note: str = "") -> None:
    """Raises ConfigError, which names section.name, for the first of these settings that is given and less."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value >= least, f"{section}.{name} is {value}, wanted >= {least}{note}")


def require_above_0(settings: object, section: str, *names: str) -> None:
    """The same for settings that must be more than 0."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value > 0, f"{section}.{name} is {value}, wanted more than 0")
