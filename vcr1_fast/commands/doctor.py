"""`vcr1-fast doctor`: every component, usable or not, why not, and what to install.

Each check imports what it reports on, so "usable" means that it loaded here, not that a package is listed. A check
that raises is a finding, never a crash. The exit code is 1 when a component that the main job needs is not usable.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from rich.table import Table

from vcr1_fast import __version__
from vcr1_fast.commands.version import CHECKOUT, commit_of
from vcr1_fast.run.terminal import console

TINY_FILES = ("train.yaml", "synth.yaml", "config.json", "model.safetensors", "tokenizer.json")
SGLANG_MIN = (0, 5, 17)
SGLANG_LIMIT_S = 300.0  # an import takes 10 s of CPU, 25 the first time
SGLANG_PROBE = """
import json, os, shutil
import sglang, torch
from sglang import Engine

Engine.async_generate
cuda = torch.version.cuda or ""
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""
home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # in SGLang's order
nvcc = (None if home else shutil.which("nvcc")) or shutil.which((home or "/usr/local/cuda") + "/bin/nvcc")
found = {"ninja": shutil.which("ninja"), "nvcc": nvcc}
print()
print(json.dumps({"sglang": sglang.__version__, "libraries": [torch.__version__, cuda, nccl], "found": found}))
"""


class UnusableError(Exception):
    """Why a component cannot be used, in one sentence."""


@dataclass(frozen=True, slots=True)
class Component:
    """One row: `check` returns the version and what is known, or raises."""

    name: str
    check: Callable[[], str]
    advice: str  # what to install or do when it is not usable
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    component: str
    usable: bool
    required: bool
    detail: str  # version, or why not
    advice: str  # empty when usable


def doctor(as_json: bool = False, sglang_python: str | None = None) -> int:
    """Prints the findings as a table or as one JSON object. Returns the exit code.

    `sglang_python`: the interpreter to look for SGLang in, as rollout.sglang.python; None: see `sglang_interpreter`.
    """
    components = COMPONENTS
    if sglang_python is not None:
        named = {"sglang": lambda: _sglang(sglang_python)}
        components = tuple(replace(c, check=named.get(c.name, c.check)) for c in components)
    findings = examine(components)
    is_ready = all(finding.usable for finding in findings if finding.required)
    if as_json:
        about = {"version": __version__, "commit": commit_of(CHECKOUT) or None, "platform": platform.platform()}
        print(json.dumps({**about, "ready": is_ready, "components": [asdict(finding) for finding in findings]}))
    else:
        _print_table(findings)
        broken = ", ".join(finding.component for finding in findings if finding.required and not finding.usable)
        print("ready: `vcr1-fast train tiny` can run" if is_ready else f"not ready, because of: {broken}")
    return 0 if is_ready else 1


def examine(components: tuple[Component, ...]) -> list[Finding]:
    """Runs every check; whatever it raises becomes the reason."""
    findings = []
    for component in components:
        try:
            usable, detail = True, component.check()
        except KeyboardInterrupt:
            raise
        except UnusableError as error:
            usable, detail = False, str(error)
        except BaseException as error:
            usable, detail = False, f"{type(error).__name__}: {error}"
        advice = "" if usable else component.advice
        findings.append(Finding(component.name, usable, component.is_required, " ".join(detail.split()), advice))
    return findings


def _print_table(findings: list[Finding]) -> None:
    table = Table("component", "usable", "version, or why not", "what to install", show_lines=False)
    for finding in findings:
        mark = "[green]yes[/]" if finding.usable else ("[bold red]NO[/]" if finding.required else "[yellow]no[/]")
        detail, advice = (text.replace("[", r"\[") for text in (finding.detail, finding.advice))
        table.add_row(finding.component, mark, detail, advice)
    # A log file has no width of its own; at the default 80 every reason would wrap.
    console.print(table, width=None if console.is_terminal else 160)


def _load(module: str, distribution: str) -> str:
    """Imports a module and gives the version of its distribution."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] == error.name.split(".")[0]:
            raise UnusableError("not installed") from None
        raise
    return metadata.version(distribution)


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise UnusableError(f"{platform.python_version()}, wanted 3.11, 3.12 or 3.13")
    return f"{platform.python_version()} on {platform.machine()}"


def _torch() -> str:
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):  # 2.11.0a0 of a vendor's image counts as 2.11
        raise UnusableError(f"{torch.__version__}, wanted 2.11 or later")
    return torch.__version__


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise UnusableError("this torch is built without CUDA")
    if not torch.cuda.is_available():
        raise UnusableError(f"torch is built for CUDA {torch.version.cuda}, but sees no GPU or no driver")
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}"


def _transformers() -> str:
    from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration  # noqa: F401 - what training needs

    return metadata.version("transformers")


def _native() -> str:
    from vcr1_fast import native

    if not native.is_available():
        raise UnusableError(f"{native.unavailable_reason()}; the pure Python definition is used")
    return native.status()


def _kernels() -> str:
    version = _load("vcr1_kernels", "vcr1-fast")
    from vcr1_kernels import unavailable_reason

    reason = unavailable_reason()
    return f"{version}, Triton" if reason is None else f"{version}, torch versions only: {reason}"


PROOF_MODEL = "Qwen2.5-VL-7B"


def _kernel_proof() -> str:
    """Each kernel against its plain path on this GPU, in the sizes of a public model; a run does it in its own."""
    import torch

    from vcr1_fast import native

    if not torch.cuda.is_available():
        raise UnusableError("not run: torch sees no GPU, where runs take the torch versions, with nothing to compare")
    from vcr1_fast.learner.kernel_proof import RUN_KERNELS, Subject, prove
    from vcr1_fast.learner.sharding import World
    from vcr1_fast.tasks.native_cuda import choose_half

    world = World(device=torch.device("cuda", torch.cuda.current_device()))
    proof = prove(Subject.of_public_model(PROOF_MODEL, world.device), world, fresh=True)
    choose_half(world)
    lines = "; ".join([*proof.lines(), f"rewards: {native.in_use()}"])
    held = {verdict.kernel for verdict in proof.verdicts if verdict.outcome == "held"}
    failed = [verdict for verdict in proof.verdicts if verdict.outcome != "held"]
    if failed:
        without = "".join(f"; {name} takes its plain path" for name in RUN_KERNELS if name not in held)
        raise UnusableError(f"{len(failed)} of {len(proof.verdicts)} ways do not hold{without}: {lines}")
    return f"{PROOF_MODEL}: {lines}; {proof.check_s:.1f} s, after {proof.compile_s:.1f} s of compilation"


def _triton() -> str:
    version = _load("triton", "triton")
    if not importlib.import_module("triton.runtime").driver.active.is_active():  # the CPU-only machine has no stubs
        raise UnusableError(f"{version}, but it finds no GPU to compile for")
    return version


def _pyav() -> str:
    version = _load("av", "av")
    from av.codec import Codec

    Codec("h264", "r")
    Codec("libx264", "w")  # the writer of synthetic clips
    return f"{version}, decodes and encodes H.264"


def _torchcodec() -> str:
    from vcr1_fast.video.torchcodec_reader import unavailable_reason

    reason = unavailable_reason()
    if reason is not None:
        raise UnusableError(reason)
    return metadata.version("torchcodec")


def _dali() -> str:
    """NVDEC where there is a GPU, the few CPU decoders elsewhere."""
    import torch

    from vcr1_fast.video.dali_reader import unavailable_reason

    version = _load("nvidia.dali", "nvidia-dali-cuda130")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    reason = unavailable_reason(device)
    if reason is not None:
        raise UnusableError(reason)
    return f"{version}, {'NVDEC' if device == 'gpu' else 'CPU decoders only (VP8, VP9, MJPEG)'}"


def sglang_interpreter() -> str:
    """That of .venv-sglang here, where `make sglang` puts SGLang; else this one, as rollout.sglang.python has it."""
    path = Path(".venv-sglang", "bin", "python")
    return str(path) if path.is_file() else sys.executable


def _sglang(python: str) -> str:
    """Imported in the interpreter that would run it, where other versions of torch and transformers are."""
    if Path(python) == Path(sys.executable) and importlib.util.find_spec("sglang") is None:
        raise UnusableError("not installed")
    if not os.access(python, os.X_OK):
        raise UnusableError(f"{python} is not an interpreter that can be run")
    from vcr1_fast.rollout.sgl.group import Libraries
    from vcr1_fast.rollout.sgl.process import child_environment

    told = subprocess.run(
        [python, "-c", SGLANG_PROBE],
        env=child_environment(python),
        capture_output=True,
        text=True,
        timeout=SGLANG_LIMIT_S,
    )
    if told.returncode != 0:
        reason = told.stderr.strip().splitlines()[-1:] or [f"it ended with {told.returncode}"]
        raise UnusableError(f"does not import in {python}: {reason[0]}")
    probed = json.loads(told.stdout.splitlines()[-1])
    version, found, theirs, own = probed["sglang"], probed["found"], Libraries(*probed["libraries"]), Libraries.here()
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < SGLANG_MIN:
        raise UnusableError(f"{version} in {python}, wanted {'.'.join(map(str, SGLANG_MIN))} or later")
    missing = [name for name in ("ninja", "nvcc") if theirs.cuda and not found[name]]
    if missing:
        raise UnusableError(
            f"{version} in {python} finds no {' and no '.join(missing)} to compile kernels with when it starts: ninja "
            f"comes by pip, nvcc with the toolkit of CUDA {theirs.cuda}, in PATH or CUDA_HOME"
        )
    tools = ", ".join(f"{name} {path}" for name, path in found.items() if path)
    parts = [f"{version} on torch {theirs.torch}", f"NCCL {theirs.nccl}" if theirs.nccl else "no NCCL", tools]
    detail = ", ".join([*filter(None, parts), f"in {python}"])
    if own.nccl != theirs.nccl:
        detail += f"; here NCCL {own.nccl or 'none'}: to broadcast weights, `{own.pip_line(theirs)}` here"
    return detail


def _tensorboard() -> str:
    return _load("torch.utils.tensorboard", "tensorboard")


def _tiny_models() -> str:
    from safetensors import safe_open

    from vcr1_fast.run.model_folder import PACKAGED

    found: list[str] = []
    for model, folder in PACKAGED.items():
        missing = [name for name in TINY_FILES if not (folder / name).is_file()]
        if missing:
            raise UnusableError(f"{', '.join(missing)} missing in {folder}")
        with safe_open(folder / "model.safetensors", framework="numpy") as weights:
            num_tensors = len(list(weights.keys()))
        size_bytes = sum((folder / name).stat().st_size for name in TINY_FILES)
        found.append(f"{model}: {num_tensors} tensors, {size_bytes / 1e6:.1f} MB")
    return "; ".join(found)


def _gloo() -> str:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        raise UnusableError("this torch is built without gloo")
    return "CPU processes"


def _nccl() -> str:
    import torch.distributed as dist
    from torch.cuda import nccl

    if not (dist.is_available() and dist.is_nccl_available()):
        raise UnusableError("this torch is built without NCCL")
    return ".".join(map(str, nccl.version()))


def _flash_attention() -> str:
    """Which flash-attn packages are installed, and on a GPU which one the kernels call and why."""
    import torch
    from vcr1_kernels.flash_routes import PackageOps, flash_ops

    versions: dict[str, str] = {}
    for name in ("flash-attn-3", "flash-attn-4", "flash-attn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    said = [f"installed: {', '.join(f'{name} {version}' for name, version in versions.items()) or 'none'}"]
    used = None
    if torch.cuda.is_available():
        used, reason = flash_ops(torch.device("cuda", torch.cuda.current_device()))
        said.append(f"{used.name if used else 'none'} is used ({reason})")
    if {"flash-attn-4", "flash-attn"} <= versions.keys():
        said.insert(0, "flash-attn and flash-attn-4 overwrite each other's flash_attn/cute: remove one of them")
    elif isinstance(used, PackageOps) or (versions and not torch.cuda.is_available()):
        return "; ".join(said)
    raise UnusableError("; ".join(said))


CUDA_TORCH = "a CUDA build of torch and an NVIDIA driver"
COMPONENTS = (
    Component("python", _python, "Python 3.11, 3.12 or 3.13", is_required=True),
    Component("torch", _torch, "pip install 'torch>=2.11,<2.15'", is_required=True),
    Component("CUDA device", _cuda, CUDA_TORCH),
    Component("transformers", _transformers, "pip install 'transformers>=5.12,<6'", is_required=True),
    Component("vcr1_fast.native", _native, "a C++17 compiler, then VCR1_NATIVE=cpu pip install -e . to see why"),
    Component("vcr1_kernels", _kernels, "pip install -e .", is_required=True),
    Component("kernels, compared", _kernel_proof, CUDA_TORCH + "; a run leaves out what does not hold, and says so"),
    Component("triton", _triton, CUDA_TORCH + "; torch brings its triton"),
    Component(
        "liger-kernel",
        lambda: _load("liger_kernel", "liger-kernel"),
        "pip install 'liger-kernel>=0.8.5,<0.9' (Linux); norms and MLPs on a GPU are transformers' own without",
    ),
    Component("PyAV", _pyav, "pip install 'av>=17'", is_required=True),
    Component("decord", lambda: _load("decord", "decord"), "pip install decord (x86-64 only)"),
    Component("torchcodec", _torchcodec, "pip install -e '.[torchcodec]', and FFmpeg's shared libraries"),
    Component("tensorboard", _tensorboard, "pip install tensorboard", is_required=True),
    Component("tiny models", _tiny_models, "reinstall the package: its data files are incomplete", is_required=True),
    Component("torch.distributed gloo", _gloo, "a torch built with gloo; one process works without"),
    Component("torch.distributed nccl", _nccl, CUDA_TORCH + "; one process works without"),
    Component(
        "sglang",
        lambda: _sglang(sglang_interpreter()),
        "make sglang, or pip install 'sglang>=0.5.17,<0.6' in an environment of its own (rollout.sglang.python)",
    ),
    Component("DALI", _dali, "pip install -e '.[dali]'"),
    Component("flash-attn", _flash_attention, "pip install -e '.[flash]', or '.[flash2]' (needs nvcc); never both"),
)
