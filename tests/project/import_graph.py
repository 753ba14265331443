"""Which module imports which, read from the source: at a file's top, in its functions and under TYPE_CHECKING alike.

What is imported by a name made at run time is not seen.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]  # dotted name of a module -> those that it imports


def import_graph(*packages: Path) -> dict[str, frozenset[str]]:
    """Of all modules in these folders, each of which is a top-level package; other imports are left out."""
    files: dict[str, Path] = {}
    for package in packages:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            files[".".join(parts[:-1] if path.stem == "__init__" else parts)] = path
    graph: dict[str, frozenset[str]] = {}
    for module, path in files.items():
        direct = frozenset(imports(module, path, files)) & files.keys()
        before = direct.union(*map(packages_of, direct)) & files.keys()
        graph[module] = before - packages_of(module) - {module} | direct
    return graph


def packages_of(module: str) -> set[str]:
    """Those that it lies in: their __init__ runs before it does."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """`from package import name` is package.name where that is a module, else package, whose __init__ has the name."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                named = f"{source}.{alias.name}"
                yield named if named in known else source


def circles(graph: Graph) -> set[frozenset[str]]:
    """Modules that reach each other: the strongly connected components of more than one module."""
    reached = {module: reachable(graph, module) for module in graph}
    components = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return {component for component in components if len(component) > 1}


def reachable(graph: Graph, start: str) -> set[str]:
    """`start` and what it imports, at any remove."""
    found, pending = {start}, [start]
    while pending:
        new = graph[pending.pop()] - found
        found |= new
        pending += new
    return found
