"""The kernels on a processor that is not here: `make aarch64`, or `python tools/self_test.py`.

Builds csrc/self_test.cpp here and for aarch64, runs the second under QEMU, and compares what they print. What the kernels do here
is what the tests of the ops prove. Needs g++-aarch64-linux-gnu and qemu-user, and no torch for aarch64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "exact": 0.0}
# Roundings: a machine with fused multiply-add rounds a·b + c once, another twice, and each sums in the order of its vectors.
ROUNDINGS = 16


def build(name: str, *options: str) -> Path:
    sys.path.insert(0, str(ROOT))
    from tools.build import setup

    folder = ROOT / "build" / f"self-test-{name}"
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "--log-level=NOTICE", "-DCMAKE_BUILD_TYPE=Release",
        f"-DSIB_FAST_TORCH_ROOT={setup.torch_root()}", f"-DSIB_FAST_OUTPUT_DIR={folder}", "-DSIB_FAST_SELF_TEST=ON", *options,
    ]  # fmt: skip
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run(configure, check=True)
    subprocess.run(
        ["cmake", "--build", str(folder), "--target", "sib_fast_self_test", *(["-j", jobs] if jobs else [])], check=True
    )
    return folder / "sib_fast_self_test"


def results(*command: object) -> dict[str, tuple[str, list[float]]]:
    """What the program printed: name: (precision, values)."""
    said = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in said.splitlines()]
    return {name: (precision, [float(value) for value in values]) for name, precision, *values in rows}


def roundings_apart(here: list[float], there: list[float], eps: float) -> float:
    """The largest difference in roundings of the largest value; any difference is infinite where eps is 0."""
    if len(here) != len(there):
        return float("inf")
    largest = max(abs(value) for value in here)
    # Written so that a NaN on one side is a difference.
    apart = [0.0 if a == b else abs(a - b) for a, b in zip(here, there, strict=True)]
    if any(value != value for value in apart):
        return float("inf")
    worst = max(apart)
    return 0.0 if worst == 0 else float("inf") if eps * largest == 0 else worst / (eps * largest)


def compare(here: dict, there: dict) -> list[str]:
    """A line for every result that differs by more than roundings."""
    wrong = [f"{name}: printed by one of the two only" for name in sorted(here.keys() ^ there.keys())]
    for name in here.keys() & there.keys():
        precision, values = here[name]
        apart = roundings_apart(values, there[name][1], EPS[precision])
        if apart > ROUNDINGS:
            wrong.append(f"{name}: {apart:.1f} roundings of {precision} apart")
    return sorted(wrong)


def main() -> int:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [tool for tool in (CROSS, QEMU) if shutil.which(tool) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not on PATH: apt-get install g++-aarch64-linux-gnu qemu-user")
    native = build("native")
    cross = build(
        "aarch64", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    here, there = results(native), results(QEMU, cross)
    wrong = compare(here, there)
    print("\n".join(wrong) or f"{len(here)} results of the kernels on aarch64 (emulated) are those of this processor's baseline")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
