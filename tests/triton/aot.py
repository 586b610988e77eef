"""Compiles Triton kernels for GPUs that are not here, exactly as their launches would, and reads what the compiler made.

A launch is recorded, not described: `record` runs the launching function on CPU tensors with the launch itself replaced,
so that signatures, specialisations (divisible by 16, equal to 1), constants and warps are those of the real call.
`report` compiles each for a compute capability and reads registers, stack and local-memory traffic from the cubin.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Whose tiles were chosen with the compiler that is here: with triton 3.8 all; with 3.6 sm_90; with 3.7, an older ptxas, none.
TUNED = {"3.6": (90,), "3.7": ()}.get(version("triton")[:3] if find_spec("triton") else "", CAPABILITIES)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # then @triton.jit makes no function that can be compiled
_POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """One recorded launch. key: equal keys compile to the same binary."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        parts = (self.kernel.__name__, self.signature, sorted(self.constants.items()), self.attributes, self.options)
        return repr(parts)


class Resources(NamedTuple):
    """What one kernel needs on one architecture; local_accesses counts LDL and STL instructions, spills among them."""

    kernel: str
    capability: int
    registers: int
    stack: int
    local: int
    local_accesses: int
    shared: int
    threads: int

    @property
    def clean(self) -> bool:
        """No stack frame, no local memory, and as many registers as a block of this size may have."""
        return self.stack == self.local == self.local_accesses == 0 and self.registers * self.threads <= 65536


def _launch(kernel, grid, arguments: tuple, keywords: dict[str, Any]) -> Launch:
    """What JITFunction.run makes of the arguments, by the public rules of specialisation."""
    names = {parameter.name for parameter in kernel.params}
    options = {name: value for name, value in keywords.items() if name not in names}
    given = dict(zip((parameter.name for parameter in kernel.params), arguments, strict=False))
    given.update((name, value) for name, value in keywords.items() if name in names)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.get(name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[name], constants[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = _ALIGNED
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constants[index,] = "constexpr", 1
                continue
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = _ALIGNED
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: no rule for argument {name} of type {type(value).__name__}")
    grid = tuple(grid(given)) if callable(grid) else tuple(grid)
    return Launch(kernel, grid, signature, constants, attributes, options)


def name_of(launch: Launch) -> str:
    return launch.kernel.__name__


def record(function: Callable[[], Any]) -> list[Launch]:
    """The launches of `function()`, none of them run: buffers that a kernel would fill stay as they were allocated."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    real = JITFunction.run

    def run(kernel, *arguments, grid, warmup, **keywords):
        launches.append(_launch(kernel, grid, arguments, keywords))

    JITFunction.run = run
    try:
        function()
    finally:
        JITFunction.run = real
    return launches


def assert_grids_fit(launches: Iterable[Launch]) -> None:
    """Every launch within CUDA's limits of a grid."""
    for launch in launches:
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert x < 2**31, launch
        assert max(y, z) <= 65535, launch


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def resources(launch: Launch, capability: int) -> Resources:
    """Compiles one launch for sm_<capability> and reads the cubin (cuobjdump comes with triton)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([_tool("cuobjdump"), what, str(cubin)], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    assert fields.get("REG", 0) > 0, f"no resource usage in: {usage}"
    assert "EXIT" in code, "no instructions in the disassembly"
    return Resources(
        kernel=launch.kernel.__name__,
        capability=capability,
        registers=fields["REG"],
        stack=fields["STACK"],
        local=fields["LOCAL"],
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
    )


def report(launches: Iterable[Launch], capabilities: Iterable[int] = CAPABILITIES) -> list[Resources]:
    """Resources of every distinct launch on every capability."""
    distinct = list({launch.key: launch for launch in launches}.values())
    return [resources(launch, capability) for launch in distinct for capability in capabilities]


def table(rows: Iterable[Resources]) -> str:
    """The report as text, one kernel and architecture a line."""
    head = f"{'kernel':<28}{'sm':>5}{'threads':>9}{'registers':>11}{'shared':>8}{'stack':>7}{'local':>7}{'LDL+STL':>9}"
    lines = [
        f"{r.kernel:<28}{r.capability:>5}{r.threads:>9}{r.registers:>11}{r.shared:>8}{r.stack:>7}{r.local:>7}{r.local_accesses:>9}"
        for r in rows
    ]
    return "\n".join([head, *lines])
