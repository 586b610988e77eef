"""Which implementations exist, which are usable here, and which one runs: the only place that chooses."""

from __future__ import annotations

import warnings

import torch

from sib_fast._extension import MISSING

REFERENCE = "reference"
# Kernel backends and the device type that each runs on.
KERNEL_DEVICES = {"cpu": "cpu"}
BACKENDS = (REFERENCE, *KERNEL_DEVICES)

_warned: set[str] = set()


def why_not(backend: str) -> str | None:
    """None if `backend` is usable in this process, otherwise the reason in words.

    Errors:  ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"why_not: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return None if backend == REFERENCE else MISSING[backend]


def automatic(device: torch.device) -> str:
    """What backend="auto" runs on `device`: its kernels where they are usable, otherwise the reference."""
    usable = (name for name, device_type in KERNEL_DEVICES.items() if device_type == device.type and MISSING[name] is None)
    return next(usable, REFERENCE)


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs `op` on `device`. An explicit request is met or refused; only "auto" may fall back.

    Errors:  ValueError for an unknown name; RuntimeError for a backend that is missing here or cannot run on the device.
    """
    if backend == "auto":
        chosen = automatic(device)
        if chosen == REFERENCE:
            _warn_once(device.type)
        return chosen
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


def _warn_once(device_type: str) -> None:
    """A fallback is slow but right, so it is said once a process and device type, at the caller's line."""
    if device_type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device_type)
    reasons = [MISSING[name] for name, runs_on in KERNEL_DEVICES.items() if runs_on == device_type]
    why = "; ".join(filter(None, reasons)) or "this version has no kernels for it"
    warnings.warn(
        f"sib_fast: 'auto' runs the reference on {device_type} tensors, which is many times slower than a kernel: {why}. "
        "`python -m sib_fast doctor` says more; backend='reference' asks for it without this warning",
        stacklevel=4,
    )
