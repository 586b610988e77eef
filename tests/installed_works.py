"""The smallest use of an installed package: `python installed_works.py [backend]`. No pytest, nothing of this tree."""

import sys

import torch

import sib_fast

backend = sys.argv[1] if len(sys.argv) > 1 else "cpu"
vjp = torch.randn(4, 3, 16, 16, requires_grad=True)
mask = sib_fast.foreground_mask(vjp, window_size=5, backend=backend)
statistics = sib_fast.region_statistics(vjp, torch.randn(4, 3, 16, 16), mask, backend=backend)
sib_fast.estimators.hsic_biased(statistics.gram_vjp, statistics.gram_x).backward()
assert torch.isfinite(vjp.grad).all()
print(sib_fast.__file__)
