"""Proof and measurement on a GPU, in phases, within a time limit, with no network: `bash tools/gpu.sh OUT [phase …]`.

setup      the libraries that came along; where they do not load, built against the machine's own torch and architecture
parity     every kernel family, op and direction against the reference, small and at the headline's size
ceilings   copy bandwidth, matrix rates, error against chain length, naive's kernels one by one
headline   benchmarks.head at 128×3×224²: baselines and every op that is not red, in every product mode
resnet50   benchmarks.step: ResNet-50 in bf16, and as the authors run it
tests      the rest of each op's tests: the verdicts by family, op and direction that a figure needs to be reported
gpu        tests/gpu: same bits, streams, graphs, no synchronisation, more than 2^31 elements, memory; and the Triton kernels' own
head       benchmarks.head at every size
loss       the loss's tests on each family
step       benchmarks.step: every model, precision and layout, eager
ops        the pytest-benchmark suites
compiled   what torch.compile makes of the step and of the baselines: minutes each
choice     benchmarks.convolution_choice: what the rules of the convolution on CUDA should be; asked for
sanitizer  compute-sanitizer memcheck and racecheck, a process for each op, caching off; asked for

Every result is a line of OUT/results.jsonl as soon as it is there (benchmarks/journal.py), so a run may be cut at any moment; the
next call goes on where this one stopped, from what lies in build/gpu-results or is named by --earlier. Beside it summary.json and
log.txt. A test or a measurement that hangs or crashes costs itself alone: it is noted, and the rest go on in another process.

--bundle   here, with a compiler: build/gpu, the libraries for the GPU and what they were made from; --collect FOLDER FILE … turns
lines into the files that benchmarks/results stores. --dry-run runs the same phases on the CPU with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import triton_cache  # noqa: E402

from benchmarks.journal import Journal, read, read_from, sources  # noqa: E402

LIBRARIES, CARRIED, KEPT = ROOT / "sib_fast/lib", ROOT / "build/gpu", ROOT / "build/gpu-results"
LARGEST = 60 * 2**20  # bytes of tree and bundle: what may be brought to a machine without a network
LARGEST_LOG = 8 * 2**20
ARCHITECTURE = "9.0a"  # H100 and H200: what the bundle is for, unless it is told another
COMPLETE = (0, 1, 5)  # exit statuses of pytest and of the benchmarks that ran to their end


class Limits(NamedTuple):
    """Seconds for a phase, and for one of its items."""

    phase: float
    item: float


# In the order of what is worth most.
PHASES = {
    "setup": Limits(300, 300), "parity": Limits(180, 90), "ceilings": Limits(60, 60), "headline": Limits(150, 90),
    "resnet50": Limits(200, 120), "tests": Limits(330, 90), "gpu": Limits(240, 120), "head": Limits(240, 90),
    "loss": Limits(150, 90), "step": Limits(500, 120), "ops": Limits(240, 60), "compiled": Limits(540, 300),
    "choice": Limits(400, 60), "sanitizer": Limits(500, 240),
}  # fmt: skip
ASKED = ("choice", "sanitizer")


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


# ---- phases: each returns what goes into the summary; "ok" decides the table ------------------------------------------------


def setup(run: Run, limits: Limits) -> dict[str, Any]:
    how = "what is built here"
    if not run.dry and (CARRIED / "lib").is_dir():
        shutil.copytree(CARRIED / "lib", LIBRARIES, dirs_exist_ok=True)
        how = "the libraries that came along"
    kernels = 0
    if not run.dry and (CARRIED / "triton.tar.xz").is_file() and not (CARRIED / "triton").is_dir():
        with tarfile.open(CARRIED / "triton.tar.xz") as archive:
            archive.extractall(CARRIED / "triton", filter="data")
        kernels = triton_cache.localise(CARRIED / "triton")
    status, text = run.python("-m", "sib_fast", "doctor", timeout=run.left(90))
    if not run.dry and (status != 0 or "launched on" not in text):
        how = _compile(run, limits.phase)
        status, text = run.python("-m", "sib_fast", "doctor", timeout=run.left(90))
    return {
        "ok": how is not None and status == 0,
        "how": how,
        "triton_kernels_brought": kernels,
        "doctor": text.strip().splitlines(),
    }


def _compile(run: Run, seconds: float) -> str | None:
    """How it was built, or None."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
    blocks = (Path(sysconfig.get_path("include")) / "Python.h").is_file() and importlib.util.find_spec("pybind11")
    for with_blocks in ("1", "0") if blocks else ("0",):
        status, _ = run.python(
            "setup.py", "build_ext", "--inplace", timeout=run.left(seconds), SIB_FAST_CPU="1", SIB_FAST_CUDA="1",
            SIB_FAST_BLOCKS=with_blocks, TORCH_CUDA_ARCH_LIST=architecture, MAX_JOBS=str(os.cpu_count()),
        )  # fmt: skip
        if status == 0:
            return f"built here for {architecture}, {'with' if with_blocks == '1' else 'without'} _blocks"
    # A setuptools too old for pyproject.toml, say: CMake alone, which setup.py only drives.
    if _cmake(run, seconds, architecture.replace(".", "") + "-real", LIBRARIES):
        return f"built here for {architecture} by CMake alone"
    return None


