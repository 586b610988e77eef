"""Compiles the head's Triton kernels for a GPU that is not here: `python tools/triton_cache.py FOLDER [CAPABILITY]`.

The keys of Triton's cache hold digests of Triton's own files and of the options of a launch, so this must run under the Triton
(and the Python) of the machine that the kernels are for; what is not found there is compiled there. Each launch goes through
Triton's own launching code, on CPU tensors and up to the launch itself: the keys are those of the real launch by construction.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KEPT = (".json", ".cubin")  # what a launch reads


def pretend(capability: int) -> None:
    """Triton takes CPU tensors, for a GPU of this capability, and launches nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from benchmarks import gate
    from sib_fast import _backends
    from sib_fast.ops import _registration

    here = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
    here["get_current_target"] = lambda: GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(SimpleNamespace(**here))
    real = JITFunction.run
    JITFunction.run = lambda kernel, *arguments, grid, warmup, **options: real(
        kernel, *arguments, grid=grid, warmup=True, **options
    )
    _backends.KERNEL_DEVICES["triton"] = "cpu"
    for op in gate.HEAD:
        module = __import__(f"sib_fast.ops.{op}.triton", fromlist=["forward"])
        for name, function in ((f"_{op}", module.forward), (f"_{op}_backward", module.backward)):
            _registration.LIBRARIES["triton"].impl(name, function, "CPU")
    tiles = sys.modules["sib_fast.ops.region_statistics.triton.tiles"]
    tiles.machine_of = lambda device: tiles.Machine(str(capability), 132)  # a cut is no part of a key


def tasks() -> list[tuple]:
    """("parity", case) and ("head", case, product mode), the headline's first."""
    from benchmarks.head import PRESETS
    from tests.gpu.heads import LAYERS
    from tests.ops.test_parity import CASES

    cases = (("parity", *case) for case in CASES if case[0] not in LAYERS)
    modes = (None, "ieee", "tf32x3", "tf32")
    return [*cases, *(("head", case, mode) for case, mode in itertools.product(PRESETS["quick"], modes))]


def compile_one(task: tuple) -> str | None:
    """What went wrong, or None."""
    import torch

    from benchmarks.baselines import natural_inputs, our_head, value_and_gradient
    from tests.gpu.heads import PARTS, inputs

    try:
        if task[0] == "parity":
            _, op, shape, dtype, options = task
            for _ in PARTS[op](*inputs(*shape, dtype=dtype), backend="triton", **options):
                pass
        else:
            _, case, mode = task
            made = natural_inputs(case.images, case.channels, case.size, getattr(torch, case.dtype))
            value_and_gradient(lambda vjp, x: our_head(vjp, x, "triton", mode), *made)
    except Exception as error:  # the GPU's machine will say it in its own words
        return f"{task[:2]}: {type(error).__name__}: {str(error)[:200]}"
    return None


def main(folder: str, capability: str = "90") -> int:
    os.environ.update(TRITON_CACHE_DIR=str(Path(folder).resolve()), TRITON_STORE_BINARY_ONLY="1")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), pretend, (int(capability),)) as pool:
        failed = [why for why in pool.map(compile_one, tasks()) if why is not None]
    print("\n".join(failed))
    print(f"{len(list(Path(folder).glob('*/*.cubin')))} kernels for sm_{capability}, {len(failed)} failures")
    return 0


def localise(folder: Path) -> int:
    """Makes a cache that was made elsewhere readable here: its groups name their files by whole paths. Number of kernels."""
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        paths = {name: str(group.parent / name) for name in json.loads(group.read_text())["child_paths"]}
        group.write_text(json.dumps({"child_paths": {name: p for name, p in paths.items() if name.endswith(KEPT)}}))
    return len(groups)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
