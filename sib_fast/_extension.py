"""Loads the compiled libraries once, at import, and remembers why one is missing.

At import and from constants: a loader that ran lazily inside the call path would break `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).parent / "lib"
OLDEST_TORCH = (2, 11)


def unbuilt_tree() -> Path | None:
    """The source tree that this package is of, if nothing was built in it: Python takes the one that it is started in, and
    `pip install` builds elsewhere."""
    tree = LIBRARY_DIR.parents[1]
    return tree if (tree / "csrc/library.cpp").is_file() and not (LIBRARY_DIR / "libsib_fast_cpu.so").is_file() else None


def _build_info() -> dict[str, str]:
    try:
        return json.loads((LIBRARY_DIR / "build_info.json").read_text())
    except FileNotFoundError:
        return {}


def _load(name: str) -> str | None:
    """Loads `libsib_fast_<name>.so`. Returns None on success, otherwise the reason in words."""
    path = LIBRARY_DIR / f"libsib_fast_{name}.so"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if not path.is_file() and unbuilt_tree():
        return (
            f"it was not built in {unbuilt_tree()}, the source tree that Python was started in: start it in another folder, or "
            "build there, pip install -e ."
        )
    if not path.is_file():
        return f"it was not built: no {path.name} (reinstall sib_fast where a compiler is, see `python -m sib_fast doctor`)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


BUILD_INFO = _build_info()
# SIB_FAST_LOAD=0 leaves the libraries alone: what a machine without a compiler sees, and a way round a broken build.
_SWITCHED_OFF = "SIB_FAST_LOAD=0 is set" if os.environ.get("SIB_FAST_LOAD") == "0" else None
MISSING: dict[str, str | None] = {"cpu": _SWITCHED_OFF or _load("cpu")}
if MISSING["cpu"] is not None:
    MISSING["cuda"] = f"the CPU library, which holds the op schemas, is missing: {MISSING['cpu']}"
elif torch.version.cuda is None:
    MISSING["cuda"] = f"torch {torch.__version__} is a build without CUDA"
else:
    MISSING["cuda"] = _load("cuda")


def _triton_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (PyTorch's CUDA builds for Linux bring it)"
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") != "1":
        return f"torch {torch.__version__} is a build without CUDA"
    return None


MISSING["triton"] = _triton_obstacle()
