"""The words in which a task asks: a text with {placeholders}, built in, or from a file of task.prompts.

`{name}` becomes that value of the example, `{{` and `}}` one brace each; all else reaches the prompt byte for byte, but
for one newline at the file's end. In braces stands a name alone: attributes, indexes, conversions and formats are
refused, so a file says which values go where and nothing else. Called by the tasks, the user's own included.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example

MAX_FILE_BYTES = 65536  # the longest published one has about 1,000; this is an annotation file named by mistake
COMMON = ("query", "query_line", "duration_s", "reason")  # placeholders of every task
# {reason} by recipe and task.think. The fixed one leaves <timestep> out, since nothing ever reads it.
REASONS = {
    ("fixed", True): "Think inside <think></think>, then write",
    ("fixed", False): "Write",
    ("paper", True): (
        "Reason inside <think></think>; put each time or time range you rely on inside <timestep></timestep>. "
    ),
    ("paper", False): "",
}
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")


class Wording:
    """How one task asks. Example: `Wording(config, "counting", {"fixed": "How many {query}?"}).ask(example, {})`."""

    def __init__(
        self,
        config: TaskConfig,
        task: str,
        built_in: Mapping[str, str],
        placeholders: Sequence[str] = (),
        required: Sequence[Sequence[str]] = (),
    ) -> None:
        """`built_in`: recipe -> text, used unless task.prompts names a file for `task`; the first one where the recipe
        has none. `placeholders`: those that `ask` gets values of, beside COMMON. `required`: a file must hold at least
        one of each of these groups.

        Raises ConfigError when the file cannot be read, is empty or not UTF-8, holds an unknown placeholder or a lone
        brace, or lacks a required one.
        """
        file = config.prompts.get(task)
        self.digest = ""  # SHA-256 of the file's bytes, hex; "" where the words are built in
        self._reason = REASONS[config.recipe, config.think]
        source = f"the built-in question of {task}" if file is None else f"task.prompts.{task}: {file}"
        text = built_in.get(config.recipe) or next(iter(built_in.values()))
        if file is not None:
            raw = _read(file, source)
            self.digest = hashlib.sha256(raw).hexdigest()
            text = _decoded(raw, source)
        self._parts = _parse(text, source, (*COMMON, *placeholders))
        if file is not None:
            _check_required({name for _, name in self._parts}, source, required)

    def ask(self, example: Example, values: Mapping[str, str]) -> str:
        """The text with the values in it. Raises ValueError for a placeholder that this example has no value of."""
        known = self._common(example) | dict(values)
        missing = next((name for _, name in self._parts if name and name not in known), None)
        if missing is not None:
            raise ValueError(f"the question holds {{{missing}}}, which this row of {example.task} does not give")
        return "".join(literal + (known[name] if name else "") for literal, name in self._parts)

    def _common(self, example: Example) -> dict[str, str]:
        values = {"reason": self._reason}
        if example.query:
            values |= {"query": example.query, "query_line": one_line(example.query)}
        if math.isfinite(example.duration_s):
            values["duration_s"] = f"{example.duration_s:.2f}"
        return values


class Worded(ABC):
    """What the built-in tasks have in common: how they ask, and the think block before an answer."""

    wording: Wording
    think: bool

    @abstractmethod
    def question_fields(self, example: Example) -> dict[str, str]:
        """The values of the placeholders that are the task's own."""

    def question(self, example: Example) -> str:
        """The user's text; the video itself is not part of it."""
        return self.wording.ask(example, self.question_fields(example))

    def completion(self, answer: str, reasoning: str = "") -> str:
        """The answer in its tags, after the reasoning in its own where task.think asks for that."""
        think = f"<think>{reasoning}</think>" if self.think else ""
        return f"{think}<answer>{answer}</answer>"


def one_line(text: str) -> str:
    """Words with one blank between them."""
    return " ".join(text.split())


def wording_of(task: Task) -> Wording | None:
    """How a task asks; None for a task of the user's that has words of its own."""
    wording = getattr(task, "wording", None)
    return wording if isinstance(wording, Wording) else None


def prompt_digests(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Task -> SHA-256 of its prompt file, hex, for the tasks that have one."""
    wordings = {name: wording_of(task) for name, task in tasks.items()}
    return {name: wording.digest for name, wording in wordings.items() if wording is not None and wording.digest}


def _read(file: str, source: str) -> bytes:
    try:
        with Path(file).expanduser().open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{source} cannot be read: {reason}; wanted a text file with placeholders") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{source} has more than {MAX_FILE_BYTES:,} bytes, wanted the text of one question")
    return raw


def _decoded(raw: bytes, source: str) -> str:
    """Without a byte order mark and the one newline that editors put at the end."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source} is not UTF-8 text: line {line} holds the byte 0x{raw[error.start]:02x}: save it as UTF-8"
        ) from None
    text = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    if not text.strip():
        raise ConfigError(f"{source} is empty, wanted the text of the question")
    return text


def _parse(text: str, source: str, known: Sequence[str]) -> list[tuple[str, str]]:
    """(literal text, name of the placeholder behind it), the last name "". Raises ConfigError with the line."""
    parts: list[tuple[str, str]] = []
    literal, position = "", 0
    for match in _BRACES.finditer(text):
        literal += text[position : match.start()]
        position = match.end()
        if match[0] in ("{{", "}}"):
            literal += match[0][0]
            continue
        name = match[1]
        if name not in known:
            what = f"holds a lone {match[0]}" if name is None else f"holds {match[0]}, which is no placeholder"
            close = difflib.get_close_matches(name or "", known, n=1)
            near = f", did you mean {{{close[0]}}}?" if close else ""
            raise ConfigError(
                f"{source}, line {text.count(chr(10), 0, match.start()) + 1}, {what} of this task{near}; "
                f"the placeholders are {_listed(known)}, and {{{{ and }}}} stand for braces"
            )
        parts.append((literal, name))
        literal = ""
    return [*parts, (literal + text[position:], "")]


def _check_required(found: set[str], source: str, required: Sequence[Sequence[str]]) -> None:
    for group in required:
        if found.isdisjoint(group):
            raise ConfigError(f"{source} lacks what is asked about, wanted {_listed(group, ' or ')} in its text")


def _listed(names: Sequence[str], joint: str = ", ") -> str:
    return joint.join(f"{{{name}}}" for name in names)
