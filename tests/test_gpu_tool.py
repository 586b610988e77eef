"""`make gpu`: its phases run here on the CPU (--dry-run); whatever hangs, crashes or is cut at any moment costs itself alone."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gate, stored
from benchmarks.journal import DEVICE_LOST, JUDGED, ROOT, Journal, read, sources
from benchmarks.provenance import commit

SCRIPT = ROOT / "tools/gpu.sh"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner(tool):
    return sys.modules["gpu_run"]


@pytest.fixture(scope="module")
def bundle(tool):
    return sys.modules["gpu_bundle"]


@pytest.fixture
def run(tool, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return tool.Run(out, 60, dry=True)


def script(*arguments: object) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


# ---- supervision, on a fake clock -------------------------------------------------------------------------------------------

BEHAVIOURS = ("pass", "fail", "hang", "crash", "lose the device", "skip")
STATE = {
    "pass": "passed",
    "fail": "failed",
    "hang": "timed out",
    "crash": "crashed",
    "lose the device": "failed",
    "skip": "skipped",
}


class Killed(BaseException):
    """The whole run ends here, with everything that it started."""


class FakeWorker:
    """A process that writes the lines of its share of the items as the clock goes, and behaves as each of them says."""

    def __init__(self, world: World, journal: Journal) -> None:
        self.world, self.journal, self.status = world, journal, None
        self.steps = self._steps()
        self.wake = world.now + world.random.uniform(0, 5)  # its start

    def _steps(self):
        for k, (item, behaviour) in enumerate(self.world.items.items()):
            if not self.journal.wants("tests", item, k):
                continue
            keys = [f"cpu softmax {'backward' if k % 2 else 'forward'}"]
            self.world.write(self.journal, item, "began", keys)
            if behaviour == "hang":
                yield 1e9
            yield self.world.random.uniform(0.1, 8)
            if behaviour == "crash":
                self.status = -11
                return
            self.world.write(self.journal, item, STATE[behaviour], keys)
            if behaviour == "lose the device":
                self.status = DEVICE_LOST
                return
        self.status = 1

    def advance(self) -> None:
        while self.status is None and self.wake <= self.world.now:
            self.wake += next(self.steps, 0.0)

    def poll(self) -> int | None:
        return self.status

    def wait(self) -> None:
        pass


class World:
    """A clock, the items, and the moment at which everything is killed."""

    def __init__(self, seed: int) -> None:
        self.random, self.now = random.Random(seed), 0.0
        self.items = {f"test_{k}": self.random.choice(BEHAVIOURS) for k in range(self.random.randint(1, 14))}
        self.kill_at, self.written, self.workers = float("inf"), [], []

    def write(self, journal: Journal, item: str, state: str, keys: list[str]) -> None:
        journal.write("tests", item, state, keys=keys)
        self.written.append((item, state))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.kill_at:
            raise Killed
        for worker in self.workers:
            worker.advance()


def call(tool, world: World, out: Path, number: int, kill_after: float | None, workers: int):
    """One call of the tool: a Run whose processes, clock and death are the world's."""
    world.workers, world.kill_at = [], world.now + (kill_after or 1e12)

    class Fake(tool.Run):
        clock = staticmethod(lambda: world.now)
        sleep = staticmethod(world.sleep)

        def spawn(self, command, worker=0, of=1, **environment):
            journal = Journal(*self.journal.paths, earlier=self.earlier, run=self.journal.run, shard=(worker, of))
            journal.write("tests", "collected", "collected", whole=True, counts=counts_of(world))
            world.workers.append(FakeWorker(world, journal))
            return world.workers[-1]

    out.mkdir(exist_ok=True)
    run = Fake(out, 1e6, dry=True, machine="fake", earlier=tuple(sorted(out.parent.glob("kept*.jsonl"))))
    run.journal.run += f"-{number}"
    try:
        return tool.supervise(run, "tests", ["fake"], tool.Limits(1e6, 20), workers)
    except Killed:
        return None
    finally:
        results = out / "results.jsonl"
        if results.is_file():
            data = results.read_bytes()
            cut = world.random.randint(0, 60) if world.now > world.kill_at else 0  # the last write may be a part of it
            (out.parent / f"kept{number}.jsonl").write_bytes(data[: len(data) - cut])
            results.unlink()


