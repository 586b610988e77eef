"""A pytest plugin (`-p benchmarks.streaming`): each test's outcome goes to the journal as soon as it is there.

Tests that the journal already judges are left out, and those of other workers. A CUDA error that no later call survives ends the
process, so that the tests after it are not red for it: whoever watches starts another one for the rest.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate
from benchmarks.journal import DEVICE_LOST, LEFT, ROOT, Journal, states

BLOCK = 4  # neighbours go to one worker: parameters of a test share what was compiled


def pytest_addoption(parser):
    parser.addoption("--families", default="", help="kernel families whose tests are wanted; default: every test")
    parser.addoption("--whole", action="store_true", help="these are all the tests of a verdict")
    parser.addoption("--suite", default=gate.SUITE, help="what the journal calls them")


def pytest_configure(config):
    wanted = [name for name in config.getoption("families").split(",") if name]
    config.pluginmanager.register(Stream(Journal.here(), config.getoption("suite"), wanted))


class Stream:
    def __init__(self, journal: Journal, suite: str, families: list[str]) -> None:
        self.journal, self.suite, self.families = journal, suite, families
        self.keys: dict[str, list[str]] = {}
        self.found: dict[str, Any] = {}

    def _wanted(self, item: pytest.Item) -> bool:
        """Of the gate's tests those that judge a family; elsewhere all but those that ask for another family."""
        if not self.families:
            return True
        if self.suite == gate.SUITE:
            return bool(self.keys[item.nodeid])
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        family = parameters.get("kernel", parameters.get("backend"))
        return family in self.families or (family is None and "tests/gpu" in item.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            path = Path(item.path)
            found = gate.keys_of(str(path.relative_to(ROOT) if ROOT in path.parents else path), item.originalname, parameters)
            self.keys[item.nodeid] = [one for one in found if not self.families or one.split()[0] in self.families]
        asked = [item for item in items if self._wanted(item)]
        counts: dict[str, int] = {}
        for item in asked:
            for name in self.keys[item.nodeid]:
                counts[name] = counts.get(name, 0) + 1
        self.journal.write(self.suite, "collected", "collected", counts=counts, whole=config.getoption("whole"))
        judged = states(self.journal.lines(), self.suite, self.journal.run)
        number, of = self.journal.shard
        mine = [item.nodeid for k, item in enumerate(asked) if k // BLOCK % of == number]
        left = {name for name in mine if judged.get(name) in LEFT}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in left])
        items[:] = [item for item in items if item.nodeid in left]

    def pytest_runtest_logstart(self, nodeid):
        self.found = {"state": "passed", "seconds": 0.0}
        self.journal.write(self.suite, nodeid, "began", keys=self.keys[nodeid])

    def pytest_runtest_logreport(self, report):
        self.found["seconds"] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found.update(state="failed", why=(crash.message if crash else str(report.longrepr))[:400])
        elif report.skipped and self.found["state"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.found.update(state="skipped", why=str(reason)[:200])

    def pytest_runtest_logfinish(self, nodeid):
        found = {**self.found, "seconds": round(self.found["seconds"], 2)}
        self.journal.write(self.suite, nodeid, found.pop("state"), keys=self.keys[nodeid], **found)
        if self.found["state"] == "failed" and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(DEVICE_LOST)
