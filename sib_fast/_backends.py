"""Which implementations exist, which are usable here, and which one runs: the only place that chooses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from sib_fast._extension import MISSING

REFERENCE = "reference"
# Triton's interpreter runs its kernels on CPU tensors, slowly: what the tests use where there is no GPU.
INTERPRETING_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
# Kernel backends and the device type that each runs on. Which of them an op has, and in what order "auto" asks, the op says.
KERNEL_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if INTERPRETING_TRITON else "cuda"}
BACKENDS = (REFERENCE, *KERNEL_DEVICES)

_warned: set[str] = set()


def why_not(backend: str) -> str | None:
    """None if `backend` is usable in this process, otherwise the reason in words.

    Errors:  ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"why_not: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return None if backend == REFERENCE else MISSING[backend]


def automatic(device: torch.device, kernels: Sequence[str]) -> str:
    """What backend="auto" runs on `device`: the first of `kernels` that is usable there, otherwise the reference."""
    usable = (name for name in kernels if KERNEL_DEVICES[name] == device.type and MISSING[name] is None)
    return next(usable, REFERENCE)


def resolve(op: str, backend: str, device: torch.device, kernels: Sequence[str] = ("cpu",), depth: int = 1) -> str:
    """The backend that runs `op` on `device`. An explicit request is met or refused; only "auto" may fall back.

    kernels: the backends that the op has, in the order in which "auto" prefers them. depth: calls between here and the user.

    Errors:  ValueError for an unknown name; RuntimeError for a backend that is missing here, that the op does not have, or
             that cannot run on the device.
    """
    if backend == "auto":
        chosen = automatic(device, kernels)
        if chosen == REFERENCE:
            _warn_once(device.type, kernels, depth)
        return chosen
    if backend == REFERENCE:
        return REFERENCE
    if backend not in BACKENDS:
        listed = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{op}: backend must be one of {listed}, got {backend!r}")
    if backend not in kernels:
        listed = ", ".join(repr(name) for name in ("auto", REFERENCE, *kernels))
        raise RuntimeError(f"{op}: backend {backend!r} has no kernel of this op. Use one of {listed}")
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


def _warn_once(device_type: str, kernels: Sequence[str], depth: int) -> None:
    """A fallback is slow but right, so it is said once a process and device type, at the caller's line."""
    if device_type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device_type)
    reasons = [f"{name}: {MISSING[name]}" for name in kernels if KERNEL_DEVICES[name] == device_type]
    why = "; ".join(reasons) or "this version has no kernels for it"
    warnings.warn(
        f"sib_fast: 'auto' runs the reference on {device_type} tensors, which is many times slower than a kernel: {why}. "
        "`python -m sib_fast doctor` says more; backend='reference' asks for it without this warning",
        stacklevel=3 + depth,
    )
