"""Builds in place what a target of the Makefile runs on: `python tools/build.py demo | test | all`; or a wheel.

demo   the CPU library, and the CUDA library for the visible GPUs
test   that, the building blocks and the emulation of CUDA; where no GPU is visible the CUDA library for one architecture
all    the CUDA library for every default architecture
wheel  such a wheel, in dist/

TORCH_CUDA_ARCH_LIST decides over all of them. Without it a library that has more than is asked for is kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sib_fast"
ONE = "9.0a"
sys.path.insert(0, str(ROOT))


def load_setup():
    spec = importlib.util.spec_from_file_location("sib_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def wanted(target: str) -> list[str]:
    """Architectures in CMake's names."""
    if setup.cuda_obstacle() is not None:
        setup.say(f"without the CUDA library: {setup.cuda_obstacle()}")
        return []
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return setup.chosen_architectures()
    if target == "all":
        wish = setup.cmake_architectures(setup.DEFAULT_ARCHITECTURES)
    elif setup.visible_gpus():
        wish = setup.chosen_architectures()
    else:
        wish = setup.cmake_architectures(ONE) if target == "test" else []
    path = PACKAGE / "lib/build_info.json"
    built = json.loads(path.read_text())["cuda_architectures"].split() if path.is_file() else []
    return built if set(wish) <= set(built) else wish


def wheel() -> int:
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or setup.DEFAULT_ARCHITECTURES
    os.environ["SIB_FAST_CPU"] = "1"
    return subprocess.call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"], cwd=ROOT)


def main(target: str) -> int:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if target == "wheel":
        return wheel()
    obstacle = setup.cpu_obstacle()
    if obstacle is not None:
        sys.exit(f"sib_fast: nothing can be built: {obstacle}")
    architectures = wanted(target)
    libraries = [PACKAGE / f"lib/libsib_fast_{name}.so" for name in ("cpu", "cuda")]
    before = [path.stat().st_mtime_ns if path.is_file() else 0 for path in libraries]
    # Once built the blocks stay: leaving them out again would compile nothing less.
    blocks = target != "demo" or (setup.IN_PLACE / "libsib_fast_cuda_emulated.so").is_file()
    setup.cmake_build(PACKAGE, setup.IN_PLACE, architectures, blocks)
    if before != [path.stat().st_mtime_ns if path.is_file() else 0 for path in libraries]:
        return subprocess.call([sys.executable, "-m", "sib_fast", "doctor"], cwd=ROOT)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("demo", "test", "all", "wheel"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
