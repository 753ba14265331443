"""Rules of a Hugging Face Hub kernel, and the package alone: no vcr1_fast, no GPU asked at import, no Triton needed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vcr1_kernels
from vcr1_kernels._ops import OPS_NAMESPACE, add_op_namespace_prefix, ops

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = KERNELS / "vcr1_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def outside_functions(tree: ast.Module) -> ast.Module:
    """The module with the bodies of all functions taken out: what runs at import."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

    return Drop().visit(tree)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_are_relative_or_standard_or_torch_or_triton(path: Path) -> None:
    """Code under integrations/ may import the trainer it plugs into, but only when a function is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if "integrations" in path.parts:
        tree = outside_functions(tree)
    assert set(absolute_imports(tree)) - sys.stdlib_module_names - {"torch", "triton"} == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_operators_are_registered_under_the_generated_namespace(path: Path) -> None:
    registering = {"custom_op", "triton_op", "register_fake", "define", "impl", "register_kernel", "register_autograd"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.library.{name}" for name in registering}:
            assert ast.unparse(node.args[0]).startswith("add_op_namespace_prefix("), ast.unparse(node)


def test_namespace_shim_names_real_operators() -> None:
    assert add_op_namespace_prefix("patchify") == f"{OPS_NAMESPACE}::patchify"
    assert ops.patchify.default is not None


def test_public_names_are_listed_and_documented() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(imported) == sorted(vcr1_kernels.__all__)
    undocumented = [name for name in vcr1_kernels.__all__ if not getattr(vcr1_kernels, name).__doc__]
    assert [name for name in undocumented if name[0].islower()] == []  # types such as Literals cannot have one


def run_python(program: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Runs a program in a fresh process that finds the package only in `kernels/`; returns its output."""
    variables = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    variables |= {"PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMPORT_WITHOUT_DEVICE_QUERY = """
import importlib, pkgutil, sys, types
import torch
if len(sys.argv) > 1:
    import triton

def refuse(name):
    def call(*args, **options):
        raise AssertionError(f"torch.cuda.{name} was called at import")
    return call

poisoned = 0
for name, value in vars(torch.cuda).copy().items():
    if isinstance(value, types.FunctionType) and name != "_is_compiled":  # a constant of the build
        setattr(torch.cuda, name, refuse(name))
        poisoned += 1
assert poisoned > 50
for name in dir(torch._C):
    if name.startswith("_cuda_"):
        setattr(torch._C, name, refuse(name))
import vcr1_kernels
for module in pkgutil.walk_packages(vcr1_kernels.__path__, "vcr1_kernels."):
    if ".integrations." in module.name:
        continue  # imports the trainer it plugs into, which may ask
    needs_triton = module.name.startswith("vcr1_kernels.device.") or module.name.endswith(("_launch", "_triton"))
    if len(sys.argv) > 1 or not needs_triton:
        importlib.import_module(module.name)
print("imported")
"""


@pytest.mark.parametrize("with_triton", [False, True])
def test_import_asks_no_device(with_triton: bool, tmp_path: Path) -> None:
    if with_triton:
        pytest.importorskip("triton")
    arguments = ["triton"] if with_triton else []
    output = run_python(IMPORT_WITHOUT_DEVICE_QUERY, *arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert output == "imported\n"


USE_EVERY_OP = """
def use_every_op(package):
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    target = torch.tensor([1, 0, 10, 3, 7])
    tokens = package.losses.TokenVectors(torch.ones(5), torch.full((5,), 0.2))
    loss = package.losses.PolicyLoss()
    logprob, _ = package.fused_linear_logprob(hidden, weight, target)
    expected, _ = package.reference.linear_logprob(hidden, weight, target, 1.0)
    torch.testing.assert_close(logprob, expected)
    value, _ = package.fused_linear_policy_loss(hidden, weight, target, loss, tokens)
    value.backward()
    assert weight.grad.abs().sum() > 0
    again, _ = package.policy_loss((hidden @ weight.T).detach().requires_grad_(), target, loss, tokens, inplace=False)
    torch.testing.assert_close(again, value)
    layout = (package.PrefixGroup(0, 3, (2, 1)),)
    q, k, v = torch.randn(6, 2, 8), torch.randn(6, 1, 8), torch.randn(6, 1, 8)
    out = package.prefix_attention(q, k, v, layout, 0.5)
    torch.testing.assert_close(out, package.reference.prefix_attention(q, k, v, layout, 0.5))
    turned = package.rotary(q, k, q[:, 0], q[:, 1])
    torch.testing.assert_close(turned, package.reference.rotary(q, k, q[:, 0], q[:, 1]))
    clip = torch.randint(0, 256, (3, 28, 56, 3), dtype=torch.uint8)
    assert torch.equal(package.patchify(clip), package.reference.patchify(clip, torch.bfloat16))
"""

WITHOUT_TRITON = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import vcr1_kernels
{USE_EVERY_OP}
use_every_op(vcr1_kernels)
assert "triton is not installed" in vcr1_kernels.unavailable_reason()
try:
    vcr1_kernels.patchify(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), backend="triton")
except RuntimeError as error:
    assert "triton is not installed" in str(error)
else:
    raise SystemExit("no error without triton")
print("used")
"""


def test_every_op_runs_without_triton(tmp_path: Path) -> None:
    assert run_python(WITHOUT_TRITON, cwd=tmp_path) == "used\n"


LOAD_FROM_FOLDER = f"""
import sys
from pathlib import Path
import torch

sys.modules["vcr1_kernels"] = sys.modules["vcr1_fast"] = None  # importing either by name fails
from kernels import get_local_kernel
{USE_EVERY_OP}
package = get_local_kernel(Path(sys.argv[1]))
use_every_op(package)
print(Path(package.__file__).parent.name, package._ops.OPS_NAMESPACE if hasattr(package._ops, "OPS_NAMESPACE") else "")
for name in sys.argv[2:]:
    assert hasattr(getattr(torch.ops, name), "patchify"), name
"""


def test_source_folder_loads_as_a_hub_kernel(tmp_path: Path) -> None:
    pytest.importorskip("kernels")
    output = run_python(LOAD_FROM_FOLDER, str(KERNELS), "vcr1_kernels", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert output == "vcr1_kernels vcr1_kernels\n"


def test_built_layout_loads_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    """As the builder leaves it: a folder per variant, and _ops.py replaced by a generated one."""
    pytest.importorskip("kernels")
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = json.loads((KERNELS / "metadata.json").read_text(encoding="utf-8"))
    metadata |= {"id": "_vcr1_kernels_cpu_1a2b3c4", "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    generated = (
        "import torch\nops = torch.ops._vcr1_kernels_1a2b3c4\n"
        "def add_op_namespace_prefix(op_name: str):\n    return f'_vcr1_kernels_1a2b3c4::{op_name}'\n"
    )
    (variant / "_ops.py").write_text(generated, encoding="utf-8")
    program = LOAD_FROM_FOLDER.replace(
        "get_local_kernel(Path(sys.argv[1]))", "get_local_kernel(Path(sys.argv[1]), backend='cpu')"
    )
    output = run_python(program, str(tmp_path), "_vcr1_kernels_1a2b3c4", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert output == "torch-cpu \n"


def test_build_file_and_metadata_are_valid_and_agree() -> None:
    rust = pytest.importorskip("kernels._rust")
    build = rust.Build.open(KERNELS)
    assert {str(backend) for backend in build.general.backends} == {"cuda", "cpu"}
    metadata = rust.Metadata.read_from_file(KERNELS / "metadata.json")
    assert metadata.name.python_name == PACKAGE.name
    assert metadata.license == "Apache-2.0"
    assert 'name = "vcr1-kernels"' in (KERNELS / "build.toml").read_text(encoding="utf-8")
    assert not (KERNELS / "__init__.py").exists()  # it would shadow Hugging Face's package
