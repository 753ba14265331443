"""The schemas of annotation files by name, and which one a file is of. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from vcr1_fast.prompts.annotation_files import Entries
from vcr1_fast.prompts.schemas import charades, got10k, nextgqa, own_rows, timelens, vidtab
from vcr1_fast.prompts.schemas.schema import Schema
from vcr1_fast.settings.config import ConfigError

# In this order: a row of ours may have the keys of another schema as well, but always "task".
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        own_rows.SCHEMA,
        charades.SCHEMA,
        got10k.SCHEMA,
        nextgqa.SCHEMA,
        nextgqa.CHOICE_SCHEMA,
        vidtab.SCHEMA,
        timelens.BENCH_SCHEMA,
        timelens.SCHEMA,
    )
}
NUM_LOOKED_AT = 100  # entries in which a schema is sought: the first may be broken


def find_schema(file: Path, entries: Entries, name: str = "auto", task: str | None = None) -> Schema:
    """The schema called `name`, or with "auto" the one that the first entries show; `task` leaves out those of others.

    Raises ConfigError with the keys found and the known schemas when none fits.
    """
    objects = list(islice((entry for _, entry in entries.items if isinstance(entry, Mapping)), NUM_LOOKED_AT))
    if name != "auto":
        schema = SCHEMAS[name]
        if schema.is_mapping != entries.is_mapping:
            raise ConfigError(
                f"annotation file {file} holds {_looks(entries, objects)}, but data.format is {schema.describe()}"
            )
        if task is not None and schema.task not in (None, task):
            raise ConfigError(
                f"annotation file {file} is to be read as {name}, which is for the task {schema.task}, not for {task}: "
                "name another format or task"
            )
        return schema
    fitting = [
        schema
        for schema in SCHEMAS.values()
        if schema.is_mapping == entries.is_mapping and any(set(schema.keys) <= set(entry) for entry in objects)
    ]
    wanted = [schema for schema in fitting if task is None or schema.task in (None, task)]
    if wanted:
        return wanted[0]
    if fitting:
        raise ConfigError(
            f"annotation file {file} is of the schema {fitting[0].name}, which is for the task {fitting[0].task}, "
            f"not for {task}: name another file or task"
        )
    raise ConfigError(
        f"annotation file {file} holds {_looks(entries, objects)}, which is no known schema; these are known: "
        f"{'; '.join(schema.describe() for schema in SCHEMAS.values())}. Rename the keys, or name the schema in "
        "data.format"
    )


def _looks(entries: Entries, objects: Iterable[Mapping[str, object]]) -> str:
    keys = list(dict.fromkeys(str(key) for entry in objects for key in entry))
    if not keys:
        return "no object"
    shown = ", ".join(keys[:20]) + (", ..." if len(keys) > 20 else "")
    return f"{'a JSON object of objects' if entries.is_mapping else 'rows'} with the keys {shown}"
