"""What the CUDA compiler made of every kernel of the library, per architecture: no stack, no local memory (spills)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sib_fast._extension import LIBRARY_DIR

LIBRARY = LIBRARY_DIR / "libsib_fast_cuda.so"
# Kernels that may have a stack or local memory: a pattern of "<architecture> <mangled name>" -> the reason.
EXCEPTIONS = {
    r"sm_80 .*region_grams_kernel.*TensorCoresILi2ELi4EEELi128E": "not launched on 8.x (pick_forward)",
}


def cuobjdump() -> str | None:
    """From the toolkit, PATH, or the copy that triton brings."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin/cuobjdump"] if home else []
    on_path = shutil.which("cuobjdump")
    candidates += [Path(on_path)] if on_path else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((str(path) for path in candidates if path.is_file()), None)


def parse(dump: str) -> list[tuple[str, str, int, int, int]]:
    """(architecture, kernel, registers, stack, local) of every entry."""
    found, architecture, kernel = [], "", ""
    for line in dump.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append((architecture, kernel, int(match[1]), int(match[2]), int(match[3])))
    return found


@pytest.fixture(scope="module")
def usage() -> list[tuple[str, str, int, int, int]]:
    if not LIBRARY.is_file():
        pytest.skip(f"the CUDA library was not built: no {LIBRARY.name}")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump (it comes with the CUDA toolkit and with triton)")
    dump = subprocess.run([tool, "--dump-resource-usage", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    return parse(dump)


def test_no_kernel_has_a_stack_or_spills(usage):
    assert usage, "no kernel found: has cuobjdump's format changed?"
    bad = [entry for entry in usage if entry[3] or entry[4]]
    unexplained = [entry for entry in bad if not any(re.search(pattern, f"{entry[0]} {entry[1]}") for pattern in EXCEPTIONS)]
    assert not unexplained, "\n".join(f"{a} {k}: {r} registers, stack {s}, local {x}" for a, k, r, s, x in unexplained)
    built = {entry[0] for entry in usage}
    exceptions = [pattern for pattern in EXCEPTIONS if pattern.split()[0] in built]
    stale = [pattern for pattern in exceptions if not any(re.search(pattern, f"{entry[0]} {entry[1]}") for entry in bad)]
    assert not stale, f"exceptions that no kernel needs any more: {stale}"


def test_every_architecture_has_every_kernel(usage):
    kernels = {}
    for architecture, kernel, *_ in usage:
        # From the kernel's own name on: what stands before it holds a hash that differs from one architecture to the next.
        match = re.search(r"[a-z][a-z_]*_kernel.*", kernel)
        kernels.setdefault(architecture, set()).add(match[0] if match else kernel)
    first = next(iter(kernels.values()))
    assert all(names == first for names in kernels.values())
    for name in (
        "device_check_kernel",
        "mean_map_kernel",
        "collect_kernel",
        "column_grads_kernel",
        "activation_double_backward_kernel",
        "activation_bits_kernel",
        "activation_bits_backward_kernel",
        "held_rows_kernel",
        "unit_sums_kernel",
        "unit_writes_kernel",
        "merge_columns_kernel",
        "merge_runs_kernel",
    ):
        assert any(name in kernel for kernel in first), name


# What its stores must be, by a pattern of the kernel's name: 16 bytes at a time where pixels are read so.
PACKED_STORES = {"mean_map_kernelIffLi4ELi1E": 1, r"mean_map_kernelI\w*HalfEfLi8ELi1E": 2, "mean_map_kernelIddLi2ELi1E": 1}


def instructions(tool: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """(kernel, its global loads and stores in the compiled code), for every architecture."""
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # it runs nvdisasm
    command = [tool, "--dump-sass", "--function", ",".join(names), str(LIBRARY)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = []
    for line in dump.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            found.append((match[1], []))
        elif found and (match := re.search(r"\b((?:LDG|STG)[.\w]*)", line)):
            found[-1][1].append(match[1])
    return found


def test_the_mean_is_stored_in_packs(usage):
    """nvcc 13.0 takes a store of a struct apart where another branch writes its parts; then there would be none of 16 bytes."""
    tool = cuobjdump()
    if not (Path(tool).parent / "nvdisasm").is_file():
        pytest.skip("no nvdisasm beside cuobjdump (triton brings both)")
    for pattern, stores in PACKED_STORES.items():
        names = sorted({kernel for _, kernel, *_ in usage if re.search(pattern, kernel)})
        assert names, pattern
        listed = instructions(tool, names)
        assert listed, "no kernel found: has cuobjdump's format changed?"
        for name, memory in listed:
            assert sum(one.startswith("STG.E.128") for one in memory) == stores, (name, memory)
            assert sum(one.startswith("LDG.E.128") for one in memory) >= 3, "an image's three channels, a load each"


def test_parse_reads_cuobjdump():
    dump = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _Z6kernelv:
  REG:40 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse(dump) == [("sm_90a", "_Z6kernelv", 40, 8, 4)]
