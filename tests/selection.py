"""Which tests run: not those of backends that cannot run here, and of the slow backends' grids a sample (docs/tests.md).

A pytest plugin, loaded by conftest.py. The slow backends are the emulation of CUDA and Triton's interpreter; treated like them
is what only repeats the suite: the kernels of an older CPU, and the pretend device. Without `--long` each of their grids runs
in a few cells, drawn from a seed, such that every value of every parameter is in one of them; of a grid marked sampled(n), n
cells. The seed is the commit's, so that every commit draws anew; `--sample-seed` repeats a run.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from sib_fast import _backends

ROOT = Path(__file__).parent.parent
HEAD = ("foreground_mask", "region_statistics", "hsic_objective")
SEED_OUTSIDE_GIT = 20260101
_counts: Counter[str] = Counter()


def pytest_addoption(parser):
    group = parser.getgroup("selection")
    group.addoption("--long", action="store_true", help="tests marked long too, and every cell of the slow backends' grids")
    group.addoption("--sample-seed", type=int, help="seed of the sample of those grids; default: the commit")
    group.addoption("--every-backend", action="store_true", help="tests of backends that cannot run here too, as skips")
    group.addoption(
        "--cpu-times", type=Path, help="file that gets a line of JSON a test: its CPU seconds, subprocesses' among them"
    )


def commit_seed() -> int:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return int(head.stdout[:8], 16) if head.returncode == 0 else SEED_OUTSIDE_GIT


def pytest_configure(config):
    if config.option.sample_seed is None:  # pytest-xdist hands the options on to its workers
        config.option.sample_seed = commit_seed()


def passed_on(config) -> list[str]:
    """The selection's options for a run of tests that a test starts."""
    return [f"--sample-seed={config.option.sample_seed}", *(["--long"] if config.option.long else [])]


def kernels_of(*ops: str) -> list[str]:
    """The backends in which every one of these ops has a kernel."""
    lists = [importlib.import_module(f"sib_fast.ops.{op}").KERNELS for op in ops]
    return [name for name in _backends.BACKENDS if all(name in kernels for kernels in lists)]


def kernels_of_tests(module) -> list[str]:
    """What a module of tests runs its tests on: what it says, or the op's that it is named after, or the whole head's."""
    name = Path(module.__file__).stem.removeprefix("test_")
    ops = [path.parent.name for path in (ROOT / "sib_fast/ops").glob("*/__init__.py") if name.startswith(path.parent.name)]
    return getattr(module, "KERNELS", None) or kernels_of(*(ops or HEAD))


def unusable(backend: str) -> str | None:
    """Why tests of this backend cannot run here, or None."""
    reason = _backends.why_not(backend)
    if reason is None and _backends.KERNEL_DEVICES.get(backend) == "cuda" and not torch.cuda.is_available():
        return "it is built, but torch sees no GPU"
    return reason


def backend_of(item) -> str | None:
    """The backend that a test's parameters name, if they do."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return next((parameters[name] for name in ("kernel", "backend") if parameters.get(name) in _backends.BACKENDS), None)


def is_slow(backend: str | None, config) -> bool:
    """Whether its grids run by a sample: a backend that is slow here, or one that repeats what another run has in full."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    older_cpu = backend == "cpu" and "SIB_FAST_CPU_CAPABILITY" in os.environ
    pretended = backend == "cuda" and hasattr(config, "pretend_device")
    return backend == "emulated" or interpreted or older_cpu or pretended


def sample(cells: list[dict[str, object]], draw: random.Random) -> set[int]:
    """Indices of cells: drawn one by one, those that hold a parameter's value which no cell before them held."""
    chosen, seen = set(), set()
    for at in draw.sample(range(len(cells)), len(cells)):
        values = {(name, repr(value)) for name, value in cells[at].items()}
        if not seen.issuperset(values):
            chosen.add(at)
            seen |= values
    return chosen


def pytest_collection_modifyitems(config, items):
    keep, left_out, grids = [], [], defaultdict(list)
    usable = set(_backends.BACKENDS) if config.option.every_backend else {b for b in _backends.BACKENDS if unusable(b) is None}
    usable |= {"cuda"} if hasattr(config, "pretend_device") else set()
    for item in items:
        backend = backend_of(item)
        if backend is not None and backend not in usable:
            reason = unusable(backend)
            _counts[f"backend {backend!r} is not usable here: {reason}"] += 1
            left_out.append(item)
        elif config.option.long:
            keep.append(item)
        elif item.get_closest_marker("long"):
            _counts["marked long (--long runs them)"] += 1
            left_out.append(item)
        elif is_slow(backend, config) or item.get_closest_marker("sampled"):
            grids[item.parent.nodeid, item.originalname, backend].append(item)
        else:
            keep.append(item)
    for name, grid in grids.items():
        draw, marker = random.Random(f"{config.option.sample_seed} {name}"), grid[0].get_closest_marker("sampled")
        if marker:
            always = {at for at, item in enumerate(grid) if marker.kwargs.get("always", item.name) in item.callspec.id.split("-")}
            others = sorted(set(range(len(grid))) - always)
            chosen = always | set(draw.sample(others, min(marker.args[0], len(others))))
        else:
            chosen = sample([item.callspec.params for item in grid], draw)
        _counts["outside the sample (--long runs them)"] += len(grid) - len(chosen)
        _counts["in the sample"] += len(chosen)
        keep += [grid[at] for at in sorted(chosen)]
        left_out += [item for at, item in enumerate(grid) if at not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        chosen = set(keep)
        items[:] = [item for item in items if item in chosen]


@pytest.fixture
def drawn(request):
    """drawn(items, value_of): every item with `--long`, otherwise a sample in which every value is held by one."""

    def choose(items, value_of):
        items = list(items)
        draw = random.Random(f"{request.config.option.sample_seed} {request.node.nodeid}")
        chosen = range(len(items)) if request.config.option.long else sample([{"value": value_of(i)} for i in items], draw)
        return [items[at] for at in sorted(chosen)]

    return choose


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if item.config.option.cpu_times is None:
        return (yield)
    before = sum(os.times()[:4])
    result = yield
    record = {"test": item.nodeid, "cpu_s": round(sum(os.times()[:4]) - before, 3)}
    with item.config.option.cpu_times.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return result


# ---- One line for what was left out, from pytest-xdist's workers too. -------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _counts.clear()  # every worker has selected the same
    _counts.update(getattr(node, "workeroutput", {}).get("selection", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["selection"] = dict(_counts)


def pytest_terminal_summary(terminalreporter, config):
    in_sample = _counts.pop("in the sample", 0)
    terminalreporter.write_line(
        f"sample of the slow backends' grids: {in_sample} tests, --sample-seed={config.option.sample_seed}"
    )
    for what, count in _counts.items():
        terminalreporter.write_line(f"not run: {count} tests, {what}")
