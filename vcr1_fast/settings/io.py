"""YAML files and command-line overrides to a typed config, and back.

In: a YAML path (or `tiny`) and tokens such as `--rollout.group_size=8`. Out: a frozen dataclass of config.py.
Every key is checked before jsonargparse sees it, so that a wrong one is answered with the nearest right one.
Called by cli.py and by train.py (which saves the resolved file). Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.settings.config import Config, ConfigError, ModelConfig
from vcr1_fast.settings.of_model import task_of_model, video_of_model

T = TypeVar("T")


MAX_YAML_DEPTH = 32  # of lists and mappings in each other; configs have 4

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the string under a field is its help


class UsageError(ConfigError):
    """The file or the command line cannot be read as settings: unknown key, wrong type, no such file."""


def load_config(path: str | None, overrides: list[str]) -> Config:
    """The settings of `path` (None: the defaults; `tiny`: the packaged file) with `--a.b=c` tokens on top, and below
    them what the model says of its frames (of_model.py).

    Raises UsageError for an unknown key, a value of the wrong type or an unreadable file; ConfigError for a
    value out of range.
    """
    return load_settings(Config, path, overrides)


def load_settings(config_class: type[T], path: str | None, overrides: list[str]) -> T:
    """`load_config` for any dataclass of settings."""
    pairs = read_overrides(overrides)
    known = setting_types(config_class)
    values = read_yaml(config_file(path, config_class), path) if path else {}
    where = f" in {path}"
    for key, value in _dotted_items(values, known):
        _check_known(key, known, where)
        _check_entries(key, value, known, where)
    for key, value in pairs:
        _check_known(key, known, " on the command line")
        _check_entries(key, _parsed(key, value, known), known, " on the command line")
    parser = settings_parser(config_class, prog="vcr1-fast")
    if config_class is Config:
        values = _with_defaults_of_model(values, dict(pairs))
    try:
        settings = parser.parse_object(_listed(values, known))
        where = " on the command line"
        settings = parser.parse_args([_argument(key, value, known) for key, value in pairs], namespace=settings)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(str(error), known, where)) from None
    return config_class(**vars(parser.instantiate(settings)))


def _with_defaults_of_model(values: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """`values` of a file with what follows from the model where neither they nor `overrides` say it."""
    path = str(overrides.get("model.path", (values.get("model") or {}).get("path", ModelConfig.path)))
    given: dict[str, Mapping[str, Any]] = {name: values.get(name) or {} for name in ("video", "task")}
    names = {*given["video"], *(key.removeprefix("video.") for key in overrides if key.startswith("video."))}
    found = {"video": video_of_model(path, names), "task": task_of_model(path)}
    return {**values, **{name: {**found[name], **given[name]} for name in found if found[name]}}


def config_to_yaml(config: object) -> str:
    """Every setting of a config dataclass, None as null; `load_config` reads it back to an equal value."""
    assert is_dataclass(config) and not isinstance(config, type)
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def settings_parser(config_class: type, prog: str) -> ArgumentParser:
    """A parser with one `--section.field` per setting, documented by the string under the field."""
    parser = ArgumentParser(prog=prog, usage="%(prog)s [CONFIG] [--section.field=value ...]", exit_on_error=False)
    parser.add_class_arguments(config_class)
    sections = {key.rpartition(".")[0] for key in setting_types(config_class)}
    for action in parser._actions:
        # `--rollout FILE` would be a second way to give a file, `--data.train.help` one for help: not shown or accepted
        if action.dest in sections or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
        elif action.dest.startswith("eval.video."):
            action.help = f"As {action.dest.removeprefix('eval.')}."
    return parser


def setting_types(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type, for every setting."""
    hints = get_type_hints(config_class)
    types: dict[str, Any] = {}
    for field in fields(config_class):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            types |= setting_types(kind, f"{prefix}{field.name}.")
        else:
            types[prefix + field.name] = kind
    return types


def read_overrides(tokens: list[str]) -> list[tuple[str, str]]:
    """`--a.b=c` or `--a.b c` tokens as (key, value) pairs. Raises UsageError for anything else."""
    pairs = []
    remaining = iter(tokens)
    for token in remaining:
        if not token.startswith("--"):
            raise UsageError(f"unexpected argument {token!r}, wanted --section.field=value")
        key, equals, value = token[2:].partition("=")
        if not equals:
            next_token = next(remaining, None)
            if next_token is None or next_token.startswith("--"):
                raise UsageError(f"--{key} has no value, wanted --{key}=VALUE")
            value = next_token
        pairs.append((key, value))
    return pairs


def split_config_path(tokens: list[str]) -> tuple[str | None, list[str]]:
    """The one bare word among the tokens is the config file; the rest are overrides. Raises UsageError for two."""
    paths: list[str] = []
    overrides: list[str] = []
    takes_value = False  # the token before was `--a.b` without `=`
    for token in tokens:
        is_option = token.startswith("--")
        (overrides if is_option or takes_value else paths).append(token)
        takes_value = is_option and "=" not in token
    if len(paths) > 1:
        raise UsageError(f"got the config files {' and '.join(paths)}, wanted one; settings start with --")
    return (paths[0] if paths else None), overrides


