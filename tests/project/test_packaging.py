"""What pip would install: the sdist builds, the wheel holds everything, and the wheel alone runs the main job."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

import pytest

from vcr1_fast.commands.doctor import TINY_FILES

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "vcr1_fast", "kernels")
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # PYTHONPATH would let the installed wheel import the checkout
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what is built."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT, symlinks=True)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def build(project: Path, dist: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist."""
    # no --sdist or --wheel: build makes the sdist, then the wheel from it, so a header left out of the sdist fails here
    run(sys.executable, "-m", "build", "--no-isolation", "-o", dist, project, cwd=dist.parent, VCR1_NATIVE="cpu")
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def archives(tree: Path) -> tuple[Path, Path]:
    return build(tree, tree.parent / "dist")


@pytest.fixture(scope="module")
def kernels_wheel(tree: Path) -> Path:
    """The wheel of the kernels alone."""
    return build(tree / "kernels", tree.parent / "kernels_dist")[1]


def installed_files(*folders: str) -> set[str]:
    """Paths inside vcr1_fast and vcr1_kernels that a wheel must hold."""
    wanted = {".py", ".pyi", ".typed", ".json", ".safetensors", ".yaml", ".jinja"}
    return {
        path.relative_to(ROOT / folder).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and (path.suffix in wanted or path.name == "py.typed") and "egg-info" not in str(path)
    }


def test_sdist_holds_every_source(archives: tuple[Path, Path]):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir() if p.suffix in {".cpp", ".cu", ".cuh", ".h"}} <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names


def test_wheel_holds_every_module_the_compiled_one_and_the_tiny_model(archives: tuple[Path, Path]):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    ours = {f"vcr1_fast/{name}" for name in installed_files("vcr1_fast")}
    kernels = {f"vcr1_kernels/{name}" for name in installed_files("kernels/vcr1_kernels")}
    wanted = ours | kernels
    assert wanted - names == set()
    assert any(name.startswith("vcr1_fast/_native.") and name.endswith(".so") for name in names)
    assert {f"vcr1_fast/{folder}/{name}" for folder in ("tiny", "tiny/qwen3_vl") for name in TINY_FILES} <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vcr1_fast", "vcr1_kernels"}  # above all no `kernels`


def test_packaged_model_is_small():
    size_bytes = sum(path.stat().st_size for path in (ROOT / "vcr1_fast" / "tiny").iterdir() if path.is_file())
    assert size_bytes < 5_000_000


def empty_environment(folder: Path, dependencies: Path | str) -> tuple[Path, Path]:
    """python and site-packages of a new environment that sees `dependencies` through a .pth, and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return python, site_packages


def pip_install(python: Path, wheel: Path, *options: str) -> None:
    command = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", *options, wheel)
    run(*command, cwd=python.parent)


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh environment with the wheel; dependencies are those of the running one, seen through a .pth."""
    folder = tmp_path_factory.mktemp("fresh")
    python, site_packages = empty_environment(folder, sysconfig.get_path("purelib"))
    pip_install(python, archives[1])
    where = run(python, "-c", "import vcr1_fast, vcr1_kernels; print(vcr1_fast.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site_packages)
    return python.parent


def test_the_wheel_alone_passes_the_doctor(installed: Path, tmp_path: Path):
    report = json.loads(run(installed / "vcr1-fast", "doctor", "--json", cwd=tmp_path))
    assert report["ready"]
    usable = {row["component"]: row["usable"] for row in report["components"]}
    assert usable["vcr1_fast.native"] and usable["tiny models"]


def test_the_wheel_alone_trains(installed: Path, tmp_path: Path):
    run(installed / "vcr1-fast", "synth", "tiny", "--num_train=4", "--num_eval=2", "--output_dir=data", cwd=tmp_path)
    files = {split: ",".join(sorted(map(str, tmp_path.glob(f"data/{split}_*.jsonl")))) for split in ("train", "eval")}
    settings = [f"--data.{split}={paths}" for split, paths in files.items()]
    settings += ["--train.num_steps=1", "--train.prompts_per_step=2", "--train.output_dir=run"]
    output = run(installed / "vcr1-fast", "train", "tiny", *settings, cwd=tmp_path)
    result = json.loads(output.splitlines()[-1])
    assert result["steps"] == 1
    [step] = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "loss" in row]
    assert step["step"] == 1 and step["loss"] is not None
    assert (tmp_path / "run" / "config.yaml").is_file()


