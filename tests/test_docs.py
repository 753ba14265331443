"""Every block of code in README and docs: run, or read by what would run it. What cannot be checked has a reason.

python runs; yaml is loaded as settings; json is parsed, and read as rows where it is rows; of bash each line is looked
at by its first word: `vcr1-fast` by the real command line, which does everything but the work itself.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from torch.distributed.run import get_args_parser

import bench.__main__ as bench_main
import vcr1_fast.cli as cli
from vcr1_fast.evaluation.suites import SUITES
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import Config, TaskConfig
from vcr1_fast.settings.io import load_config, load_settings, settings_parser
from vcr1_fast.tasks import make_tasks, task_class

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "kernels/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LANGUAGES = ("bash", "python", "yaml", "json", "text")

# Blocks of python that are only compiled, and whose imports are looked for: how they begin, and why they do not run
NOT_RUN = {
    "from vcr1_kernels.integrations import trl as vcr1_trl": "needs a trainer: tests/kernels/integrations",
    "from trl import GRPOTrainer": "needs a trainer: tests/kernels/integrations",
    "from vcr1_kernels.integrations import verl as vcr1_verl": "changes verl for the whole process",
    "# train.py: Ray calls the hook": "starts Ray",
    "from pathlib import Path\nfrom kernels import get_local_kernel": "its path is of the root: test_hub_rules.py",
}
# First words of lines that are not looked at further
ELSEWHERE = {
    "git": "the network",
    "hf": "the network, and a package of its own",
    "curl": "the network",
    "unzip": "what was downloaded",
    "find": "what was downloaded",
    "mkdir": "nothing to check",
    "source": "nothing to check",
}
MADE_BY_THE_READER = {"train.py": "the block after it, in kernels/README.md"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones behind an empty line, which are python if they import and else bash."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name, number = str(page.relative_to(ROOT)), 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.startswith("```"):
            end = lines.index("```", number)
            yield Block(name, start + 1, line[3:], "\n".join(lines[number:end]))
            number = end + 1
        elif line.startswith("    ") and not lines[start - 1]:
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            text = "\n".join(part[4:] for part in lines[start:number]).rstrip()
            yield Block(name, start + 1, "python" if text.startswith(("import", "from")) else "bash", text)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each line, comments and VARIABLE=value before a command left out; a backslash joins lines."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def check_cli(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code in (0, None), f"{shlex.join(words)} ends with {end.value.code}"


def check_torchrun(words: list[str]) -> None:
    parsed = get_args_parser().parse_args(words)
    assert parsed.module and parsed.training_script == "vcr1_fast"
    check_cli(parsed.training_script_args)


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert words[0] in MADE_BY_THE_READER or (ROOT / words[0]).is_file(), f"no file {words[0]}"
        return
    assert is_module(words[1]), f"no module {words[1]}"
    if words[1] == "bench":
        assert words[2] in bench_main.BENCHMARKS
        sources = [ROOT / "bench" / f"{name}.py" for name in ("__main__", words[2])]
        known = "".join(source.read_text(encoding="utf-8") for source in sources)
        assert all(f'"{word}"' in known for word in words[3:] if word.startswith("--")), words


def is_module(name: str) -> bool:
    """Whether there is such a module, without importing what lies above it."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not parts:
        return spec is not None
    below = [Path(folder, *parts) for folder in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in below)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets), words


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        path, _, extra = word.partition("[")
        if path.startswith("."):  # a package of another index is what it says
            assert (ROOT / path / "pyproject.toml").is_file(), word
            text = (ROOT / path / "pyproject.toml").read_text(encoding="utf-8")
            assert not extra or f"\n{extra[:-1]} = [" in text, f"no extra {extra[:-1]}"


def check_copy(words: list[str]) -> None:
    *sources, target = words
    if not sources[0].startswith("VideoChat-R1/"):  # what the same block clones
        Path(target).write_bytes((ROOT / sources[0]).read_bytes())


def check_sbatch(words: list[str]) -> None:
    script, *command = [word for word in words if not word.startswith("--") or "=" not in word or "." in word]
    assert (ROOT / script).is_file()
    with mock.patch.dict(os.environ, WORLD_SIZE="16" if script.endswith("slurm_nodes.sh") else "1"):
        check_line(command)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "vcr1-fast": check_cli,
    "torchrun": check_torchrun,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "cp": check_copy,
    "sbatch": check_sbatch,
    "pre-commit": lambda words: None,
}


def check_line(words: list[str]) -> None:
    first = re.sub(r"^\.venv(?:-sglang)?/bin/", "", words[0])
    if first in CHECKS:
        CHECKS[first](words[1:])
    elif "/" in first:
        assert os.access(ROOT / first, os.X_OK), f"{first} is no program of this tree"
    else:
        assert first in ELSEWHERE, f"nobody knows what {first} is: check it, or say why not in ELSEWHERE"