def counts_of(world: World) -> dict[str, int]:
    return {f"cpu softmax {d}": len(list(world.items)[k::2]) for k, d in enumerate(gate.DIRECTIONS) if list(world.items)[k::2]}


@pytest.mark.parametrize("seed", range(40))
def test_whenever_it_is_killed_what_was_done_is_kept_and_the_next_call_goes_on(tool, runner, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(runner, "kill", lambda process: setattr(process, "status", -9))
    world, out, number = World(seed), tmp_path / "out", 0
    workers = world.random.randint(1, 3)
    while True:
        number += 1
        found = call(tool, world, out, number, world.random.uniform(0, 60) if number < 6 else None, workers)
        lines = Journal(earlier=sorted(tmp_path.glob("kept*.jsonl")), run=f"{sources()}.fake.x").lines()
        for name, one in gate.verdicts(lines).items():
            mine = list(world.items)[gate.DIRECTIONS.index(name.split()[2]) :: 2]
            red = {item for item in mine if STATE[world.items[item]] in ("failed", "crashed")}
            assert one["state"] != "green" or not red, "before all of an op's tests have run it is not green"
            assert one["state"] != "red" or red, "what hangs, is cut or lost is not red"
        if found is not None:
            break
    last = {line["id"]: line["state"] for line in lines if line["id"] in world.items}
    assert last == {item: STATE[behaviour] for item, behaviour in world.items.items()}
    for item, behaviour in world.items.items():
        kept = [line["state"] for line in lines if line["id"] == item and line["state"] in JUDGED]
        assert len(kept) == (behaviour != "hang"), "what is judged is not run again"
    wrong = {item for item, behaviour in world.items.items() if behaviour not in ("pass", "skip")}
    assert set(found["wrong"]) == wrong
    assert found["ok"] == (not wrong)


def test_an_item_beyond_its_limit_is_not_judged_and_the_end_of_the_phase_is_no_verdict_either(
    tool, runner, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "kill", lambda process: setattr(process, "status", -9))
    world = World(0)
    world.items = {"test_0": "hang", "test_1": "pass", "test_2": "hang"}
    found = call(tool, world, tmp_path / "out", 1, None, 1)
    assert found["counts"] == {"timed out": 2, "passed": 1}
    assert 40 < world.now < 70
    monkeypatch.setattr(tool, "Limits", lambda phase, item: tool.PHASES["setup"]._replace(phase=10, item=1e6))
    found = call(tool, world, tmp_path / "out", 2, None, 1)
    assert found["why"] == "time is up"
    assert found["counts"] == {"cut": 1, "timed out": 1, "passed": 1}


def test_a_process_that_never_gets_to_an_item_is_not_started_for_ever(run, tool):
    code = (
        "import sys; from benchmarks.journal import Journal; Journal.here().write('s', 'collected', 'collected')\n"
        "print('no such module'); sys.exit(3)"
    )
    found = tool.supervise(run, "s", [sys.executable, "-c", code], tool.Limits(30, 5), 2)
    assert not found["ok"]
    assert found["why"].startswith("exit status 3: no such module")


# ---- supervision, of real processes -----------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from benchmarks.journal import Journal
journal = Journal.here()
for k in range(12):
    if journal.wants("s", f"item {k}", k):
        journal.write("s", f"item {k}", "began")
        time.sleep(60 if k == 5 else 0.02)
        if k == 7:
            os.abort()
        journal.write("s", f"item {k}", "done", row={"k": k})
"""
RUNNER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("gpu_tool", "tools/gpu.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
out, earlier = pathlib.Path(sys.argv[1]), tuple(map(pathlib.Path, sys.argv[3:]))
out.mkdir()
run = tool.Run(out, 60, dry=True, machine="fake", earlier=earlier)
phase = lambda run, limits: tool.supervise(run, "s", [sys.executable, sys.argv[2]], tool.Limits(50, 1.0), 2)
sys.exit(tool.perform(run, ["one"], {"one": phase}))
"""


def test_a_run_that_is_killed_for_real(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    moments, files = random.Random(0), []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for call in range(5):
        out = tmp_path / f"out{call}"
        command = [sys.executable, "-c", RUNNER, str(out), str(child), *map(str, files)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            text, _ = process.communicate(timeout=moments.uniform(0.2, 1.5) if call < 4 else 100)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        time.sleep(0.1)
        if (out / "results.jsonl").is_file():
            files.append(out / "results.jsonl")
    lines = [line for path in files for line in read(path)]
    last = {line["id"]: line["state"] for line in lines}
    assert last == {f"item {k}": {5: "timed out", 7: "crashed"}.get(k, "done") for k in range(12)}
    rows = [line["row"]["k"] for line in lines if "row" in line]
    assert sorted(rows) == [k for k in range(12) if k not in (5, 7)], "each is done once"
    assert json.loads((out / "summary.json").read_text())["phases"]["one"]["counts"] == {"done": 10, "timed out": 1, "crashed": 1}
    assert process.returncode == 1
    assert re.search(r"^one +RED", text, re.MULTILINE)


# ---- the whole, dry -----------------------------------------------------------------------------------------------------------


def test_phases_write_their_results_as_they_come(tmp_path):
    """That a second call goes on: the tests above, and of real tests tests/test_benchmarks.py."""
    out = tmp_path / "one"
    result = script(out, "--dry-run", "--budget", 300, "setup", "parity")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["phases"]) == ["setup", "parity"]
    assert all(one["ok"] for one in summary["phases"].values())
    assert summary["provenance"]["commit"] == commit()
    assert any("backend cpu" in line for line in summary["phases"]["setup"]["doctor"])
    assert {f"cpu {op} {d}" for op in gate.OPS for d in gate.DIRECTIONS} == set(summary["phases"]["parity"]["verdicts"])
    assert {one["failed"] for one in summary["phases"]["parity"]["verdicts"].values()} == {0}
    assert "exit status 0" in (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "summary.json", "log.txt"}
    assert re.search(r"^parity +ok", result.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tool, bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "CARRIED", tmp_path / "none")
    monkeypatch.setattr(tool.sys, "argv", ["gpu.py", str(tmp_path), "parity"])
    assert tool.main() == 2
    assert "torch sees no GPU here (--dry-run" in capsys.readouterr().err


def test_an_unknown_phase_is_a_sentence(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.sys, "argv", ["gpu.py", str(tmp_path), "smok"])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == 2
    assert "unknown phase: smok" in capsys.readouterr().err


def test_a_command_that_hangs_is_ended_with_its_children(run):
    began = time.monotonic()
    status, text = run.command("bash", "-c", "echo started; sleep 60 & sleep 60", timeout=1)
    assert status == 124
    assert "started" in text
    assert time.monotonic() - began < 20


def test_a_broken_phase_is_red_and_the_next_one_runs(tool, run, capsys):
    def breaks(run, limits):
        raise ValueError("planted")

    assert tool.perform(run, ["parity", "step"], {"parity": breaks, "step": lambda run, limits: {"ok": True}}) == 1
    phases = json.loads((run.out / "summary.json").read_text())["phases"]
    assert phases["parity"]["why"] == "ValueError: planted"
    assert phases["step"]["ok"]
    assert re.search(r"^parity +RED .*planted", capsys.readouterr().out, re.MULTILINE)


def test_phases_come_in_the_order_of_their_worth(tool):
    order = list(tool.PHASES)
    assert order[:5] == ["setup", "parity", "ceilings", "headline", "resnet50"]
    assert sum(tool.PHASES[name].item for name in ("parity", "ceilings", "headline", "resnet50")) < 560
    assert order.index("compiled") == len(order) - len(tool.ASKED) - 1, "it may take whatever is left"
    assert all(limits.item <= limits.phase for limits in tool.PHASES.values())


# ---- what travels, and what comes back -----------------------------------------------------------------------------------


@pytest.fixture
def place(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "CARRIED", tmp_path / "gpu")
    monkeypatch.setattr(bundle, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr(bundle.shutil, "which", lambda name: None)  # nothing to strip
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/build_info.json").write_text('{"cuda_architectures": "90a-real"}')
    (tmp_path / "lib/libsib_fast_cuda.so").write_text("one")
    return tmp_path


def test_a_bundle_has_libraries_commit_and_sources(tool, bundle, place, monkeypatch):
    assert bundle.bundle() == 0
    stamp = json.loads((place / "gpu/stamp.json").read_text())
    assert stamp == {"commit": commit(), "sources": sources()}
    assert {p.name for p in (place / "gpu/lib").glob("*")} == {"libsib_fast_cuda.so", "build_info.json"}
    assert bundle.stale() is None
    (place / "gpu/stamp.json").write_text(json.dumps({**stamp, "sources": "another"}))
    assert "made from sources another" in bundle.stale()
    monkeypatch.setattr(tool.sys, "argv", ["gpu.py", str(place / "out")])
    assert tool.main() == 2
    assert not (place / "out").exists()


def test_a_bundle_that_is_too_large_to_travel_is_refused(bundle, place, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "LARGEST", 1000)
    assert bundle.bundle() == 1
    assert "what may travel" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["several architectures", "older than the sources"])
def test_a_bundle_is_built_anew_where_what_is_here_does_not_fit(bundle, place, monkeypatch, why):
    asked = {}

    def build(command, env=None, **options):
        asked.update(env)
        out = Path(command[command.index("--build-lib") + 1]) / "sib_fast/lib"
        out.mkdir(parents=True)
        (out / "libsib_fast_cuda.so").write_text("small")

    monkeypatch.setattr(bundle, "ROOT", place)
    monkeypatch.setattr(bundle.subprocess, "run", build)
    if why == "several architectures":
        (place / "lib/build_info.json").write_text('{"cuda_architectures": "80-real 90a-real"}')
    else:
        (place / "csrc").mkdir()
        (place / "csrc/new.cu").write_text("changed")
        os.utime(place / "lib/libsib_fast_cuda.so", (1, 1))
    assert (bundle._of_one_architecture() / "libsib_fast_cuda.so").read_text() == "small"
    assert asked["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def test_the_digest_is_that_of_the_sources_alone(tmp_path, monkeypatch):
    from benchmarks import journal

    monkeypatch.setattr(journal, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.cu").write_text("one")
    digests = []
    for change in (
        lambda: None, lambda: (tmp_path / "csrc/lib.so").write_text("built"), lambda: (tmp_path / "README.md").write_text("a"),
        lambda: (tmp_path / "csrc/a.cu").write_text("two"), lambda: (tmp_path / "csrc/a.cu").rename(tmp_path / "csrc/b.cu"),
    ):  # fmt: skip
        change()
        digests.append(journal.sources.__wrapped__())
    assert len(set(digests[:3])) == 1
    assert len(set(digests[2:])) == 3


def test_lines_become_the_files_that_are_stored(tool, tmp_path, capsys):
    journal = Journal(tmp_path / "results.jsonl", run=f"{sources()}.H200.1")
    keys = ["cuda softmax forward", "cuda softmax backward"]
    journal.write("run", "1", "done", row={"commit": "abc", "gpu": {"name": "H200"}})
    journal.write("tests", "collected", "collected", counts={keys[0]: 1, keys[1]: 2}, whole=True)
    journal.write("tests", "test_a", "passed", keys=keys)
    journal.write("tests", "test_b", "failed", keys=keys[1:], why="planted")
    variants = {
        name: {"device_ms": {"median": 1.0, "spread": 0.1}, "needs": needs}
        for name, needs in (("naive", []), ("ours_forward", keys[:1]), ("ours_backward", keys))
    }
    case = {"images": 2, "channels": 3, "size": 4, "dtype": "float32"}
    journal.write("machine", "ceilings", "done", row={"copy": 1e12})
    journal.write("head", "2×3×4", "done", row={"suite": "head", "case": case, "variants": variants, "floor_ms": {}})
    journal.write("head", "9×3×4", "crashed", why="exit status -11")
    second = Journal(tmp_path / "second.jsonl", run=f"{sources()}.H200.2")
    cell = {"model": "resnet50", "precision": "bf16", "layout": "channels_last", "shape": [2, 3, 4, 4]}
    row = {**cell, "median_s": {"plain": 1.0}, "ratio_to_plain": {"plain": 1.0}, "needs": {"plain": []}}
    second.write("step", "cell", "done", row=row)
    second.write("step", "cell, memory", "done", row={"peak_to_plain": {"plain": 1.0}}, part_of="cell")
    second.write("step", "cell, profile", "failed", why="no memory", part_of="cell")
    other = Journal(tmp_path / "other.jsonl", run="othertree.H200.3")
    other.write("head", "other", "done", row={})
    files = [tmp_path / f"{name}.jsonl" for name in ("other", "results", "second")]
    assert tool.collect(tmp_path / "stored", files) == 0
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "stored").iterdir()}
    assert set(found) == {"head.json", "step.json", "tests.json", "machine.json"}
    assert found["tests.json"]["red"] == {"test_b": "planted"}
    refused = {
        f.variant: stored.refusal(found["head.json"], f.variant, f.rest.get("needs")) for f in stored.figures(found["head.json"])
    }
    assert refused == {"naive": None, "ours_forward": None, "ours_backward": "cuda softmax backward: red: test_b"}
    assert found["head.json"]["rows"][1]["failed"] == "exit status -11"
    (step,) = found["step.json"]["rows"]
    assert step["peak_to_plain"] == {"plain": 1.0}
    assert step["cell, profile failed"] == "no memory"
    assert found["step.json"]["gpu"] == {"name": "H200"}
    assert found["head.json"]["ceilings"] == {"copy": 1e12}
    assert tool.collect(tmp_path / "none", files[:1]) == 1
    assert "of this tree's sources" in capsys.readouterr().err


def test_the_calls_of_the_document_fit(tool):
    """Phases that exist, inside ten minutes."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    commands = re.findall(r"^ +(bash tools/gpu\.sh OUT.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = re.split(" {3}", command.split("OUT", 1)[1].removeprefix(" "))[0].split()
        assert "--budget" not in words or float(words[words.index("--budget") + 1]) <= 585
        assert set(words[: words.index("--budget") if "--budget" in words else None]) <= {*tool.PHASES, "--preset", "full"}
    for phase in tool.PHASES:
        assert f"`{phase}`" in text


# ---- Triton kernels that come along -----------------------------------------------------------------------------------------

COMPILE = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tools"]
os.environ.update(TRITON_CACHE_DIR={folder!r}, TRITON_STORE_BINARY_ONLY="1")
import triton_cache
triton_cache.pretend(90)
import torch
task = ("parity", "hsic_objective", (6, 3, 8, 8), torch.float32, {{}})
print(triton_cache.compile_one(task))
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="then nothing is compiled")
def test_a_triton_cache_that_was_moved_is_found_again(tool, tmp_path):
    """The kernels are those of the launches themselves; a second process, in another folder, compiles none of them."""
    pytest.importorskip("triton")
    triton_cache = tool.triton_cache

    def compile_in(folder: Path) -> tuple[str, dict[str, int]]:
        code = COMPILE.format(root=str(ROOT), folder=str(folder))
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        return result.stdout.strip() + result.stderr, {
            str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("*/*")
        }

    said, made = compile_in(tmp_path / "made")
    assert said == "None"
    assert sum(name.endswith(".cubin") for name in made) == 3
    (tmp_path / "made").rename(tmp_path / "moved")
    assert triton_cache.localise(tmp_path / "moved") == 3
    for path in (tmp_path / "moved").glob("*/*"):
        if not path.name.endswith(triton_cache.KEPT):
            path.unlink()
    assert {path.suffix for path in (tmp_path / "moved").glob("*/*")} == {".json", ".cubin"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "moved").glob("*/*")}
    assert compile_in(tmp_path / "moved")[0] == "None"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "moved").glob("*/*")} == before
