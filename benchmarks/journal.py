"""Results as they come: a line of JSON each, appended by one write, so that a run that is killed has lost nothing that was done.

A line names its suite, its item and the item's state. `began` is written before an item runs: whoever watches knows what hung or
crashed. What an item leads to (a verdict, a table, a summary) is computed from the lines, never kept beside them.

    SIB_FAST_JOURNAL   the files to append to: the results, and the copy that a later call reads
    SIB_FAST_EARLIER   files of earlier calls
    SIB_FAST_RUN       this call's name, "<sources>.<machine>.<call>": lines of another tree or machine are not read
    SIB_FAST_SHARD     this worker, "k/n": every n-th item, from the k-th on
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JUDGED = {"passed", "failed", "skipped", "done", "crashed"}  # not to be run again on the same sources
DEVICE_LOST = 77  # exit status of a process whose CUDA context no call survives
LEFT = (None, "began", "cut")
DIED = {"failed", "crashed", "timed out"}
SOURCES = ("csrc", "sib_fast", "benchmarks", "tests", "CMakeLists.txt", "setup.py", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml"}


@functools.cache
def sources() -> str:
    """A digest of what results depend on: the same with git and without it."""
    digest = hashlib.sha256()
    for top in SOURCES:
        paths = sorted((ROOT / top).rglob("*")) if (ROOT / top).is_dir() else [ROOT / top]
        for path in (p for p in paths if p.suffix in SUFFIXES and p.is_file()):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines behind `offset` and where they end; one that was cut off when its writer was killed is none."""
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    lines = []
    for line in data.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"suite", "id", "state", "run"} <= found.keys():
            lines.append(found)
    return lines, offset + len(data)


def read(path: Path) -> list[dict[str, Any]]:
    return read_from(path, 0)[0]


class Journal:
    """Without paths it is kept in memory."""

    def __init__(self, *paths: Path, earlier: Iterable[Path] = (), run: str = "", shard: tuple[int, int] = (0, 1)) -> None:
        self.paths, self.run, self.shard = paths, run or f"{sources()}.here", shard
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._memory: list[dict[str, Any]] = []
        self._earlier = [line for path in earlier if path not in paths for line in read(path)]

    @classmethod
    def here(cls, path: Path | None = None) -> Journal:
        """This process's: of the environment, else of the file, else in memory."""
        named, earlier = (
            [Path(p) for p in os.environ.get(f"SIB_FAST_{what}", "").split(os.pathsep) if p] for what in ("JOURNAL", "EARLIER")
        )
        number, _, of = os.environ.get("SIB_FAST_SHARD", "0/1").partition("/")
        run, shard = os.environ.get("SIB_FAST_RUN", ""), (int(number), int(of))
        return cls(*(named or ([path] if path else [])), earlier=earlier, run=run, shard=shard)

    @property
    def supervised(self) -> bool:
        return "SIB_FAST_JOURNAL" in os.environ

    def write(self, suite: str, item: str, state: str, **rest: Any) -> None:
        line = {"suite": suite, "id": item, "state": state, "run": self.run, "worker": self.shard[0], "at": round(time.time(), 1)}
        if not self.paths:
            self._memory.append({**line, **rest})
        # The leading newline ends a line that a killed writer left open.
        data = f"\n{json.dumps({**line, **rest}, default=str)}\n".encode()
        for path in self.paths:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, data)
            finally:
                os.close(file)

    def lines(self) -> list[dict[str, Any]]:
        """Every line of this tree on this machine."""
        lines = [*self._earlier, *self._memory, *(line for path in self.paths[:1] for line in read(path))]
        return [line for line in lines if _kind(line["run"]) == _kind(self.run)]

    def state(self, suite: str, item: str) -> str | None:
        return states(self.lines(), suite, self.run).get(item)

    def wants(self, suite: str, item: str, number: int = 0) -> bool:
        """Whether the item, the number-th one, is this worker's, and neither judged by any call nor timed out in this one."""
        worker, of = self.shard
        return number % of == worker and self.state(suite, item) in LEFT

    def row(self, suite: str, item: str) -> Any:
        """What the item found, or None."""
        found = [line["row"] for line in self.lines() if (line["suite"], line["id"]) == (suite, item) and "row" in line]
        return found[-1] if found else None


def states(lines: Iterable[dict[str, Any]], suite: str, run: str | None = None) -> dict[str, str]:
    """The last state of each item. Of another run only what it judged counts: what it cut or lost is tried again."""
    return {
        line["id"]: line["state"]
        for line in lines
        if line["suite"] == suite and (line["state"] in JUDGED or line.get("run") == run or run is None)
    }


def _kind(run: str) -> str:
    return run.rpartition(".")[0]


def attempts(
    journal: Journal, suite: str, item: str, variants: tuple[str, ...], base: tuple[str, ...]
) -> Iterator[tuple[str, tuple]]:
    """All variants in one run; where that died, base with each of the others alone, so that one costs the rest nothing."""
    yield item, variants
    if journal.state(suite, item) in DIED and set(variants) > set(base):
        yield f"{item}, {' and '.join(base)}", base
        for one in (variant for variant in variants if variant not in base):
            yield f"{item}, {one} alone", (*base, one)
