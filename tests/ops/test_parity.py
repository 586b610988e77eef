"""One check of every kernel family, op and direction against the reference in float64: what a GPU is asked first.

It finds what is grossly wrong within a minute, and each direction by itself: a broken backward pass leaves the forward pass its
verdict (benchmarks/gate.py). The other tests of an op say more. Where there is a GPU also at the headline's size, in every
product mode: what is timed there is compiled then, and known to be right at that size.
"""

from __future__ import annotations

import pytest
import torch

import sib_fast
from sib_fast import _backends
from tests.gpu.heads import LAYERS, PARTS, has_kernels, inputs

KERNELS = sib_fast.BACKENDS[1:]  # the emulation is none of them
SMALL, HEADLINE = (6, 3, 40, 33), (128, 3, 224, 224)
# Float32 against float64 at the small size: rank flips move a window of the mask's gradient, so only gross errors show there.
BOUNDS = {"foreground_mask": 0.2, "region_statistics": 1e-3, "head": 0.3, "hsic_objective": 1e-6}
BOUNDS |= {"batch_norm": 1e-5, "activation": 1e-5, "softmax": 1e-5}
BOUNDS["layer_norm"] = 3e-5  # its rows of three channels: what is left of numbers that cancel
BOUNDS_HALF = {op: max(bound, 1e-2) for op, bound in BOUNDS.items()} | {"layer_norm": 0.2}
CASES = [
    *((op, SMALL, dtype, {}) for op in PARTS for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    *((op, HEADLINE, torch.float32, {}) for op in PARTS if op not in LAYERS),
    *(("region_statistics", HEADLINE, torch.float32, {"precision": mode}) for mode in ("ieee", "tf32x3", "tf32")),
    ("head", HEADLINE, torch.bfloat16, {}),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "shape", "dtype", "options"),
    CASES,
    ids=["-".join([op, "x".join(map(str, shape)), str(dtype)[6:], *options.values()]) for op, shape, dtype, options in CASES],
)
def test_parity(op, shape, dtype, options, direction, kernel):
    if not has_kernels(kernel, op):
        pytest.skip(f"{kernel} has no kernel of this op")
    if shape == HEADLINE and not torch.cuda.is_available():
        pytest.skip("the headline's size is for a GPU")
    if _backends.INTERPRETING_TRITON and (dtype != torch.float32 or op == "head"):
        pytest.skip("the interpreter is slow, and the ops' own tests have run")
    made = inputs(*shape, dtype=dtype)

    def run(backend: str, *tensors: torch.Tensor, **options: str) -> list[torch.Tensor]:
        parts = PARTS[op](*tensors, backend=backend, **options)
        found = next(parts)
        return [t.double() for t in (found if direction == "forward" else next(parts))]

    got, want = run(kernel, *made, **options), run("reference", *(t.double() for t in made))
    bound = {torch.float64: 1e-8, torch.bfloat16: BOUNDS_HALF[op]}.get(dtype, BOUNDS[op])
    bound = 2**-9 if options.get("precision") == "tf32" else bound  # 2^-11 an operand
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert all(error <= bound for error in errors), errors  # NaN is not
