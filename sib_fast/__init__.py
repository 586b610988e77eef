"""sib_fast: Spatial Information Bottleneck (S-IB) training for PyTorch (arXiv 2511.09239).

criterion = sib_fast.SIBLoss().attach(model)      # then train as before: criterion(logits, target)
"""

from sib_fast import estimators, masks, nn
from sib_fast._backends import BACKENDS, why_not
from sib_fast._version import __version__
from sib_fast.evidence import EvidenceTerm
from sib_fast.evidence_loss import EvidenceLoss
from sib_fast.loss import SIBLoss
from sib_fast.nn import prepare, restore
from sib_fast.ops import foreground_mask, region_statistics
from sib_fast.step import StepOutput, compile_step
from sib_fast.types import RegionStatistics
from sib_fast.vjp import vjp_leaf, vjp_map

__all__ = [
    "BACKENDS",
    "EvidenceLoss",
    "EvidenceTerm",
    "RegionStatistics",
    "SIBLoss",
    "StepOutput",
    "__version__",
    "compile_step",
    "estimators",
    "foreground_mask",
    "masks",
    "nn",
    "prepare",
    "region_statistics",
    "restore",
    "vjp_leaf",
    "vjp_map",
    "why_not",
]
