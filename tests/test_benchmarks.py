"""A benchmark that compares different work is worse than none: the heads must be the same function; the clock, the floors,
the gate, the report and the comparison must say what they claim; the ledger must name evidence that exists."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest
import torch

import sib_fast
from benchmarks import compare, gate, head, report, stored, timing
from benchmarks.baselines import HEADS, forward_and_backward, heads_for, natural_inputs, our_head, value_and_gradient
from benchmarks.provenance import ROOT, provenance

STORED = ROOT / "benchmarks/results/intel-xeon-2-cores"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in HEADS if name != "naive"])
@pytest.mark.parametrize("shape", [(4, 3, 48), (5, 8, 33)], ids=str)
def test_value_and_gradient_of_heads(name, shape):
    vjp, x = natural_inputs(*shape, dtype=torch.float64)
    want, got = forward_and_backward("naive", vjp, x), forward_and_backward(name, vjp, x)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    # The tuned head's rank windows leave out weights of e^-17.
    assert (got[1] - want[1]).norm() <= 1e-6 * want[1].norm()
    assert want[1].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_of_heads_that_are_timed_every_one_is_that_function(where, dtype):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    vjp, x = natural_inputs(6, 3, 24, dtype, where)
    heads = heads_for(torch.device(where))
    assert {"naive", "tuned", "ours"} < set(heads)
    want = value_and_gradient(heads["naive"], vjp, x)
    for name, one in heads.items():
        got = value_and_gradient(one, vjp, x)
        torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-4, atol=0, msg=name)
        assert got[1].dtype == dtype
        assert torch.nn.functional.cosine_similarity(got[1].flatten().float(), want[1].flatten().float(), dim=0) > 0.99, name


def test_an_asked_for_backend_is_the_one_that_runs(monkeypatch):
    vjp, x = natural_inputs(4, 3, 16, torch.float64)
    asked = []
    for name in ("foreground_mask", "region_statistics"):
        op = getattr(sib_fast, name)
        monkeypatch.setattr(sib_fast, name, lambda *a, op=op, **k: asked.append((op.__name__, k["backend"])) or op(*a, **k))
    our_head(vjp, x, "reference")
    assert asked == [("foreground_mask", "reference"), ("region_statistics", "reference")]
    with pytest.raises(ValueError, match="backend must be one of"):
        our_head(vjp, x, "gpu")
    assert torch.allclose(our_head(vjp, x, "reference"), our_head(vjp, x), rtol=1e-12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_meter_sees_an_allocation():
    """In a process of its own, as the benchmark does it: here the test run's freed memory would be used again, unseen."""
    code = (
        "from benchmarks import head\n"
        "head.HEADS['hungry'] = lambda vjp, x: (vjp.repeat(64, 1, 1, 1) * 2).sum()\n"
        "try:\n"
        "    print(head.peak_extra_bytes_here('hungry', 4, 3, 128))\n"
        "except PermissionError:\n"
        "    print('not permitted')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    if "not permitted" in result.stdout:
        pytest.skip("/proc/self/clear_refs is not writable here")
    size = 64 * 4 * 3 * 128 * 128 * 4
    # Two copies at least; a page or so of the second may have been resident before.
    assert 1.9 * size < int(result.stdout) < 5 * size


# ---- the clock and the floors -------------------------------------------------------------------------------------------


def test_variants_are_interleaved_and_every_round_starts_with_another():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = timing.interleaved(variants, CPU, 3)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: (len(t.device), len(t.eager), t.graph) for name, t in times.items()} == dict.fromkeys("abc", (3, 3, None))


class FakeCuda:
    """What `timing` asks of torch.cuda, with a clock that a recorded event advances by 1 ms, and a log of what was done."""

    def __init__(self, monkeypatch, capturable: bool = True) -> None:
        self.log, self.now, self.capturing = [], 0, False
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("event")
                fake.now += 1
                self.at = fake.now

            def elapsed_time(self, end) -> float:
                return float(end.at - self.at)

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.now += 3

        class Capture:
            def __init__(self, graph) -> None:
                pass

            def __enter__(self) -> None:
                fake.capturing = True
                if not capturable:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")

            def __exit__(self, *_) -> None:
                fake.capturing = False

        class Stream:
            def wait_stream(self, other) -> None:
                pass

        class Flush:
            def zero_(self) -> None:
                fake.log.append("flush")

        cuda = {
            "Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "current_stream": Stream,
            "stream": lambda s: contextlib.nullcontext(), "synchronize": lambda *_: fake.log.append("wait"),
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "flush_buffer", lambda device: Flush())


