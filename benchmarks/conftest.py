"""Options of the suites, and the `measure` fixture: a function's time by the device's own clock, with its provenance."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate, timing
from benchmarks.baselines import usable_backends
from benchmarks.head import PRESETS, needs_of
from benchmarks.journal import Journal
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
    return Journal.here().row("machine", "ceilings") or timing.ceilings(torch.device(request.config.getoption("device")), **small)


@pytest.fixture(scope="session")
def journal() -> Journal:
    return Journal.here()


@pytest.fixture(scope="session")
def verdicts(request, journal) -> dict[str, dict]:
    """By family, op and direction; what is red is not timed, with the tests that are red."""
    if request.config.getoption("no_gate"):
        return {}
    found = gate.verdicts(journal.lines())
    usable = usable_backends(torch.device(request.config.getoption("device")))
    return found if found or journal.supervised else gate.run(usable, journal)


def needs(node: pytest.Item, device: torch.device) -> list[str]:
    """The verdicts behind a benchmark: its group is the op, its mode says which directions."""
    parameters, op = node.callspec.params, node.get_closest_marker("benchmark").kwargs["group"]
    if "head" in parameters:
        return needs_of(parameters["head"], device)
    directions = gate.DIRECTIONS[:1] if parameters.get("mode") == "forward" else gate.DIRECTIONS
    return gate.needs([(parameters["backend"], op)], directions)


@pytest.fixture
def measure(benchmark, request, device, ceilings, journal, verdicts):
    """measure(function, bytes_moved): pytest-benchmark's figures are the eager wall time; device_ms is by graph replay on CUDA.

    bytes_moved is the floor: inputs once, outputs once.
    """
    wanted = needs(request.node, device)
    if red := gate.red(verdicts, wanted):
        pytest.fail(f"not timed: {verdicts[red[0]]['why']}")

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
        info["needs"] = wanted
        info["percent_of_copy"] = float(f"{100 * bytes_moved / seconds / ceilings['copy']:.4g}")
        stats = {"median": benchmark.stats.stats.median, "iqr": benchmark.stats.stats.iqr}
        row = {"group": benchmark.group, "param": request.node.callspec.id, "extra_info": dict(info), "stats": stats}
        journal.write("benchmarks", request.node.nodeid, "measured", row=row)

    return run