def _cmake(run: Run, seconds: float, architectures: str, output: Path) -> bool:
    """Configures and builds as setup.py does, without it. No architectures: without CUDA."""
    import torch

    folder, nvcc = ROOT / "build/cmake-alone", shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", f"-DSIB_FAST_OUTPUT_DIR={output}",
        f"-DSIB_FAST_TORCH_ROOT={Path(torch.__file__).parent}", f"-DSIB_FAST_CUDA_ARCHITECTURES={architectures}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if architectures and nvcc else []), *(["-GNinja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    compile_ = ["cmake", "--build", folder, "--parallel", os.cpu_count()]
    return all(run.command(*command, timeout=run.left(seconds))[0] == 0 for command in (configure, compile_))


def _pytest(run: Run, *arguments: object, suite: str = "tests") -> list[object]:
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.streaming", "--tb=short",
        "--show-capture=no", f"--suite={suite}", f"--families={','.join(run.families)}", *arguments,
    ]  # fmt: skip


def parity(run: Run, limits: Limits) -> dict[str, Any]:
    found = supervise(run, "tests", _pytest(run, "tests/ops/test_parity.py"), limits, run.cores)
    return {**found, "verdicts": verdicts(run)}


def tests(run: Run, limits: Limits) -> dict[str, Any]:
    where = ["tests/ops/test_parity.py", "tests/ops/test_softmax.py"] if run.dry else ["tests/ops", "tests/test_benchmarks.py"]
    found = supervise(run, "tests", _pytest(run, *([] if run.dry else ["--whole"]), *where), limits, run.cores)
    return {**found, "verdicts": verdicts(run)}


def gpu(run: Run, limits: Limits) -> dict[str, Any]:
    """What is large or measures memory has the card to itself."""
    files, alone = ["tests/gpu"] if run.dry else ["tests/gpu", "tests/triton"], "two_to_the_31 or memory"
    command = _pytest(run, *files, "-k", f"not ({alone})", suite="gpu")
    supervise(run, "gpu", command, limits._replace(phase=limits.phase * 0.7), run.cores)
    return supervise(run, "gpu", _pytest(run, *files, "-k", alone, suite="gpu"), limits)


def loss(run: Run, limits: Limits) -> dict[str, Any]:
    files = ["tests/test_autocast.py"] if run.dry else ["tests/test_loss.py", "tests/test_autocast.py", "tests/test_compile.py"]
    return supervise(run, "loss", _pytest(run, *files, suite="loss"), limits, run.cores)


def _module(run: Run, name: str, *options: object) -> list[object]:
    return [sys.executable, "-m", f"benchmarks.{name}", "--device", run.device, *options]


def ceilings(run: Run, limits: Limits) -> dict[str, Any]:
    return supervise(run, "machine", _module(run, "machine", *(["--small"] if run.dry else [])), limits)


def headline(run: Run, limits: Limits) -> dict[str, Any]:
    return _head(run, limits, "smoke" if run.dry else "headline")


