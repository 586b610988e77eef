"""Which implementations exist, which are usable here, and which one runs: the only place that chooses."""

from __future__ import annotations

import warnings

import torch

from sib_fast._extension import MISSING

REFERENCE = "reference"
# Kernel backends and the device type that each runs on.
KERNEL_DEVICES = {"cpu": "cpu"}
BACKENDS = (REFERENCE, *KERNEL_DEVICES)

_warned = False


def why_not(backend: str) -> str | None:
    """None if `backend` is usable in this process, otherwise the reason in words.

    Errors:  ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"why_not: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return None if backend == REFERENCE else MISSING[backend]


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs `op` on `device`. An explicit request is met or refused; only "auto" may fall back.

    Errors:  ValueError for an unknown name; RuntimeError for a backend that is missing here or cannot run on the device.
    """
    if backend == "auto":
        for name, device_type in KERNEL_DEVICES.items():
            if device.type == device_type:
                if MISSING[name] is None:
                    return name
                _warn_once(name)
        return REFERENCE
    if backend == REFERENCE:
        return REFERENCE
    if backend not in BACKENDS:
        listed = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{op}: backend must be one of {listed}, got {backend!r}")
    if MISSING[backend] is not None:
        raise RuntimeError(
            f"{op}: backend {backend!r} is not usable here: {MISSING[backend]}. Use backend='reference' or 'auto', "
            "or run `python -m sib_fast doctor`"
        )
    if device.type != KERNEL_DEVICES[backend]:
        raise RuntimeError(
            f"{op}: backend {backend!r} runs on {KERNEL_DEVICES[backend]} tensors, got a tensor on {device}. "
            "Move the tensor or use backend='auto'"
        )
    return backend


def _warn_once(name: str) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"sib_fast: backend {name!r} is missing ({MISSING[name]}); 'auto' runs the reference, which is many times slower. "
        "`python -m sib_fast doctor` says more",
        stacklevel=4,
    )
