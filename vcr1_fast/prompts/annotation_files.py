"""An annotation file on disk -> its entries: JSON list, JSON object, JSONL, CSV or parquet. Called by `dataset`.

All but parquet may be packed by gzip. What an entry means is for `schemas` to say; here a file is only taken apart, and
what cannot be read is named.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vcr1_fast.settings.config import ConfigError

# Parsed JSON takes about 8 times its size on disk. The largest public file of the original has 10 MB.
MAX_TEXT_BYTES = 1 << 30
PARQUET_ROWS_AT_ONCE = 1024
GZIP = b"\x1f\x8b"
# What else a file begins with that is not text, and what to do about it.
NOT_TEXT = {
    b"BZh": "is packed by bzip2: unpack it (bunzip2)",
    b"\xfd7zXZ\0": "is packed by xz: unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "is packed by Zstandard: unpack it (unzstd)",
    b"PK\x03\x04": "is a ZIP archive: unpack it and name the file in it",
    b"PAR1": "is parquet: give it a name that ends in .parquet",
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself: git lfs pull",
}
# Columns of a CSV file whose cells hold JSON. All others are text: a type guess would turn "0012" into 12.
JSON_COLUMNS = ("duration_s", "duration", "intervals", "boxes", "times_s", "options", "glue", "gt")


@dataclass(frozen=True, slots=True)
class Entries:
    """The content of one file, in its order."""

    items: list[tuple[str, object]]  # (where, parsed entry, or the ValueError that says why it does not parse)
    is_mapping: bool  # where is the key of a JSON object; else the number of the row or line, from 1


def plain_name(file: Path) -> str:
    """The file's name without the .gz of a packed one."""
    return file.name[:-3] if file.name.lower().endswith(".gz") else file.name


def read_entries(file: Path) -> Entries:
    """All entries of a file; parquet and CSV by suffix, gzip, JSON and JSONL by content.

    Raises ConfigError when the file is missing, unreadable, too large, not UTF-8, or not of its format as a whole. A
    single broken line of JSONL or cell of CSV is an entry that holds its ValueError.
    """
    suffix = Path(plain_name(file)).suffix.lower()
    if suffix == ".parquet":
        return Entries(list(_parquet_rows(file)), is_mapping=False)
    text = read_text_file(file)
    if suffix == ".csv":
        return Entries(list(_csv_rows(file, text)), is_mapping=False)
    return _parse_text(file, text)


def read_text_file(file: Path) -> str:
    """The whole text, unpacked; raises ConfigError as `read_entries`."""
    raw = _read_bytes(file)
    for start, what in NOT_TEXT.items():
        if raw.startswith(start):
            raise ConfigError(f"annotation file {file} {what}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"annotation file {file} is not UTF-8 text: line {line} holds the byte 0x{raw[error.start]:02x}: save it "
            "as UTF-8 (iconv -t UTF-8)"
        ) from error


def _read_bytes(file: Path) -> bytes:
    """Unpacked; at most MAX_TEXT_BYTES."""
    try:
        num_bytes, raw = file.stat().st_size, b""
        if num_bytes <= MAX_TEXT_BYTES:
            raw = file.read_bytes()
        if raw.startswith(GZIP):
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(MAX_TEXT_BYTES + 1)
            num_bytes = len(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"annotation file {file} is packed by gzip, but cut short or damaged ({error}): fetch it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"annotation file {file} cannot be read: {reason}: check the path") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise ConfigError(
            f"annotation file {file} has {num_bytes:,} bytes, wanted at most {MAX_TEXT_BYTES:,}, as it is read as "
            "a whole: split it into several files or write it as parquet"
        )
    return raw


def _parse_text(file: Path, text: str) -> Entries:
    """JSON if the whole text is, else JSONL if at least one line is an object."""
    repeated: list[str] = []
    try:
        whole = _parse_json(text, repeated)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise ConfigError(
                f"annotation file {file} starts like a JSON list but is not valid JSON: {error}"
            ) from error
        return _parse_lines(file, text, error)
    if isinstance(whole, list):
        items = [(str(number), row) for number, row in enumerate(whole, start=1)]
    elif isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        return Entries([*((str(key), value) for key, value in whole.items()), *_lost(repeated)], is_mapping=True)
    else:
        items = [] if whole == {} else [(str(text[: len(text) - len(text.lstrip())].count("\n") + 1), whole)]
    return Entries([*items, *_lost(repeated)], is_mapping=False)