def head(run: Run, limits: Limits) -> dict[str, Any]:
    """Triton's kernels are compiled on all cores first."""
    preset = "smoke" if run.dry else run.summary["preset"]
    warm = _module(run, "head", "--preset", preset, "--warm", *_precisions(run))
    supervise(run, "warm", warm, limits._replace(phase=limits.phase * 0.4), run.cores)
    return _head(run, limits, preset)


def _head(run: Run, limits: Limits, preset: str, *options: object) -> dict[str, Any]:
    rounds = ["--rounds", 3] if run.dry else []
    return supervise(run, "head", _module(run, "head", "--preset", preset, *rounds, *options, *_precisions(run)), limits)


def _precisions(run: Run) -> list[str]:
    return [] if run.dry else ["--precisions", "ieee", "tf32x3", "tf32"]


def _step(run: Run, limits: Limits, preset: str) -> dict[str, Any]:
    small = ["--models", "resnet18", "--variants", "ours", "--images", 2, "--size", 32, "--rounds", 1, "--no-memory"]
    return supervise(run, "step", _module(run, "step", *(small if run.dry else ["--preset", preset, "--profile"])), limits)


def resnet50(run: Run, limits: Limits) -> dict[str, Any]:
    return _step(run, limits, "goals")


def step(run: Run, limits: Limits) -> dict[str, Any]:
    return _step(run, limits, "table")


def compiled(run: Run, limits: Limits) -> dict[str, Any]:
    _step(run, limits, "compiled")
    return _head(run, limits, "smoke" if run.dry else "headline", *([] if run.dry else ["--compiled"]))


def ops(run: Run, limits: Limits) -> dict[str, Any]:
    """Forward and step of each op: the head has a phase of its own."""
    preset = "smoke" if run.dry else run.summary["preset"]
    command = _pytest(
        run, "benchmarks", "--benchmark-only", "--device", run.device, "--preset", preset, "-k",
        "not test_head and not reference", suite="benchmarks",
    )  # fmt: skip
    return supervise(run, "benchmarks", command, limits)


def choice(run: Run, limits: Limits) -> dict[str, Any]:
    small = ["--images", 1, "--rounds", 1] if run.dry else []
    return supervise(run, "convolution_choice", _module(run, "convolution_choice", *small), limits)


