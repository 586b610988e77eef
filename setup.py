"""Build driver: decides what can be built here, and lets CMake (CMakeLists.txt: the one list of sources and flags) do it.

Environment switches, all listed in docs/environment.md:
SIB_FAST_CPU, SIB_FAST_CUDA   1 forces that library (an error says what is missing), 0 forbids it, unset: where possible
TORCH_CUDA_ARCH_LIST          CUDA architectures, default "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
SIB_FAST_BLOCKS               1 builds the pybind11 module `_blocks` too (in-place builds only)
MAX_JOBS                      parallel compile jobs
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


def switch(name: str) -> bool | None:
    """True, False, or None where the environment leaves the choice to us."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def torch_root() -> Path | None:
    """Directory of the installed torch package, found without importing it (an import takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    return root if (root / "include/torch/csrc/stable/library.h").is_file() else None


def cpu_obstacle() -> str | None:
    """Why the CPU library cannot be built here, or None."""
    if torch_root() is None:
        return "no torch >= 2.11 in the build environment (with --no-build-isolation, install torch first)"
    if sys.platform == "win32":
        return "the kernels are written for gcc and clang; Windows has the reference backend only"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")):
        return "no C++ compiler on PATH (install g++ or clang++, or set CXX)"
    if shutil.which("cmake") is None:
        return "no cmake on PATH (pip install cmake)"
    return None


def find_nvcc() -> Path | None:
    """The CUDA compiler. It decides whether CUDA is built; a visible GPU does not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    on_path = shutil.which("nvcc")
    if not home and on_path:
        candidates.append(Path(on_path).resolve())
    for nvcc in candidates:
        if not nvcc.is_file():
            continue
        # A wrapper script on PATH is not where the toolkit is: nvcc itself says that.
        probe = subprocess.run([nvcc, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", probe.stderr, re.MULTILINE)
        real = Path(top.group(1)).resolve() / "bin/nvcc" if top else nvcc
        return real if real.is_file() else nvcc
    return None


def cuda_obstacle() -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    if find_nvcc() is None:
        return "no nvcc (set CUDA_HOME to the CUDA toolkit's folder)"
    root = torch_root()
    if root is not None and not (root / "lib/libtorch_cuda.so").is_file():
        return "the torch in the build environment has no CUDA (libtorch_cuda.so)"
    return None


def cmake_architectures(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as CMake names it: "9.0a" -> 90a-real, "12.0+PTX" -> 120-real and 120-virtual."""
    out = []
    for item in filter(None, re.split(r"[;,\s]+", arch_list)):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 12.0+PTX, got {item!r}")
        number = match.group(1) + match.group(2) + match.group(3)
        out.append(f"{number}-real")
        if match.group(4):
            out.append(f"{number}-virtual")
    if not out:
        raise SystemExit("TORCH_CUDA_ARCH_LIST must name at least one architecture, got an empty list")
    return out


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries of the package."""

    def run(self) -> None:
        cpu, cuda = self.decide("SIB_FAST_CPU", cpu_obstacle()), self.decide("SIB_FAST_CUDA", cuda_obstacle())
        if cuda and not cpu:
            raise SystemExit("SIB_FAST_CUDA=1 needs the CPU library too, which holds the op schemas")
        in_place = bool(self.inplace or getattr(self, "editable_mode", False))
        package = ROOT / "sib_fast" if in_place else Path(self.build_lib).resolve() / "sib_fast"
        output = package / "lib"
        shutil.rmtree(output, ignore_errors=True)
        if not cpu:
            return
        # In place, a folder that stays: the next build compiles what changed, and a test reads the object files.
        build = ROOT / "build/in-place" if in_place else Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DSIB_FAST_TORCH_ROOT={torch_root()}", f"-DSIB_FAST_OUTPUT_DIR={output}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        architectures = []
        if cuda:
            architectures = cmake_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)
            configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        configure += [f"-DSIB_FAST_CUDA_ARCHITECTURES={';'.join(architectures)}"]
        blocks = ""
        if switch("SIB_FAST_BLOCKS"):
            if not in_place:
                print("sib_fast: SIB_FAST_BLOCKS=1 is for in-place builds; the wheel does not carry _blocks")
            else:
                import pybind11

                blocks = str(package / ("_blocks" + sysconfig.get_config_var("EXT_SUFFIX")))
                includes = f"{sysconfig.get_path('include')};{pybind11.get_include()}"
                configure += [f"-DSIB_FAST_PYBIND11_INCLUDE={includes}"]
        configure += [f"-DSIB_FAST_BLOCKS_MODULE={blocks}"]
        compile_ = ["cmake", "--build", str(build)]
        jobs = os.environ.get("MAX_JOBS")
        compile_ += ["--parallel", *([jobs] if jobs else [])]
        for command in (configure, compile_):
            print("sib_fast:", " ".join(command), flush=True)
            subprocess.run(command, check=True)

    @staticmethod
    def decide(name: str, obstacle: str | None) -> bool:
        wish = switch(name)
        if wish and obstacle:
            raise SystemExit(f"{name}=1, but {obstacle}")
        if wish is None and obstacle:
            print(f"sib_fast: not building the library of {name}: {obstacle}", file=sys.stderr)
        return obstacle is None if wish is None else wish

    def get_outputs(self) -> list[str]:
        output = Path(self.build_lib) / "sib_fast/lib"
        return [str(path) for path in output.glob("*")]

    def get_source_files(self) -> list[str]:
        return [
            "CMakeLists.txt",
            *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()),
        ]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake has written into the source tree."""


class AnyPythonWheel(bdist_wheel):
    """The libraries know nothing of Python: one wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("sib_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