@pytest.fixture(scope="module", autouse=True)
def nothing_works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The command line as it is, but for what it calls at its end; a folder as one who followed the pages has it."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "mine.yaml").symlink_to(ROOT / "configs" / "qwen2_5_vl_7b_grounding_8xh100.yaml")
    for run in ("mine", "tiny/grpo"):
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "config.yaml").write_text("{}\n", encoding="utf-8")

    def settings(path: str | None, overrides: list[str]) -> None:
        load_settings(Config, path, overrides)

    def ask(asked: Any, overrides: list[str]) -> None:
        settings(None, overrides)
        assert asked.task is None or task_class(asked.task)

    def score(name: str, files: list[str], answers: str, overrides: list[str]) -> None:
        assert name in SUITES or task_class(name)
        settings(None, overrides)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # half of the time otherwise: one parser for each set of settings instead of one for each command
        patch.setattr("vcr1_fast.settings.io.settings_parser", cache(settings_parser))
        idle = {name: replace(command, run=lambda _: None) for name, command in cli.COMMANDS.items()}
        idle["train"] = replace(idle["train"], plan=lambda *_: None)
        patch.setattr(cli, "COMMANDS", idle)
        patch.setattr("vcr1_fast.learner.sharding.exit_rank", sys.exit)  # it ends the process at once
        patch.setattr("vcr1_fast.commands.ask.ask_command", ask)
        patch.setattr("vcr1_fast.commands.score.score_command", score)
        patch.setattr("vcr1_fast.commands.predict.predict_command", lambda rows, out, path, rest: settings(path, rest))
        patch.setattr("vcr1_fast.commands.baselines.baselines_command", lambda task, *_: task_class(task) and None)
        names = ("evaluation.compare.compare_command", "commands.watch.watch_command", "commands.select.select_command")
        for name in (*names, "report.report_command"):
            patch.setattr(f"vcr1_fast.{name}", lambda *_, **__: None)
        patch.setattr("vcr1_fast.commands.init.init_command", lambda *_, **__: None)
        for name in ("commands.doctor.doctor", "commands.export.export_command", "rollout.serve.serve"):
            patch.setattr(f"vcr1_fast.{name}", lambda *_, **__: None)
        for name in ("suite_command", "score_command", "print_suites"):
            patch.setattr(f"vcr1_fast.evaluation.suites.command.{name}", lambda *_, **__: None)
        yield


def test_pages_are_found_and_blocks_name_their_language():
    assert len(BLOCKS) > 40
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=str)
def test_commands_are_ones_that_exist(block: Block):
    for words in commands(block.text):
        check_line(words)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_runs(block: Block):
    code = compile(block.text, str(block), "exec")
    if not block.text.startswith(tuple(NOT_RUN)):
        exec(code, {"__name__": "example"})
        return
    for node in ast.walk(ast.parse(block.text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(is_module(name) or name == "ray" for name in names), names  # Ray is not in the environment of tests


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_settings_load(block: Block, tmp_path: Path):
    assert isinstance(yaml.safe_load(block.text), dict)
    (tmp_path / "block.yaml").write_text(block.text, encoding="utf-8")
    load_config(str(tmp_path / "block.yaml"), [])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json_is_json_and_rows_are_rows(block: Block, tmp_path: Path):
    try:
        found = [json.loads(block.text)]
    except json.JSONDecodeError:
        found = [json.loads(line) for line in block.text.splitlines()]
    if all("step" not in row for row in found):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in found), encoding="utf-8")
        tasks = make_tasks(TaskConfig())
        (content,) = read_annotation_files([AnnotationSource(tmp_path / "rows.jsonl")], tasks)
        assert content.errors == [] and len(content.examples) == len(found)


def test_each_reason_is_needed():
    firsts = {words[0] for b in BLOCKS if b.language == "bash" for words in commands(b.text)}
    assert set(ELSEWHERE) <= firsts
    assert [start for start in NOT_RUN if not any(block.text.startswith(start) for block in BLOCKS)] == []


WRONG = """
vcr1-fast train tiny --train.num_stepz=3
vcr1-fast data configs/none.yaml
vcr1-fast ask tiny a.mp4 what --eval.sees=1
torchrun --nproc-per-node 8 -m vcr1_fast train tiny --dry-rum
python -m vcr1_fast.nothing
python -m bench step --fastest
make nothing
bench/none.sh
pip install -e .[none]
frobnicate
"""


@pytest.mark.parametrize("line", WRONG.split("\n")[1:-1])
def test_a_wrong_command_is_found(line: str):
    with pytest.raises(AssertionError):
        check_line(shlex.split(line))


def test_the_readme_is_short_and_every_page_is_in_the_site():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    site = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    in_nav = set(re.findall(r": ([a-z-]+\.md)$", site.partition("\nnav:")[2], flags=re.MULTILINE))
    assert in_nav == {page.name for page in (ROOT / "docs").glob("*.md")}
