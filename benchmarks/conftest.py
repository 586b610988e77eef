"""Options of the suites, and the `measure` fixture: a function's time by the device's own clock, with its provenance."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate, timing
from benchmarks.baselines import usable_backends
from benchmarks.head import PRESETS
from benchmarks.provenance import provenance


def pytest_addoption(parser):
    group = parser.getgroup("sib_fast")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the suites run")
    group.addoption("--preset", choices=sorted(PRESETS), default=None, help="which sizes (benchmarks/head.py); cpu or quick")
    group.addoption("--no-gate", action="store_true", help="for development: time without running the backend's tests first")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("preset") or ("cpu" if metafunc.config.getoption("device") == "cpu" else "quick")
        cases = PRESETS[chosen]
        metafunc.parametrize("case", cases, ids=["x".join(map(str, case)) for case in cases])
    if "backend" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("device"))
        metafunc.parametrize("backend", [*usable_backends(device), "reference"])


@pytest.fixture
def device(request) -> torch.device:
    device = torch.device(request.config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return device


@pytest.fixture(scope="session")
def ceilings(request) -> dict[str, float]:
    small = {"copy": 2**24, "matmul": 256} if request.config.getoption("preset") == "smoke" else {}
    return timing.ceilings(torch.device(request.config.getoption("device")), **small)


@pytest.fixture(scope="session")
def verdicts(request) -> dict[str, dict]:
    """Of every backend that is timed; a red one's benchmarks fail, with the tests that are red."""
    if request.config.getoption("no_gate"):
        return {}
    return gate.verdicts(usable_backends(torch.device(request.config.getoption("device"))))


@pytest.fixture
def measure(benchmark, request, device, ceilings):
    """measure(function, bytes_moved): pytest-benchmark's figures are the eager wall time; device_ms is by graph replay on CUDA.

    bytes_moved is the floor: inputs once, outputs once.
    """
    parameters = request.node.callspec.params
    timed = usable_backends(device) if parameters.get("head") == "ours" else [parameters.get("backend")]
    for backend in timed:
        red = None if backend in (None, "reference") else request.getfixturevalue("verdicts").get(backend)
        if red is not None and not red["green"]:
            pytest.fail(f"backend {backend!r} is not timed: {red['why']}")

    def run(function, *, bytes_moved: int, rounds: int = 15) -> None:
        def call():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
        info = benchmark.extra_info
        info.update(provenance(), device=device.type, floor_bytes=bytes_moved, ceilings=ceilings)
        seconds = benchmark.stats.stats.median
        if device.type == "cuda":
            one = timing.interleaved({"it": function}, device, rounds)["it"]
            info.update(device_ms=timing.summary(one.device), graph=one.graph or "replayed")
            info["peak_extra_mib"] = round(timing.peak_extra_bytes(function, device) / 2**20, 1)
            seconds = info["device_ms"]["median"] / 1e3
        info["gb_per_s_of_floor"] = float(f"{bytes_moved / seconds / 1e9:.4g}")
        info["percent_of_copy"] = float(f"{100 * bytes_moved / seconds / ceilings['copy']:.4g}")

    return run