def test_on_cuda_a_cold_replay_stands_between_two_events(monkeypatch):
    fake = FakeCuda(monkeypatch)
    times = timing.interleaved({"it": lambda: fake.log.append("call")}, torch.device("cuda"), 2)["it"]
    before, rounds = fake.log[:6], fake.log[6:]
    assert before == ["call"] * 5 + ["replay"]  # two warm-ups, two on the side stream, one captured
    assert rounds == ["wait", *["flush", "event", "replay", "event", "wait", "call", "wait"] * 2, "wait"]
    assert times.device == [0.004, 0.004]
    assert len(times.eager) == 2
    assert times.graph is None


def test_what_cannot_be_captured_is_timed_eagerly_and_says_why(monkeypatch):
    fake = FakeCuda(monkeypatch, capturable=False)
    times = timing.interleaved({"it": lambda: fake.log.append("call")}, torch.device("cuda"), 1)["it"]
    assert times.graph == "not captured: operation not permitted when stream is capturing"
    assert "replay" not in fake.log
    assert fake.log[-8:] == ["flush", "event", "call", "event", "wait", "call", "wait", "wait"]


def test_the_clock_tells_a_wait():
    import time

    times = timing.interleaved({"wait": lambda: time.sleep(0.02), "nothing": lambda: None}, CPU, 3)
    assert min(times["wait"].device) >= 0.02
    assert timing.ratios(times["wait"].device, times["nothing"].device)["min"] > 2


def test_summary_and_ratios_in_closed_form():
    found = timing.summary([0.004, 0.001, 0.002, 0.003, 0.100])
    assert found == {"median": 3.0, "spread": 2.0, "min": 1.0, "max": 100.0, "rounds": 5}
    assert timing.summary([0.5])["spread"] == 0
    assert timing.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_floors_are_those_of_the_specification():
    """SPEC 8 at 128×3×224²: 7·4ND + 10·4NP bytes = 796 MB, 14.8 GFLOP; 0.185 ms of bytes, 0.21 ms in tf32x3, 0.33 in IEEE."""
    phases = timing.head_phases(128, 3, 224, 224)
    assert sum(p.bytes for p in phases) == 7 * 4 * 128 * 150528 + 10 * 4 * 128 * 50176
    assert sum(p.flops for p in phases) == 3 * 2 * 128**2 * 150528
    floors = timing.floors_ms(phases, {"copy": 4.3e12, "ieee": 60e12, "tf32": 400e12, "tf32x3": 400e12 / 3})
    assert floors["tf32"] == pytest.approx(0.185, abs=0.001)
    assert floors["tf32x3"] == pytest.approx(0.21, abs=0.005)
    assert floors["ieee"] == pytest.approx(0.335, abs=0.01)
    half = timing.head_phases(128, 3, 224, 224, itemsize=2)
    assert sum(p.bytes for p in half) == 7 * 2 * 128 * 150528 + 10 * 4 * 128 * 50176


def test_ceilings_are_measured():
    found = timing.ceilings(CPU, copy=2**22, matmul=128)
    assert set(found) == {"copy", "ieee"}
    assert all(1e7 < value < 1e14 for value in found.values())


# ---- the gate -----------------------------------------------------------------------------------------------------------


