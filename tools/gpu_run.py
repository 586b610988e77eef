"""Runs what may hang, crash or be cut at any moment: one call of tools/gpu.py, its clock, its log, its lines, its processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.journal import Journal, read_from, sources

ROOT = Path(__file__).resolve().parent.parent
CARRIED, KEPT = ROOT / "build/gpu", ROOT / "build/gpu-results"
LARGEST_LOG = 8 * 2**20
COMPLETE = (0, 1, 5)  # exit statuses of pytest and of the benchmarks that ran to their end


class Limits(NamedTuple):
    """Seconds for a phase, and for one of its items."""

    phase: float
    item: float


def _die_with_parent() -> None:
    """On Linux a child does not outlive a killed runner."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Run:
    """One call: its clock, its log, its lines."""

    clock = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def __init__(self, out: Path, budget: float, dry: bool = False, earlier: tuple[Path, ...] = (), machine: str = "cpu") -> None:
        self.out, self.dry, self.deadline = out, dry, self.clock() + budget
        self.device, self.families = ("cpu", ["cpu"]) if dry else ("cuda", ["cuda", "triton"])
        self.cores = 1 if dry else max(1, (os.cpu_count() or 2) - 3)
        name = f"{sources()}.{re.sub('[^A-Za-z0-9-]', '-', machine)}.{int(time.time())}-{os.getpid()}"
        paths = [out / "results.jsonl", *([] if dry else [KEPT / f"{name}.jsonl"])]
        self.earlier = [*earlier, *([] if dry else sorted(KEPT.glob("*.jsonl")))]
        self.journal = Journal(*paths, earlier=self.earlier, run=name)
        self.summary: dict[str, Any] = {"dry_run": dry, "run": name, "phases": {}}
        self.scratch = Path(tempfile.mkdtemp())

    def left(self, at_most: float) -> float:
        return max(1.0, min(at_most, self.deadline - self.clock()))

    def log(self, text: str) -> None:
        path = self.out / "log.txt"
        if not path.is_file() or path.stat().st_size < LARGEST_LOG:
            with path.open("a") as log:
                log.write(text)

    def spawn(self, command: list[object], worker: int = 0, of: int = 1, **environment: str) -> subprocess.Popen:
        cache = {"TRITON_CACHE_DIR": str(CARRIED / "triton")} if (CARRIED / "triton").is_dir() else {}
        env = {
            **os.environ, **cache, "PYTHONUNBUFFERED": "1", "SIB_FAST_RUN": self.journal.run, "SIB_FAST_SHARD": f"{worker}/{of}",
            "SIB_FAST_JOURNAL": os.pathsep.join(map(str, self.journal.paths)),
            "SIB_FAST_EARLIER": os.pathsep.join(map(str, self.earlier)), **environment,
        }  # fmt: skip
        with (self.scratch / f"{worker}.txt").open("w") as output:
            return subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def output(self, worker: int) -> str:
        path = self.scratch / f"{worker}.txt"
        return path.read_text(errors="replace")[-20_000:] if path.is_file() else ""

    def command(self, *command: object, timeout: float, worker: int = 0, **environment: str) -> tuple[int, str]:
        """(exit status, end of the output); 124 where the time ran out."""
        process = self.spawn(list(command), worker, **environment)
        try:
            status = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            status = 124
        text = self.output(worker)
        self.log(f"$ {' '.join(map(str, command))}\n{text}\nexit status {status}\n\n")
        return status, text[-3000:]

    def python(self, *arguments: object, timeout: float, **environment: str) -> tuple[int, str]:
        return self.command(sys.executable, *arguments, timeout=timeout, **environment)

    def write(self) -> None:
        partial = self.out / "summary.partial"
        partial.write_text(json.dumps(self.summary, indent=1) + "\n")
        partial.replace(self.out / "summary.json")


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a compiler's own workers too
    process.wait()


class Begun(NamedTuple):
    item: str
    at: float
    rest: dict[str, Any]


def supervise(
    run: Run, suite: str, command: list[object], limits: Limits, workers: int = 1, **environment: str
) -> dict[str, Any]:
    """Runs `command` in `workers` processes, which share the suite's items, until all are judged or the time is up.

    An item that takes longer than its limit, or whose process dies, is written down as timed out or crashed, and another process
    goes on with the rest. Returns {ok, counts of states, why}.
    """
    begun: dict[int, Begun] = {}
    results = run.journal.paths[0]
    seen = results.stat().st_size if results.is_file() else 0
    deadline = run.clock() + run.left(limits.phase)
    alive = {k: run.spawn(command, k, workers, **environment) for k in range(workers)}
    progress, why = dict.fromkeys(alive, False), None

    def look() -> None:
        nonlocal seen
        lines, seen = read_from(results, seen)
        for line in lines:
            if line["suite"] == suite and line["run"] == run.journal.run and line["worker"] in alive:
                progress[line["worker"]] |= line["state"] != "collected"
                if line["state"] == "began":
                    rest = {name: line[name] for name in ("keys", "part_of") if name in line}
                    begun[line["worker"]] = Begun(line["id"], run.clock(), rest)
                elif (one := begun.get(line["worker"])) is not None and one.item == line["id"] and line["state"] != "measured":
                    del begun[line["worker"]]

    while alive:
        run.sleep(0.1)
        look()
        now = run.clock()
        for k, process in list(alive.items()):
            status, seen_last = process.poll(), begun.get(k)
            late, over = seen_last is not None and now - seen_last.at > limits.item, now >= deadline
            if status is None and not late and not over:
                continue
            if status is None:
                kill(process)
            look()  # what it wrote last
            one, text = begun.pop(k, None), run.output(k)
            run.log(f"$ {' '.join(map(str, command))}  (worker {k})\n{text}\nexit status {status}\n\n")
            if one is not None:
                state = "crashed" if status is not None else "timed out" if late and one == seen_last else "cut"
                run.journal.shard = (k, workers)
                run.journal.write(
                    suite, one.item, state, why=f"exit status {status}: {text[-300:]}" if status else state, **one.rest
                )
                run.journal.shard = (0, 1)
            if over or (one is None and (status in COMPLETE or not progress[k])):
                del alive[k]
                if over and status is None:
                    why = why or "time is up"
                elif not over and status not in (0, 5) and not progress[k]:
                    why = f"exit status {status}: {text[-500:]}"
            else:
                progress[k] = False
                alive[k] = run.spawn(command, k, workers, **environment)
    return outcome(run, suite, why)


def outcome(run: Run, suite: str, why: str | None = None) -> dict[str, Any]:
    """Counts of the last states of a suite's items, and what is wrong with those that are wrong."""
    last = {line["id"]: line for line in run.journal.lines() if line["suite"] == suite and line["state"] != "collected"}
    counts: dict[str, int] = {}
    for line in last.values():
        counts[line["state"]] = counts.get(line["state"], 0) + 1
    wrong = {
        item: str(line.get("why", ""))[:300] for item, line in last.items() if line["state"] in ("failed", "crashed", "timed out")
    }
    ok = why is None and not wrong and bool(counts)
    return {"ok": ok, "counts": counts, **({"why": why} if why else {}), "wrong": dict(list(wrong.items())[:40])}
