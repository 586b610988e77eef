"""Build driver: decides what can be built here, and lets CMake (CMakeLists.txt: the one list of sources and flags) do it.

Environment switches, all listed in docs/environment.md:
SIB_FAST_CPU, SIB_FAST_CUDA   1 forces that library (an error says what is missing), 0 forbids it, unset: where possible
TORCH_CUDA_ARCH_LIST          CUDA architectures; unset: those of the visible GPUs, and where none is visible the list below
SIB_FAST_BLOCKS               1 builds the pybind11 module `_blocks` too (in-place builds only)
SIB_FAST_LINEINFO             1 adds line numbers for profilers and ptxas's report to the CUDA library
MAX_JOBS                      parallel compile jobs
"""

from __future__ import annotations

import ctypes
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
IN_PLACE = ROOT / "build/in-place"
# 8.6 and 8.9 run 8.0's code and ask the device for its shared memory; later GPUs compile PTX when they load it.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a;10.0;12.0+PTX"
OLDEST_GPU = 80


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
    if not any(shutil.which(name) for name in (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")):
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


def say(message: str) -> None:
    print(f"sib_fast: {message}", file=sys.stderr, flush=True)


def visible_gpus() -> list[int]:
    """Compute capabilities (89, 90 …) of the GPUs that the CUDA driver shows here, each once; [] without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value, found = ctypes.c_int(), ctypes.c_int(), set()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for device in range(count.value):
        capability = 0
        for weight, attribute in ((10, 75), (1, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, …_MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability += weight * value.value
        found.add(capability)
    return sorted(found)


def architectures_of_gpus(gpus: list[int], known: list[int]) -> list[str]:
    """For CMake: the GPUs' own code where the compiler knows them, and PTX of the newest that it knows among or below them."""
    gpus = [gpu for gpu in gpus if gpu >= OLDEST_GPU]
    below = [one for one in known if gpus and OLDEST_GPU <= one <= gpus[-1]]
    if not below:
        return []
    return [f"{gpu}a-real" if gpu == 90 else f"{gpu}-real" for gpu in gpus if gpu in known] + [f"{max(below)}-virtual"]


def cmake_architectures(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as CMake names it: "9.0a" -> 90a-real, "12.0+PTX" -> 120-real and 120-virtual."""
    out, too_old = [], []
    for item in filter(None, re.split(r"[;,\s]+", arch_list)):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 12.0+PTX, got {item!r}")
        if int(match.group(1) + match.group(2)) < OLDEST_GPU:
            too_old.append(item)
            continue
        number = match.group(1) + match.group(2) + match.group(3)
        out.append(f"{number}-real")
        if match.group(4):
            out.append(f"{number}-virtual")
    if not out:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST must name at least one architecture from 8.0 on, got {arch_list!r}")
    if too_old:
        say(f"TORCH_CUDA_ARCH_LIST: the kernels need 8.0, left out: {' '.join(too_old)}")
    return out


def known_to(nvcc: Path) -> list[int]:
    """The compute capabilities that this nvcc compiles for; [] where it does not say."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return sorted(int(number) for number in re.findall(r"^sm_(\d+)$", listed, re.MULTILINE))


def chosen_architectures() -> list[str]:
    """What the CUDA library is compiled for, in CMake's names: as listed, or for the GPUs here, or for all."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return cmake_architectures(listed)
    known, gpus = known_to(find_nvcc()), visible_gpus()
    here = architectures_of_gpus(gpus, known)
    if here:
        return here
    if gpus:
        say(f"no visible GPU is of compute capability 8.0 or later ({gpus}): building for those that are elsewhere")
    every = cmake_architectures(DEFAULT_ARCHITECTURES)
    out = [one for one in every if not known or int(re.match(r"\d+", one)[0]) in known]
    if out != every:
        say(f"this nvcc is too old for {' '.join(one for one in every if one not in out)}: left out")
    return out


def cmake_build(package: Path, build: Path, architectures: list[str], blocks: bool) -> None:
    """Configures and compiles: libraries into package/lib, intermediate files into `build`. No architectures: no CUDA library."""
    output = package / "lib"
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", "--log-level=NOTICE",
        f"-DSIB_FAST_TORCH_ROOT={torch_root()}", f"-DSIB_FAST_OUTPUT_DIR={output}",
        f"-DSIB_FAST_CUDA_ARCHITECTURES={';'.join(architectures)}",
        f"-DSIB_FAST_LINEINFO={'ON' if switch('SIB_FAST_LINEINFO') else 'OFF'}",
    ]  # fmt: skip
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    if shutil.which("ccache"):
        configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
    if architectures:
        configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
    else:
        (output / "libsib_fast_cuda.so").unlink(missing_ok=True)
    module = ""
    if blocks:
        import pybind11

        module = str(package / ("_blocks" + sysconfig.get_config_var("EXT_SUFFIX")))
        configure += [f"-DSIB_FAST_PYBIND11_INCLUDE={sysconfig.get_path('include')};{pybind11.get_include()}"]
    configure += [f"-DSIB_FAST_BLOCKS_MODULE={module}"]
    jobs = os.environ.get("MAX_JOBS")
    compile_ = ["cmake", "--build", str(build), "--parallel", *([jobs] if jobs else [])]
    # ccache finds a file again that was compiled in another folder (pip builds each time in a new one); ninja shows its pace.
    environment = {
        "CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", "NINJA_STATUS": "[%f/%t, %es] ", **os.environ
    }  # fmt: skip
    for command in (configure, compile_):
        if subprocess.run(command, env=environment).returncode != 0:
            raise SystemExit(f"sib_fast: the build failed, see above: {' '.join(command)}")


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries of the package."""

    def run(self) -> None:
        cpu, cuda = self.decide("SIB_FAST_CPU", cpu_obstacle()), self.decide("SIB_FAST_CUDA", cuda_obstacle())
        if cuda and not cpu:
            raise SystemExit("SIB_FAST_CUDA=1 needs the CPU library too, which holds the op schemas")
        in_place = bool(self.inplace or getattr(self, "editable_mode", False))
        package = ROOT / "sib_fast" if in_place else Path(self.build_lib).resolve() / "sib_fast"
        if not cpu:
            shutil.rmtree(package / "lib", ignore_errors=True)
            return
        blocks = bool(switch("SIB_FAST_BLOCKS"))
        if blocks and not in_place:
            say("SIB_FAST_BLOCKS=1 is for in-place builds; the wheel does not carry _blocks")
        # In place, a folder that stays: the next build compiles what changed, and a test reads the object files.
        build = IN_PLACE if in_place else Path(self.build_temp).resolve() / "cmake"
        cmake_build(package, build, chosen_architectures() if cuda else [], blocks and in_place)

    @staticmethod
    def decide(name: str, obstacle: str | None) -> bool:
        wish = switch(name)
        if wish and obstacle:
            raise SystemExit(f"{name}=1, but {obstacle}")
        if wish is None and obstacle:
            say(f"not building the library of {name}: {obstacle}")
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


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("sib_fast._native", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    )