def _parse_lines(file: Path, text: str, whole_error: ValueError) -> Entries:
    items: list[tuple[str, object]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            items += _parse_line(str(number), line)
    if items and not any(isinstance(row, dict) for _, row in items):
        raise ConfigError(f"annotation file {file} is neither JSON nor JSONL; {whole_error}")
    return Entries(items, is_mapping=False)


def _parse_line(where: str, line: str) -> Iterator[tuple[str, object]]:
    repeated: list[str] = []
    try:
        row = _parse_json(line, repeated)
    except ValueError as error:
        row = ValueError(f"not valid JSON: {error}")
    if repeated:
        row = ValueError(f"key {repeated[0]!r} stands more than once in the row: remove one")
    yield where, row


def _parse_json(text: str, repeated: list[str]) -> object:
    """json.loads that also notes the keys which stand more than once in one object: json keeps only the last value.

    Raises ValueError with line and column.
    """

    def to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return result

    try:
        return json.loads(text, object_pairs_hook=to_dict)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ValueError("its lists are nested too deeply to be read") from None


def _lost(repeated: list[str]) -> Iterator[tuple[str, object]]:
    for key in repeated:
        yield key, ValueError(f"key {key!r} stands more than once in one object and only its last value is read")


def _csv_rows(file: Path, text: str) -> Iterator[tuple[str, object]]:
    """Rows under a header line; `where` is the line on which a row ends. Empty cells count as missing."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(MAX_TEXT_BYTES)  # of the whole process; by default 131,072 characters a cell
    try:
        header = next(reader, [])
        for cells in reader:
            if cells:
                yield str(reader.line_num), _csv_row(header, cells)
    except csv.Error as error:
        raise ConfigError(f"annotation file {file} is not CSV: line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return ValueError(f"the row has {len(cells)} cells, wanted {len(header)} as in the header")
    row: dict[str, object] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell:
            continue
        try:
            row[name] = json.loads(cell) if name in JSON_COLUMNS else cell
        except (ValueError, RecursionError):
            return ValueError(f"{name} is {cell!r:.60}, wanted a number or a list as JSON")
    return row


def _parquet_rows(file: Path) -> Iterator[tuple[str, object]]:
    """Rows through `datasets`, streamed, so that they are not copied to its cache. Empty values count as missing."""
    if not file.is_file():
        reason = "Is a directory" if file.is_dir() else "No such file or directory"
        raise ConfigError(f"annotation file {file} cannot be read: {reason}: check the path")
    with file.open("rb") as raw:
        if raw.read(len(GZIP)) == GZIP:
            raise ConfigError(
                f"annotation file {file} is packed by gzip, and parquet is not read so: unpack it (gunzip)"
            )
    import datasets  # 1 s, so not at import
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        with tempfile.TemporaryDirectory() as cache:  # it puts a lock file there, and a home may be read-only
            rows = datasets.load_dataset(
                "parquet", data_files=str(file), split="train", streaming=True, cache_dir=cache
            )
            # As Arrow tables, since a column of videos would be decoded otherwise.
            for table in rows.with_format("arrow").iter(batch_size=PARQUET_ROWS_AT_ONCE):  # pyright: ignore
                for row in table.to_pylist():  # pyright: ignore
                    number += 1
                    yield str(number), {key: value for key, value in row.items() if value is not None}
    except (ValueError, OSError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"annotation file {file} is not readable as parquet after row {number}: {reason}") from error


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold as an escape, such as \\ud83d, for messages and files."""
    return text.encode("utf-8", "backslashreplace").decode()


def require_text(row: Mapping[str, object]) -> None:
    """Raise ValueError that names the key under which a text holds half of a character (a lone surrogate).

    JSON's "\\ud83d" is one: an emoji cut in two. No tokenizer takes it, and no file of results can hold it.
    """
    waiting = [(printable(str(key)), part) for key, value in row.items() for part in (key, value)]
    while waiting:  # no recursion: lists may be nested as deeply as JSON's reader goes
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(key, part) for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            waiting += [(key, part) for part in value]
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half, before = ord(value[error.start]), value[max(0, error.start - 20) : error.start]
                raise ValueError(
                    f"{key} holds half of a character, U+{half:X} behind {before!r}: write it anew"
                ) from error