def sanitizer(run: Run, limits: Limits) -> dict[str, Any]:
    """A process for each op, tool and family, several at once; Triton's kernels are compiled before, without the tool."""
    tool = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if tool is None and not run.dry:
        return {"ok": False, "why": "no compute-sanitizer on PATH"}
    deadline = run.clock() + run.left(limits.phase)

    def one(numbered: tuple[int, tuple[str, str, str]]) -> None:
        worker, (check, family, op) = numbered
        item = f"{check} {family} {op}"
        if deadline - run.clock() < 5 or not run.journal.wants("sanitizer", item):
            return
        before = [] if run.dry or check == "plain" else [tool, "--tool", check, "--error-exitcode", 9, "--print-limit", 20]
        run.journal.write("sanitizer", item, "began")
        status, text = run.command(
            *before, sys.executable, "-m", "tests.gpu.sanitize", family, op, worker=worker,
            timeout=min(limits.item, deadline - run.clock()), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        state = {0: "passed", 124: "cut"}.get(status, "failed")
        run.journal.write("sanitizer", item, state, why=text[-600:] if status else None)

    from tests.gpu.heads import steps

    pairs = [(family, op) for family in run.families for op in steps(family)]
    with ThreadPoolExecutor(2 if run.dry else 6) as pool:
        for checks in (("plain",),) if run.dry else (("plain",), ("memcheck", "racecheck")):
            list(pool.map(one, enumerate((check, *pair) for check in checks for pair in pairs)))
    return outcome(run, "sanitizer")


# ---- before and after -------------------------------------------------------------------------------------------------------


def verdicts(run: Run) -> dict[str, Any]:
    from benchmarks import gate

    return gate.verdicts(run.journal.lines())


def _of_one_architecture() -> Path:
    """The built libraries; anew, for one architecture alone, where they hold more: together they are too much to travel."""
    info = LIBRARIES / "build_info.json"
    built = json.loads(info.read_text()).get("cuda_architectures", "").split() if info.is_file() else []
    made = min((path.stat().st_mtime for path in LIBRARIES.glob("*.so")), default=0.0)
    if built == [ARCHITECTURE.replace(".", "") + "-real"] and all(p.stat().st_mtime <= made for p in (ROOT / "csrc").rglob("*")):
        return LIBRARIES
    folder = ROOT / "build/gpu-one"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURE, "SIB_FAST_CPU": "1", "SIB_FAST_BLOCKS": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder / "lib/sib_fast/lib"


def bundle(triton: str | None = None) -> int:
    """build/gpu: the libraries of this tree, stripped, its commit and the digest of its sources. triton: a python with the torch
    and the Triton of the GPU's machine, which then compiles Triton's kernels here."""
    from benchmarks.provenance import commit

    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir(parents=True)
    shutil.copytree(_of_one_architecture(), CARRIED / "lib")
    for library in (CARRIED / "lib").glob("*.so"):
        if shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", library], check=True)
    if triton:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([triton, ROOT / "tools/triton_cache.py", folder], cwd=ROOT, check=True)
            triton_cache.localise(Path(folder))
            with tarfile.open(CARRIED / "triton.tar.xz", "w:xz") as archive:
                for path in sorted(p for p in Path(folder).glob("*/*") if p.name.endswith(triton_cache.KEPT)):
                    archive.add(path, path.relative_to(folder))
    (CARRIED / "stamp.json").write_text(json.dumps({"commit": commit(), "sources": sources()}) + "\n")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    size, tree = (
        sum(path.stat().st_size for path in paths if path.is_file())
        for paths in (CARRIED.rglob("*"), (ROOT / name for name in tracked))
    )
    print(f"{CARRIED}: commit {commit()[:12]}, {size / 2**20:.1f} MiB beside a tree of {tree / 2**20:.1f}")
    if size + tree > LARGEST:
        print(f"gpu.py: together more than {LARGEST / 2**20:.0f} MiB, which is what may travel", file=sys.stderr)
        return 1
    return 0


def stale() -> str | None:
    """Why the bundle that lies here is not this tree's, or None."""
    stamp = CARRIED / "stamp.json"
    if not stamp.is_file():
        return "its stamp.json is missing" if CARRIED.is_dir() else None
    made = json.loads(stamp.read_text())["sources"]
    return None if made == sources() else f"it was made from sources {made}, this tree is {sources()}"


def collect(folder: Path, files: list[Path]) -> int:
    """The files that benchmarks/results stores, from the lines of one or more calls on this tree; each holds the verdicts."""
    from benchmarks import gate
    from benchmarks.provenance import file_of, write_json

    runs = [line["run"] for path in files for line in read(path) if line["run"].startswith(sources())]
    if not runs:
        print("gpu.py: no line of these files is of this tree's sources", file=sys.stderr)
        return 1
    lines = Journal(earlier=files, run=runs[-1]).lines()
    source, found = next((line["row"] for line in reversed(lines) if line["suite"] == "run"), {}), gate.verdicts(lines)
    suites = dict.fromkeys(line["suite"] for line in lines)
    for suite in (suite for suite in ("head", "step", "convolution_choice") if suite in suites):
        write_json(folder / f"{suite}.json", file_of(lines, suite, found, source))
    benches = list({line["id"]: line["row"] for line in lines if line["suite"] == "benchmarks" and "row" in line}.values())
    machine = {line["id"]: line["row"] for line in lines if line["suite"] == "machine" and "row" in line}
    others = {"ops": {"tests": found, "benchmarks": benches}, "machine": {**source, **machine}}
    others["tests"] = {**source, "verdicts": found, "red": _red(lines)}
    for name, data in others.items():
        if len(data) > 0 and (name != "ops" or benches) and (name != "machine" or machine):
            write_json(folder / f"{name}.json", data)
    print("\n".join(table(found, lines)))
    return 0


def _red(lines: list[dict[str, Any]]) -> dict[str, str]:
    last = {line["id"]: line for line in lines if line["suite"] in ("tests", "gpu", "loss", "sanitizer")}
    return {item: str(line.get("why"))[:400] for item, line in last.items() if line["state"] in ("failed", "crashed")}


def table(found: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """Verdicts, the heads' times and the step's ratios, as far as they are there."""
    from benchmarks.head import line_of
    from benchmarks.provenance import rows_of
    from benchmarks.step import goals

    out = [f"  {name}: {one['why'] or 'green'}"[:300] for name, one in found.items()]
    out += [f"  {line_of(row)}" for row in rows_of(lines, "head") if "variants" in row]
    steps = rows_of(lines, "step")
    for row in (row for row in steps if "ratio_to_plain" in row):
        out.append(f"  {row['model']} {row['precision']} {row['layout']} over plain {row['ratio_to_plain']}")
    return [*out, f"  goals: {goals(steps)}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; default all but {' and '.join(ASKED)}")
    parser.add_argument("--budget", type=float, default=560, help="seconds for the whole call")
    parser.add_argument("--preset", default="quick", help="sizes of head and ops: quick or full")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="results.jsonl of earlier calls, to go on from")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--bundle", action="store_true")
    parser.add_argument(
        "--triton", help="with --bundle: a python with the GPU machine's torch and Triton, to compile its kernels"
    )
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_intermixed_args()
    if args.bundle:
        return bundle(args.triton)
    if args.collect:
        return collect(args.out, [Path(name) for name in args.phases])
    unknown = sorted(set(args.phases) - PHASES.keys())
    if args.out is None or unknown:
        parser.error(f"unknown phase: {', '.join(unknown)}" if unknown else "OUT must be given")
    if not args.dry_run and (why := stale()):
        print(f"gpu.py: build/gpu is stale: {why}. Run `make gpu-bundle` again", file=sys.stderr)
        return 2
    machine = _machine(args.dry_run)
    if machine is None:
        print("gpu.py: torch sees no GPU here (--dry-run runs the same phases on the CPU)", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, args.budget, args.dry_run, tuple(args.earlier), machine)
    run.summary["preset"] = args.preset
    return perform(run, args.phases or [phase for phase in PHASES if phase not in ASKED])


def _machine(dry: bool) -> str | None:
    """The GPU's name; asked in a process of its own, since a context here would hold memory."""
    if dry:
        return "dry"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() or None


def perform(run: Run, phases: list[str], known: dict[str, Callable[[Run, Limits], dict[str, Any]]] | None = None) -> int:
    """The phases one after the other; one that breaks takes no other's results with it."""
    for phase in phases:
        began = run.clock()
        print(f"{phase} …", flush=True)
        if run.deadline - began < 5:
            found: dict[str, Any] = {"ok": False, "why": "no time left"}
        else:
            try:
                found = (known or globals())[phase](run, PHASES.get(phase, Limits(60, 60)))
            except Exception as error:
                found = {"ok": False, "why": f"{type(error).__name__}: {error}"[:500]}
        run.summary["phases"][phase] = {"seconds": round(run.clock() - began, 1), **found}
        print(f"{phase:<10} {'ok' if found['ok'] else 'RED':<4} {run.clock() - began:>5.0f} s  "
              f"{found.get('why') or found.get('how') or found.get('counts') or ''}", flush=True)  # fmt: skip
        if phase == "setup":
            run.summary["provenance"] = _provenance()
            run.journal.write("run", run.journal.run, "done", row=run.summary["provenance"])
        run.write()
    if known is None:
        print("\n".join(table(verdicts(run), run.journal.lines())), flush=True)
    shutil.rmtree(run.scratch, ignore_errors=True)
    return 0 if all(one["ok"] for one in run.summary["phases"].values()) else 1


def _provenance() -> dict[str, Any] | str:
    """In a process of its own: the library that this one would load may have been built since."""
    code = "import json; from benchmarks.provenance import provenance; print(json.dumps(provenance()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {"unknown": result.stderr[-500:]}


if __name__ == "__main__":
    sys.exit(main())
