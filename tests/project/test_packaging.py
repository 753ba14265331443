"""What pip would install: the sdist builds, the wheel holds everything, and the wheel alone runs the main job."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

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
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a clean copy of the tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, tree / name)
    dist = folder / "dist"
    # no --sdist or --wheel: build makes the sdist, then the wheel from it, so a header left out of the sdist fails here
    run(sys.executable, "-m", "build", "--no-isolation", "-o", dist, tree, cwd=folder, VCR1_NATIVE="cpu")
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


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
    assert {"vcr1_fast/tiny/model.safetensors", "vcr1_fast/tiny/train.yaml", "vcr1_fast/tiny/tokenizer.json"} <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vcr1_fast", "vcr1_kernels"}  # above all no `kernels`


def test_packaged_model_is_small():
    size_bytes = sum(path.stat().st_size for path in (ROOT / "vcr1_fast" / "tiny").iterdir() if path.is_file())
    assert size_bytes < 5_000_000


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh environment with the wheel; dependencies are those of the running one, seen through a .pth."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", archives[1], cwd=folder)
    where = run(python, "-c", "import vcr1_fast, vcr1_kernels; print(vcr1_fast.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site_packages)
    return python.parent


def test_the_wheel_alone_passes_the_doctor(installed: Path, tmp_path: Path):
    report = json.loads(run(installed / "vcr1-fast", "doctor", "--json", cwd=tmp_path))
    assert report["ready"]
    usable = {row["component"]: row["usable"] for row in report["components"]}
    assert usable["vcr1_fast.native"] and usable["tiny model"]


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