def link_closure(folder: Path, *names: str) -> Path:
    """`folder` with links to what the distributions `names`, and those that they need, have installed here."""
    folder.mkdir()
    wanted, seen = list(names), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))).absolute())
        needs = [need for need in metadata.requires(name) or () if ";" not in need]
        wanted += [re.split(r"[^\w-]", need)[0] for need in needs]
    return folder


USE_THE_KERNELS = """
import importlib.util
import torch
import vcr1_kernels

others = ("vcr1_fast", "transformers", "numpy")
assert not any(importlib.util.find_spec(name) for name in others)
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
tokens = vcr1_kernels.TokenVectors(torch.ones(5), torch.full((5,), 0.2))
target = torch.tensor([1, 0, 10, 3, 7])
loss, _ = vcr1_kernels.fused_linear_policy_loss(hidden, weight, target, vcr1_kernels.PolicyLoss(), tokens)
loss.backward()
assert weight.grad.any()
import vcr1_kernels.head_rows_launch, vcr1_kernels.device.prefix_attention  # these import triton
print(vcr1_kernels.__file__)
"""


def test_the_wheel_of_the_kernels_alone_needs_torch_and_triton(kernels_wheel: Path, tmp_path: Path):
    python, site_packages = empty_environment(tmp_path, link_closure(tmp_path / "shared", "torch", "triton"))
    pip_install(python, kernels_wheel)
    where = run(python, "-c", USE_THE_KERNELS, cwd=tmp_path, OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    assert Path(where.strip()) == site_packages / "vcr1_kernels" / "__init__.py"
    [installed] = metadata.distributions(name="vcr1-kernels", path=[str(site_packages)])
    assert {re.split(r"\W", need)[0] for need in installed.requires or ()} == {"torch", "triton"}
    assert {"LICENSE", "__init__.py", "py.typed"} <= {Path(file).name for file in installed.files or ()}


def test_both_wheels_hold_the_same_kernels(archives: tuple[Path, Path], kernels_wheel: Path):
    def kernels(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist() if name.startswith("vcr1_kernels/")}

    alone = kernels(kernels_wheel)
    assert alone == kernels(archives[1])
    assert set(alone) == {f"vcr1_kernels/{name}" for name in installed_files("kernels/vcr1_kernels")}
    assert archives[1].name.split("-")[1] == kernels_wheel.name.split("-")[1]  # one version


def changed_files(site_packages: Path) -> list[str]:
    """Installed files of ours that are not what the RECORD of a wheel says."""
    files = [
        file
        for name in ("vcr1-fast", "vcr1-kernels")
        for installed in metadata.distributions(name=name, path=[str(site_packages)])
        for file in installed.files or ()
        if file.hash is not None
    ]
    assert len(files) > 200
    return [
        str(file)
        for file in files
        if urlsafe_b64encode(hashlib.sha256(file.read_binary()).digest()).decode().rstrip("=") != file.hash.value
    ]


def test_both_wheels_in_one_environment_in_either_order(
    archives: tuple[Path, Path], kernels_wheel: Path, tmp_path: Path
):
    python, site_packages = empty_environment(tmp_path, sysconfig.get_path("purelib"))
    for wheel in (archives[1], kernels_wheel):  # the trainer, then the kernels over it
        pip_install(python, wheel)
    assert changed_files(site_packages) == []
    pip_install(python, archives[1], "--force-reinstall")  # and the other way round
    assert changed_files(site_packages) == []
    where = "import importlib.util; print(importlib.util.find_spec('vcr1_kernels').origin)"
    found = run(python, "-c", where, cwd=tmp_path).strip()
    assert Path(found) == site_packages / "vcr1_kernels" / "__init__.py"
    (site_packages / "vcr1_kernels" / "losses.py").write_text("")
    assert changed_files(site_packages) == ["vcr1_kernels/losses.py"] * 2  # of either wheel: the check can fail
