"""What was built, what is usable here, why not, and what to type: `python -m sib_fast doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

from sib_fast import _extension
from sib_fast._backends import BACKENDS, KERNEL_DEVICES, automatic, why_not
from sib_fast._version import __version__
from sib_fast.ops.foreground_mask import KERNELS as MASK_KERNELS
from sib_fast.ops.hsic_objective import KERNELS as OBJECTIVE_KERNELS
from sib_fast.ops.region_statistics import KERNELS as STATISTICS_KERNELS

_HEAD = {"mask": MASK_KERNELS, "statistics": STATISTICS_KERNELS, "objective": OBJECTIVE_KERNELS}
# package: (what it is for, what to type)
_EXTRAS = {
    "triton": ("Triton kernels", "pip install triton"),
    "lightning": ("extra [lab]", "pip install 'sib_fast[lab]'"),
    "torchvision": ("torchvision models and data", "pip install torchvision"),
}
_AGAIN = "pip install --force-reinstall --no-deps --no-build-isolation <where sib_fast came from>"


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_launch() -> str:
    """Launches the smallest kernel of the CUDA library, where both a library and a GPU are there."""
    if _extension.MISSING["cuda"] is not None:
        return f"not usable: {_extension.MISSING['cuda']}"
    if not torch.cuda.is_available():
        return "loaded; not launched: torch sees no GPU"
    x = torch.arange(5, dtype=torch.float32, device="cuda")
    right = torch.equal(torch.ops.sib_fast._device_check(x), 2 * x + 1)
    return f"launched on {torch.cuda.get_device_name()}" if right else "BROKEN: a kernel launched and returned wrong numbers"


def _toolkit() -> str:
    wanted = torch.version.cuda
    if wanted is None:
        return "not needed, torch is a build without CUDA"
    return f"CUDA_HOME may name one; otherwise install the CUDA toolkit {wanted} (https://developer.nvidia.com/cuda-downloads)"


def _steps(compiler: str | None) -> list[str]:
    """What to type for each library that is not here and could be."""
    missing = _extension.MISSING
    if os.environ.get("SIB_FAST_LOAD") == "0":
        return ["unset SIB_FAST_LOAD"]
    if _extension.unbuilt_tree():
        return [
            "after `pip install .` call `sib-fast doctor`, or start Python in another folder: here it takes the source tree, "
            "and pip builds elsewhere; or build here: pip install -e ."
        ]
    steps = []
    if missing["cpu"] is not None:
        steps.append(("" if compiler else "install a compiler (above), then: ") + _AGAIN)
    elif missing["cuda"] is not None and torch.cuda.is_available():
        steps.append(("" if shutil.which("nvcc") else "install nvcc (above), then: ") + "SIB_FAST_CUDA=1 " + _AGAIN)
    return steps


def report() -> list[tuple[str, str]]:
    """Rows (what, finding), in the order they are printed."""
    build = _extension.BUILD_INFO
    rows = [
        ("sib_fast", __version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    if build:
        rows += [
            ("built with", f"{build['compiler']}, against torch {build['built_against_torch']}"),
            ("CPU instruction sets", f"{build['cpu_capabilities']}; SIB_FAST_CPU_CAPABILITY lowers the choice"),
            ("CUDA built with", build["cuda_compiler"] or "not built"),
            ("CUDA architectures", build["cuda_architectures"] or "none"),
        ]
    else:
        rows.append(("built with", "nothing was built"))
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    rows.append(("compiler here", compiler or "none on PATH: apt-get install g++, or conda install -c conda-forge cxx-compiler"))
    rows.append(
        ("cmake here", shutil.which("cmake") or "none on PATH: pip install cmake ninja (a plain `pip install` brings its own)")
    )
    rows.append(("nvcc here", shutil.which("nvcc") or f"none on PATH: {_toolkit()}"))
    for package, (what, command) in _EXTRAS.items():
        version = _version_of(package)
        rows.append((package, f"{version} ({what})" if version else f"not installed ({what}): {command}"))
    for backend in BACKENDS:
        rows.append((f"backend {backend}", why_not(backend) or "usable"))
    rows.append(("CUDA library", _cuda_launch()))
    rows += [("to do", step) for step in _steps(compiler)]
    for device in dict.fromkeys(KERNEL_DEVICES.values()):
        chosen = (f"{op} by {automatic(torch.device(device), kernels)}" for op, kernels in _HEAD.items())
        rows.append((f"auto on {device}", ", ".join(chosen)))
    return rows


def main() -> int:
    rows = report()
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        print(f"{what:<{width}}  {finding}")
    broken = any("BROKEN" in finding for _, finding in rows)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
