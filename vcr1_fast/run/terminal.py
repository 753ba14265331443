"""The place where text goes to a terminal or a log: it cannot steer one, and one that goes away ends no run.

`printable_output` is around every command (cli.py): whoever prints, warns, logs or raises goes through it. Texts come
from models, files and other machines: an escape sequence among them could hide lines, set the title or type on the
user's keyboard. Imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult

# Control characters but tab and line end, those that turn the direction of text, and halves of surrogate pairs.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with each character that a terminal would obey, or no encoding holds, written out, such as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SturdyStream:
    """A stream that never raises OSError or UnicodeEncodeError: what cannot be written is lost."""

    def __init__(self, stream: IO[str] | None) -> None:
        self.error: OSError | None = None  # the first one
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:  # None: the program was started without one
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = self.error or error
            if isinstance(error, BrokenPipeError):  # for good: what is still in a buffer must not fail again at exit
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


class _PrintableStream:
    """sys.stdout or sys.stderr of a command. What rich has made goes past it to `rich_proxied_file`, see `console`."""

    def __init__(self, sturdy: SturdyStream) -> None:
        self.rich_proxied_file = sturdy

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def printable_output() -> Iterator[SturdyStream]:
    """Everything printed in the block is made printable. Gives stdout, whose `error` says whether all of it arrived."""
    stdout, stderr = SturdyStream(sys.stdout), SturdyStream(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(Any, _PrintableStream(stdout))),
        contextlib.redirect_stderr(cast(Any, _PrintableStream(stderr))),
    ):
        try:
            yield stdout
        finally:
            stdout.flush()
            stderr.flush()


class _StdoutOfRich:
    """Today's sys.stdout without the streams around it that would write rich's own escape sequences out."""

    def __getattr__(self, name: str) -> Any:
        stream = sys.stdout
        while hasattr(stream, "rich_proxied_file"):
            stream = cast(Any, stream).rich_proxied_file
        return getattr(stream, name)


class _PrintableContent:
    """What rich is to show, its texts printable and its styles as they were."""

    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _PrintableHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PrintableContent(content) for content in renderables]


# One for bars and lines, so that a line printed during a bar does not tear it. Emoji: a folder `:key:` is no picture.
console = Console(file=cast(Any, _StdoutOfRich()), emoji=False)
console.push_render_hook(_PrintableHook())


def print_problems(problems: Sequence[object], kind: str = "", more: str = "and") -> None:
    """The first ten on stderr, a line each after `kind`, and after `more` how many there are beside them."""
    for problem in problems[:10]:
        print(f"{kind}{problem}", file=sys.stderr)
    if len(problems) > 10:
        print(f"{more} {len(problems) - 10:,} more", file=sys.stderr)