def config_file(path: str, config_class: type) -> Path:
    """The file that `path` means: `tiny` is synth.yaml of the package for SynthConfig, train.yaml for Config."""
    if path not in PACKAGED:
        return Path(path)
    return PACKAGED[path] / f"{config_class.__name__.removesuffix('Config').lower() or 'train'}.yaml"


def read_yaml(file: Path, path: str) -> dict[str, Any]:
    """The mapping a YAML file holds; `path` is how the user named it.

    Raises UsageError when there is no such file or it holds something else.
    """
    try:
        content = _load_yaml(file.read_text(encoding="utf-8"), path)
    except OSError as error:
        wanted = f"wanted a YAML file or {' or '.join(PACKAGED)}"
        raise UsageError(f"cannot read the config {path}: {error.strerror}; {wanted}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        wanted = "wanted sections of key: value; without a file all settings are the defaults"
        raise UsageError(f"{path} holds no setting, {wanted}")
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, wanted sections of key: value")
    return content


def _load_yaml(text: str, name: str) -> Any:
    """What the text holds. Its depth is looked at first: building it recurses, up to whatever limit a process has."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise UsageError(
                f"{name} is nested too deeply, wanted at most {MAX_YAML_DEPTH} lists or sections in another"
            )
    return yaml.safe_load(text)


def _dotted_items(values: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {key.partition(".")[0] for key in known if "." in key}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in known:
            yield from _dotted_items(value, known, f"{key}.")
        elif key not in sections:
            yield key, value
        elif value:
            raise UsageError(f"{key} is {value!r}, wanted a section of key: value")


def _check_known(key: str, known: Mapping[str, Any], where: str) -> None:
    if key in known or any(get_origin(kind) is dict and key.startswith(f"{name}.") for name, kind in known.items()):
        return
    raise UsageError(f"unknown setting {key}{where}: did you mean {nearest(key, known)}?")


def _check_entries(key: str, value: Any, known: Mapping[str, Any], where: str) -> None:
    """Mappings in a list setting, such as data.train: their keys and values, named like `data.train[0].format`."""
    entry_class = _entry_class(known.get(key))
    entries = value if isinstance(value, list | tuple) else [value]
    for number, entry in enumerate(entries) if entry_class else ():
        if not isinstance(entry, Mapping):
            continue
        assert entry_class is not None
        types = setting_types(entry_class, f"{key}[{number}].")
        for name in entry:
            if f"{key}[{number}].{name}" not in types:
                _check_known(f"{key}[{number}].{name}", types, where)
        missing = [f.name for f in fields(entry_class) if f.default is MISSING and f.name not in entry]
        if missing:
            raise UsageError(f"{key}[{number}] has no {missing[0]}{where}, wanted {type_name(entry_class)}")
        try:
            settings_parser(entry_class, prog="vcr1-fast").parse_object(dict(entry))
        except argparse.ArgumentError as error:
            short = setting_types(entry_class)
            raise UsageError(f"{key}[{number}].{_explain(str(error), short, where)}") from None


def _entry_class(kind: Any) -> type | None:
    """The dataclass that the items of a list setting may be, if any."""
    items = get_args(get_args(kind)[0]) if get_origin(kind) is tuple else ()
    return next((item for item in items if isinstance(item, type) and is_dataclass(item)), None)


def _parsed(key: str, value: str, known: Mapping[str, Any]) -> Any:
    """What a value on the command line says, where its entries are to be checked; None where it is not YAML."""
    if _entry_class(known.get(key)) is None:
        return None
    try:
        return _load_yaml(_listed_text(value), f"{key} on the command line")
    except yaml.YAMLError:
        return None  # jsonargparse will say so


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """The known key most like this one, the last part counted twice: a right field in a wrong section is found."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, key, candidate).ratio()
        return whole + SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()

    return max(known, key=likeness)


def _argument(key: str, value: str, known: Mapping[str, Any]) -> str:
    return f"--{key}={_listed_text(value) if get_origin(known.get(key)) is tuple else value}"


def _listed_text(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


def _listed(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without empty sections, and with a lone string or mapping where a list is wanted made a list of one."""
    listed: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in known:
            is_lone = get_origin(known[key]) is tuple and isinstance(value, str | Mapping)
            listed[name] = [value] if is_lone else value
        elif value:
            listed[name] = _listed(value, known, f"{key}.")
    return listed


def _explain(message: str, known: Mapping[str, Any], where: str) -> str:
    """jsonargparse names the key and the value over several lines; this says it in one, with what is wanted."""
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    if not key or key[1] not in known:
        return " ".join(message.split()) + where
    value = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    got = f" is {value[1]!r}" if value else " cannot be read"
    return f"{key[1]}{got}{where}, wanted {type_name(known[key[1]])}"


def type_name(kind: Any) -> str:
    """A type as a person would say it."""
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        return "a list of " + type_name(item) if rest == [...] else "[" + ", ".join(map(type_name, (item, *rest))) + "]"
    if get_origin(kind) is dict:
        return "a mapping of " + " to ".join(map(type_name, get_args(kind)))
    if is_dataclass(kind):
        return "{" + ", ".join(field.name for field in fields(kind)) + "}"
    if get_args(kind):
        return " or ".join(map(type_name, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe dialect has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