def test_a_red_backend_is_said_and_left_out(tmp_path, capsys):
    red, green, none = (tmp_path / f"test_{name}.py" for name in ("red", "green", "none"))
    red.write_text("def test_gradient_cpu():\n    assert 1 == 2\n")
    green.write_text("def test_gradient_cpu():\n    pass\n")
    none.write_text("def test_of_something_else():\n    pass\n")
    found = {path.stem: gate.verdict("cpu", (str(path),)) for path in (red, green, none)}
    assert not found["test_red"]["green"]
    assert "test_gradient_cpu" in found["test_red"]["why"]
    assert found["test_green"]["green"]
    assert found["test_green"]["passed"] == 1
    assert not found["test_none"]["green"]
    assert gate.require_green(found) == ["test_green"]
    assert "test_red is not timed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no backend's tests are green"):
        gate.require_green({"test_red": found["test_red"]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they would run")
def test_a_backend_whose_tests_are_all_skipped_is_not_green():
    one = gate.verdict("cuda", ("tests/ops/test_foreground_mask.py",))
    assert not one["green"]
    assert one["why"] == "none of its tests ran here"


def test_verdicts_of_another_commit_are_refused(tmp_path):
    path = tmp_path / "tests.json"
    path.write_text(json.dumps({"commit": "somewhere else", "verdicts": {"cpu": {"green": True}}}))
    with pytest.raises(SystemExit, match="of commit somewhere else"):
        gate.verdicts(["cpu"], path)
    path.write_text(json.dumps({"commit": provenance()["commit"], "verdicts": {"cpu": {"green": True}}}))
    assert gate.verdicts(["cpu"], path) == {"cpu": {"green": True}}
    assert not gate.verdicts(["triton"], path)["triton"]["green"]


# ---- a run, its report, its comparison ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """Two small cases through the whole of benchmarks.head, with verdicts from a file."""
    folder = tmp_path_factory.mktemp("head")
    verdicts = {"cpu": {"green": True, "why": None}}
    (folder / "tests.json").write_text(json.dumps({"commit": provenance()["commit"], "verdicts": verdicts}))
    command = [
        sys.executable, "-m", "benchmarks.head", "--out", folder / "head.json", "--preset", "smoke", "--rounds", "3",
        "--threads", "1", "--tests", folder / "tests.json",
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], cwd=ROOT, check=True, capture_output=True)
    return json.loads((folder / "head.json").read_text())


def test_a_row_holds_what_the_issue_asks_for(result):
    assert {"commit", "date", "torch", "gpu", "cpu", "ceilings", "tests"} <= result.keys()
    assert [tuple(row["case"].values()) for row in result["rows"]] == head.PRESETS["smoke"]
    for row in result["rows"]:
        assert {"naive", "tuned", "ours", "ours_cpu"} <= row["variants"].keys()
        assert row["floor_ms"].keys() == {"ieee"}
        for name, one in row["variants"].items():
            wanted = {"device_ms", "eager_ms", "graph", "gb_per_s", "percent_of_copy", "over_floor", "peak_extra_mib"}
            assert wanted <= one.keys(), name
            assert one["device_ms"]["rounds"] == 3
        assert row["ratios"]["naive"]["ours_cpu"]["median"] > 0
    assert result["not_measured"] == []


def test_report_of_a_run(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "head.json"
    path.write_text(json.dumps(result))
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    for words in ("| 4×3×32×float32 | ours_cpu |", "Measured ceilings: copy", result["commit"][:20], "![roofline]"):
        assert words in text
    assert (tmp_path / "out/roofline.png").stat().st_size > 1000


def test_report_of_what_is_stored(tmp_path):
    pytest.importorskip("matplotlib")
    files = [str(STORED / name) for name in ("head.json", "step.json")]
    assert report.main([*files, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    ours = next(f for f in stored.figures(stored.load(STORED / "head.json")) if f.case[0] == 16 and f.variant == "ours")
    assert f"{ours.median:.4g}" in text
    assert "resnet50" in text


@pytest.mark.parametrize(
    ("tests", "refused"),
    [
        ({"cpu": {"green": False, "why": "red: test_x"}}, {"ours", "ours_cpu"}),
        ("skipped", {"naive", "tuned", "ours", "ours_cpu"}),
        ({"cpu": {"green": True, "why": None}}, set()),
    ],
    ids=["red", "skipped", "green"],
)
def test_report_refuses_a_red_backend(result, tests, refused, tmp_path):
    path = tmp_path / "head.json"
    path.write_text(json.dumps({**result, "tests": tests}))
    assert report.main([str(path), "--out", str(tmp_path), "--no-plots"]) == (1 if refused else 0)
    text = (tmp_path / "report.md").read_text()
    for name in ("naive", "tuned", "ours", "ours_cpu"):
        assert (f"| {name} |" not in text) == (name in refused), name
        assert (f"**Refused** {name}:" in text) == (name in refused), name


def test_compare_flags_what_is_slower_beyond_the_spread(result, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    changed = json.loads(json.dumps(result))
    for data in (result, changed):
        for row in data["rows"]:
            for one in row["variants"].values():
                one["device_ms"].update(median=10.0, spread=0.5)
    old.write_text(json.dumps(result))
    new.write_text(json.dumps(changed))
    assert compare.main([str(old), str(new)]) == 0
    times = changed["rows"][0]["variants"]
    times["ours"]["device_ms"]["median"], times["tuned"]["device_ms"]["median"] = 10.9, 8.0  # within, and faster
    new.write_text(json.dumps(changed))
    assert compare.main([str(old), str(new)]) == 0
    assert "faster: head 4×3×32×float32 tuned: 10 -> 8 ms" in capsys.readouterr().out
    times["ours"]["device_ms"]["median"] = 11.1
    new.write_text(json.dumps(changed))
    assert compare.main([str(old), str(new)]) == 1
    assert "slower: head 4×3×32×float32 ours: 10 -> 11.1 ms" in capsys.readouterr().out
    changed["cpu"] = "another"
    new.write_text(json.dumps(changed))
    assert compare.main([str(old), str(new)]) == 2
    assert compare.main([str(old), str(new), "--across-machines"]) == 1
    assert compare.main([str(old), str(STORED / "step.json"), "--across-machines"]) == 2


def test_suites_write_what_compare_reads(tmp_path):
    """One small op through pytest-benchmark."""
    out = tmp_path / "suite.json"
    command = [
        sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--no-gate", "--preset", "smoke", "-q", "-p",
        "no:cacheprovider", "-k", "test_foreground_mask and 4x3x32", f"--benchmark-json={out}",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    found = list(stored.figures(stored.load(out)))
    assert {f.suite for f in found} == {"foreground_mask"}
    assert {f.variant for f in found} == {f"{b}-{m}" for b in ("cpu", "reference") for m in ("forward", "step")}
    assert all(f.rest["percent_of_copy"] > 0 and f.rest["commit"] for f in found)
    assert compare.main([str(out), str(out)]) == 0


# ---- the ledger ---------------------------------------------------------------------------------------------------------


def ledger() -> list[list[str]]:
    lines = (ROOT / "benchmarks/results/README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] != "kernel or claim" and not set(row[0]) <= set("- ")]


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """Every test that a row of the ledger may name, by its full name."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "--every-backend",
        "--long",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
        "tests/ops",
        "tests/distributed",
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "::" in line]


def selects(evidence: str, collected: list[str]) -> bool:
    """`<files> -k <word>` selects a test in each of its files."""
    files, _, word = evidence.partition(" -k ")
    return not word or all(any(test.startswith(file) and word in test for test in collected) for file in files.split())


def exists(evidence: str) -> bool:
    """A command or a file that the tree holds: a path, a module, a make target or a selection of tests."""
    if (match := re.match(r"python -m (\S+)", evidence)) and match.group(1) != "pytest":
        name = match.group(1).replace(".", "/")
        return (ROOT / f"{name}.py").is_file() or (ROOT / name / "__main__.py").is_file()
    if match := re.match(r"make (\S+)", evidence):
        return re.search(rf"^{re.escape(match.group(1))}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
    paths = re.findall(r"[\w./-]+\.(?:py|sh|json|md)|tests/\w+(?:/\w+)*", evidence)
    places = (ROOT, ROOT / "benchmarks/results")
    return bool(paths) and all(any((place / path).exists() for place in places) for path in paths)


@pytest.mark.parametrize("row", ledger(), ids=lambda row: row[0][:50])
def test_every_row_of_the_ledger_names_evidence_that_exists(row, collected):
    claim, device, commit, evidence = row
    named = re.findall(r"`([^`]+)`", evidence)
    assert named, f"{claim}: name a command or a file"
    for one in named:
        assert exists(one), f"{claim}: {one} does not exist"
        assert selects(one, collected), f"{claim}: {one} selects no test"
    assert "unverified" in device or commit, f"{claim}: a device without a commit"


def test_the_ledger_says_that_nothing_has_run_on_a_gpu_until_a_result_of_one_is_stored():
    stored_on_gpu = [path for path in (ROOT / "benchmarks/results").glob("*/*.json") if json.loads(path.read_text()).get("gpu")]
    if not stored_on_gpu:
        for row in ledger():
            if re.search(r"cuda|triton|GPU|H200", row[0], re.IGNORECASE):
                assert "unverified" in row[1], row[0]


def test_evidence_that_does_not_exist_is_noticed(collected):
    assert not selects("tests/gpu/test_ops.py -k no_such_test", collected)
    assert not exists("tests/gpu/test_nothing.py")
    assert not exists("make nothing")
    assert not exists("python -m benchmarks.nothing")
    assert not exists("words alone")
    assert exists("tests/ops -k cuda")
