"""Every kernel once, on small shapes, for compute-sanitizer: `bash tools/gpu.sh OUT sanitizer` or

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize cuda

Without caching each tensor is an allocation of its own, so that a read past its end is seen. Shapes that no tile divides.
"""

from __future__ import annotations

import sys

import torch

from sib_fast import _backends
from tests.gpu.heads import inputs, steps

SHAPES = [(5, 3, 17, 23), (2, 1, 1, 50), (3, 70, 7, 7), (67, 3, 9, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def main(backend: str, only: str = "") -> int:
    device = _backends.KERNEL_DEVICES[backend]
    torch.set_default_device(device)
    for name, step in steps(backend).items():
        if only in name:
            for shape in SHAPES:
                for dtype in DTYPES:
                    made = inputs(*shape, dtype=dtype)
                    made = (made[0].contiguous(memory_format=torch.channels_last), *made[1:]) if shape[1] > 1 else made
                    finite = all(torch.isfinite(t).all().item() for t in step(*made, backend=backend))
                    print(f"{name} {shape} {dtype} {'finite' if finite else 'NOT FINITE'}", flush=True)
                    if not finite:
                        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
