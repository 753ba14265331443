"""The tree itself: sizes a reader can take in, names that say something, no shadowed package, no dead link."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.project.import_graph import circles, import_graph, parsed

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
PRODUCT = ("vcr1_fast", "kernels", "bench", "csrc", "setup.py")
CIRCLES = {frozenset({f"vcr1_fast.rollout.sgl.{name}" for name in ("delivery", "feed", "workers")})}
TEXT_SUFFIXES = {".py", ".pyi", ".cpp", ".cu", ".cuh", ".h", ".md", ".yaml", ".toml", ".txt", ".cfg", ""}


def repository_files() -> list[Path]:
    """Tracked and new files, as git sees them; every file outside of hidden folders where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        files = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file()]


def product_files(*suffixes: str) -> list[Path]:
    found = [p for p in repository_files() if p.relative_to(ROOT).parts[0] in PRODUCT and p.suffix in suffixes]
    assert found, f"no product file ends in {suffixes}: the list above is out of date"
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_device_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_torch_op(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Operators and autograd functions take tensors and numbers one by one, never a struct of them."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    is_autograd = bool(function.args.args) and function.args.args[0].arg == "ctx"
    return is_autograd or "custom_op" in decorators or "register_fake" in decorators


def test_files_are_short():
    sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in product_files(".py", ".cpp", ".cu", ".h")}
    too_long = [f"{p.relative_to(ROOT)}: {n} lines" for p, n in sizes.items() if n > MAX_FILE_LINES]
    assert too_long == []


def test_functions_are_short_and_take_few_parameters():
    offenders = []
    for path in product_files(".py"):
        for function in functions(path):
            if is_device_kernel(function):
                continue
            num_lines = (function.end_lineno or 0) - function.lineno + 1
            arguments = function.args
            num_parameters = sum(
                argument.arg not in ("self", "cls")
                for argument in (*arguments.posonlyargs, *arguments.args)  # options given by name do not count
            )
            has_too_many = num_parameters > MAX_PARAMETERS and not is_torch_op(function)
            if num_lines > MAX_FUNCTION_LINES or has_too_many:
                where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
                offenders.append(f"{where}: {num_lines} lines, {num_parameters} parameters")
    assert offenders == []


def test_no_file_is_named_after_nothing():
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [path for path in product_files(".py") if path.name in vague] == []


def test_the_package_root_holds_what_a_reader_begins_with():
    found = {path.name for path in product_files(".py", ".pyi") if path.parent == ROOT / "vcr1_fast"}
    commands = {"train.py", "sft.py", "evaluate.py"}
    assert found == commands | {"__init__.py", "__main__.py", "cli.py", "types.py", "native.py", "_native.pyi"}


def test_modules_do_not_import_each_other():
    """Neither can be read or tested without the other. Put what both need into a file below both."""
    assert circles(import_graph(ROOT / "vcr1_fast", ROOT / "kernels" / "vcr1_kernels")) == CIRCLES


def test_each_way_to_import_closes_a_circle(tmp_path: Path):
    """a -> b -> c -> a in a function, under TYPE_CHECKING, by an absolute name; f and i.g by dots; h by its face.

    Before a module runs the __init__ of its package."""
    sources = {
        "p/__init__.py": "",
        "p/a.py": "import os.path\ndef later():\n    from .b import name",
        "p/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import c",
        "p/c.py": "import torch.nn, p.a as other",
        "p/d.py": "from . import a, b\nfrom .h import name",
        "p/f.py": "from .i import g",
        "p/i/__init__.py": "",
        "p/i/g.py": "from .. import f",
        "p/h/__init__.py": "from .face import name",
        "p/h/face.py": "from p.h import name",
        "q/__init__.py": "from p import d",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    graph = import_graph(tmp_path / "p", tmp_path / "q")
    assert graph == {
        "p": set(), "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a", "p.b", "p.h"},
        "p.f": {"p.i", "p.i.g"},
        "p.i": set(), "p.i.g": {"p.f"}, "p.h": {"p.h.face"}, "p.h.face": {"p.h"},
        "q": {"p", "p.d"},
    }  # fmt: skip
    assert circles(graph) == {
        frozenset({"p.a", "p.b", "p.c"}),
        frozenset({"p.f", "p.i.g"}),
        frozenset({"p.h", "p.h.face"}),
    }
    open_chain = {**graph, "p.c": frozenset()}
    assert circles(open_chain) == {frozenset({"p.f", "p.i.g"}), frozenset({"p.h", "p.h.face"})}


def test_every_module_says_what_it_is():
    silent = []
    for path in product_files(".py"):
        tree = parsed(path)
        if tree.body and not ast.get_docstring(tree):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_kernels_is_a_plain_folder():
    """An __init__.py in kernels/ would shadow Hugging Face's `kernels`, which SGLang and transformers import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_vcr1_kernels_uses_relative_imports_and_only_torch_and_triton():
    """It is used without vcr1_fast, and these are the rules of a Hugging Face Hub kernel."""
    allowed = {"torch", "triton", "numpy"}
    folder = ROOT / "kernels" / "vcr1_kernels"
    for path in folder.rglob("*.py"):
        if "integrations" in path.parts:  # these import the trainer they plug into
            continue
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                is_standard = top in sys.stdlib_module_names
                assert is_standard or top in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_no_file_names_a_place_on_one_machine_or_unfinished_work():
    pattern = re.compile(r"(?<![\w.~-])/(?:work|root|home|opt)/\w|\b(?:TODO|FIXME|XXX)\b")
    found = []
    for path in repository_files():
        if path.suffix not in TEXT_SUFFIXES or path == Path(__file__) or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_links_between_documents_lead_somewhere():
    documents = [path for path in repository_files() if path.suffix == ".md"]
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md"} <= set(documents)
    links = [
        (document, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:")
    ]
    dead = [
        f"{document.relative_to(ROOT)}: {target}"
        for document, target in links
        if not (document.parent / target).exists()
    ]
    assert dead == []


def test_make_targets_and_commands_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s]*(?:$|[#A-Z]|`))", readme, flags=re.MULTILINE))
    assert {"demo", "test", "install"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []
