"""Builds the one compiled module, vcr1_fast._native, from csrc/. No torch headers, so torch is not needed to build.

VCR1_NATIVE=auto  (default) CUDA and CPU halves if nvcc is found, else CPU alone; a failed build still installs
VCR1_NATIVE=cuda  both halves, or the install fails
VCR1_NATIVE=cpu   the CPU half, or the install fails
VCR1_NATIVE=off   no compiled module
"""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup

MODE = os.environ.get("VCR1_NATIVE", "auto")
if MODE not in {"auto", "cuda", "cpu", "off"}:
    raise SystemExit(f"VCR1_NATIVE is {MODE!r}, wanted auto, cuda, cpu or off")

# sm_90a: H100/H200 machine code. compute_80: PTX that the driver compiles for everything else from A100 on.
CUDA_ARCHS = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]


def find_nvcc() -> str | None:
    """CUDA_HOME first, then PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def cuda_root(nvcc: str) -> Path:
    """nvcc on PATH may be a wrapper script, so ask it: its dry run prints TOP=<toolkit>."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in dry_run.splitlines() if "TOP=" in line]
    return Path(tops[0]) if tops else Path(nvcc).resolve().parents[1]


class build_ext(pybind11_build_ext):  # noqa: N801 - setuptools looks the command up by this name
    def run(self) -> None:
        if self.inplace or self.editable_mode:  # a failed optional build must not leave the last binary importable
            for stale in Path("vcr1_fast").glob("_native.*.so"):
                stale.unlink()
        super().run()

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda_sources = sorted(Path("csrc").glob("*.cu"))
        nvcc = None if MODE == "cpu" else find_nvcc()
        if MODE == "cuda" and not nvcc:
            raise RuntimeError("VCR1_NATIVE=cuda, but there is no nvcc: set CUDA_HOME or put nvcc on PATH")
        if nvcc and cuda_sources:
            self.add_cuda_half(ext, nvcc, cuda_sources)
        super().build_extension(ext)

    def add_cuda_half(self, ext: Pybind11Extension, nvcc: str, sources: list[Path]) -> None:
        root = cuda_root(nvcc)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        for source in sources:
            obj = str(Path(self.build_temp, source.stem + ".cu.o"))
            flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            self.spawn([nvcc, "-c", str(source), "-o", obj, *flags, *CUDA_ARCHS])
            ext.extra_objects.append(obj)
        ext.define_macros.append(("VCR1_WITH_CUDA", None))
        ext.library_dirs += [str(root / lib) for lib in ("lib64", "lib") if (root / lib).is_dir()]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]  # static: importable where there is no driver


native = Pybind11Extension(
    "vcr1_fast._native",
    sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
    depends=sorted(
        str(p) for pattern in ("*.h", "*.cu", "*.cuh") for p in Path("csrc").glob(pattern)
    ),  # into the sdist
    include_dirs=["csrc"],
    cxx_std=17,
    optional=MODE == "auto",
    # fused multiply-add would round differently from the Python definition, which the C++ must equal bit for bit
    extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],  # before glibc 2.34 threads are a library of their own
)
setup(ext_modules=[] if MODE == "off" else [native], cmdclass={"build_ext": build_ext})
