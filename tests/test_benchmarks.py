"""A benchmark that compares different work is worse than none: the heads must be the same function; the clock, the floors,
the gate, the report and the comparison must say what they claim; the ledger must name evidence that exists."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import sib_fast
from benchmarks import compare, gate, head, report, stored, timing
from benchmarks.baselines import HEADS, forward_and_backward, heads_for, natural_inputs, our_head, value_and_gradient
from benchmarks.journal import ROOT, Journal, attempts, read

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
@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("cpu", "tuned"),
        ("cpu", "ours"),
        ("cpu", "ours_cpu"),
        *(("cuda", n) for n in ("tuned", "ours", "ours_cuda", "ours_triton")),
    ],
)
def test_of_heads_that_are_timed_every_one_is_that_function(where, name, dtype):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    vjp, x = natural_inputs(6, 3, 24, dtype, where)
    heads = heads_for(torch.device(where))
    if name not in heads:
        pytest.skip("no such kernels here")
    want, got = (value_and_gradient(heads[one], vjp, x) for one in ("naive", name))
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-4, atol=0)
    assert got[1].dtype == dtype
    assert torch.nn.functional.cosine_similarity(got[1].flatten().float(), want[1].flatten().float(), dim=0) > 0.99


def test_a_head_that_computes_something_else_is_not_timed():
    heads = {
        "naive": HEADS["naive"],
        "ours": lambda vjp, x: -HEADS["naive"](vjp, x),
        "ours_cpu": lambda vjp, x: vjp.sum() * float("nan"),
    }
    row = head.measure(head.Case(4, 3, 16), CPU, heads, 1, {"copy": 1e9, "ieee": 1e9})
    assert "device_ms" in row["variants"]["naive"]
    assert row["variants"]["ours"]["error"] == "RuntimeError: its gradient is not naive's: cosine -1.0"
    assert "cosine nan" in row["variants"]["ours_cpu"]["error"]


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


def lines(states: dict[str, str], *, of: int | None = None, whole: bool = True) -> list[dict]:
    """The lines of a run in which test k, evidence for "cpu softmax forward" and backward where its name says so, ended thus."""
    journal = Journal()
    keys = {name: [f"cpu softmax {d}" for d in gate.DIRECTIONS if d in name] for name in states}
    total = of or max(sum(d in name for name in states) for d in gate.DIRECTIONS)
    counts = {f"cpu softmax {d}": total for d in gate.DIRECTIONS}
    journal.write("tests", "collected", "collected", counts=counts, whole=whole)
    for name, state in states.items():
        journal.write("tests", name, "began", keys=keys[name])
        if state != "began":
            journal.write("tests", name, state, keys=keys[name])
    return journal.lines()


@pytest.mark.parametrize(
    ("states", "options", "forward", "backward"),
    [
        ({"forward": "passed", "backward": "passed"}, {}, "green", "green"),
        ({"forward": "passed", "backward": "failed"}, {}, "green", "red"),
        ({"forward": "passed", "backward": "crashed"}, {}, "green", "red"),
        ({"forward": "passed", "backward": "timed out"}, {}, "green", "not judged"),
        ({"forward": "passed", "backward": "cut"}, {}, "green", "not judged"),
        ({"forward": "passed", "backward": "began"}, {}, "green", "not judged"),
        ({"forward": "passed", "backward": "skipped"}, {}, "green", "not judged"),
        ({"forward and backward": "failed"}, {}, "red", "red"),
        ({"forward": "passed", "backward": "passed"}, {"of": 2}, "not judged", "not judged"),
        ({"forward": "passed", "backward": "passed"}, {"whole": False}, "not judged", "not judged"),
    ],
)
def test_verdicts_by_direction(states, options, forward, backward):
    found = gate.verdicts(lines(states, **options))
    assert [found[f"cpu softmax {d}"]["state"] for d in gate.DIRECTIONS] == [forward, backward]
    for one in found.values():
        assert one["green"] == (one["why"] is None) == (one["state"] == "green")
    wanted = gate.needs([("cpu", "softmax")])
    assert gate.red(found, wanted) == [
        f"cpu softmax {d}" for d, s in zip(gate.DIRECTIONS, (forward, backward), strict=True) if s == "red"
    ]


def test_a_later_pass_of_a_test_replaces_what_was_lost():
    first, second = lines({"forward": "timed out", "backward": "began"}), lines({"forward": "passed", "backward": "passed"})
    assert gate.verdicts([*first, *second])["cpu softmax forward"]["green"]


@pytest.mark.parametrize(
    ("path", "name", "parameters", "keys"),
    [
        ("ops/test_softmax.py", "test_layouts", {"kernel": "cuda"}, ["cuda softmax forward", "cuda softmax backward"]),
        ("ops/test_softmax.py", "test_layouts", {"kernel": "emulated"}, []),
        ("ops/test_batch_norm_handover.py", "test_x", {"kernel": "cpu"}, ["cpu batch_norm forward", "cpu batch_norm backward"]),
        ("ops/test_foreground_mask.py", "test_gradcheck", {"kernel": "triton"}, ["triton foreground_mask backward"]),
        ("ops/test_softmax.py", "test_value_and_gradient", {"kernel": "cpu"}, ["cpu softmax forward", "cpu softmax backward"]),
        ("ops/test_properties.py", "test_softmax", {"kernel": "cpu"}, ["cpu softmax forward", "cpu softmax backward"]),
        ("ops/test_parity.py", "test_parity", {"kernel": "cpu", "op": "head", "direction": "forward"}, ["cpu head forward"]),
        ("ops/test_parity.py", "test_parity", {"kernel": "triton", "op": "softmax", "direction": "forward"}, []),
        ("test_benchmarks.py", "test_of_heads_are", {"name": "ours_cuda"}, ["cuda head forward", "cuda head backward"]),
        ("test_benchmarks.py", "test_of_heads_are", {"name": "tuned"}, []),
        ("ops/test_convolution.py", "test_gradgradcheck", {}, []),
    ],
)
def test_what_a_test_is_evidence_for(path, name, parameters, keys):
    assert gate.keys_of(path, name, parameters) == keys


def test_only_tests_of_gradients_leave_the_forward_pass_its_verdict(collected):
    names = {test.split("::")[1].split("[")[0] for test in collected if test.startswith("tests/ops")}
    alone = {n for n in names if gate.keys_of("test_softmax.py", n, {"kernel": "cpu"}) == ["cpu softmax backward"]}
    assert len(alone) > 10
    for name in alone:
        assert re.search("grad|derivative|backward|cotangent", name)
        assert not re.search("value|agree|equal|bits|closed", name), name


def test_needs_of_a_figure():
    assert gate.needs_of_head("cpu", CPU) == gate.needs([("cpu", op) for op in (*gate.HEAD, "head")])
    assert set(gate.needs_of_head("auto", CPU)) == {f"cpu {op} {d}" for op in gate.HEAD for d in gate.DIRECTIONS}
    cuda = set(gate.needs([("cuda", op) for op in gate.HEAD]) + gate.needs([("triton", op) for op in gate.HEAD]))
    assert set(gate.needs_of_head("auto", "cuda")) <= cuda
    assert head.needs_of("naive", CPU) == []
    assert head.needs_of("ours_triton_tf32x3", CPU) == gate.needs([("triton", op) for op in (*gate.HEAD, "head")])


def test_a_loss_whose_automatic_choice_is_red_is_timed_on_a_family_that_is_not(monkeypatch):
    monkeypatch.setattr(gate._backends, "MISSING", dict.fromkeys(gate._backends.MISSING))
    auto = set(gate.needs_of_head("auto", "cuda"))

    def chosen(*red: str) -> str | None:
        return gate.loss_backend({name: {"state": "red"} for name in red}, "cuda")

    assert chosen() == "auto"
    assert chosen("cuda batch_norm forward") == "auto"
    statistics = next(name for name in auto if "statistics" in name).split()[0]
    other = {"cuda": "triton", "triton": "cuda"}[statistics]
    assert chosen(f"{statistics} region_statistics backward") == other
    assert chosen(f"{statistics} region_statistics backward", f"{other} head forward") is None


@pytest.fixture
def op_tests(tmp_path) -> tuple[str, ...]:
    """Tests of two ops: one passes, the other's backward fails, and a third op's are skipped."""
    body = "import pytest\n\n@pytest.mark.parametrize('kernel', ['cpu', 'cuda'])\ndef test_{}(kernel):\n    {}\n\n"
    texts = {
        "softmax": body.format("layouts", "assert kernel == 'cpu'"),
        "batch_norm": body.format("layouts", "pytest.skip('x')"),
    }
    texts["layer_norm"] = body.format("values", "pass") + body.format("gradcheck", "assert 1 == 2, 'planted'")
    for op, text in texts.items():
        (tmp_path / f"test_{op}.py").write_text(text)
    return tuple(str(tmp_path / f"test_{op}.py") for op in texts)


def test_tests_are_streamed_and_judged(op_tests, tmp_path):
    journal = Journal(tmp_path / "tests.jsonl")
    found = gate.run(["cpu"], journal, op_tests)
    state = {name.removeprefix("cpu "): one["state"] for name, one in found.items()}
    assert state == {
        "softmax forward": "green", "softmax backward": "green", "layer_norm forward": "green", "layer_norm backward": "red",
        "batch_norm forward": "not judged", "batch_norm backward": "not judged",
    }  # fmt: skip
    (failed,) = (line for line in journal.lines() if line["state"] == "failed")
    assert "test_gradcheck[cpu]" in failed["id"]
    assert "planted" in failed["why"]
    ran = len(journal.lines())
    gate.run(["cpu"], journal, op_tests)
    assert [line["state"] for line in journal.lines()[ran:]] == ["collected"], "what is judged is not run again"


def test_lines_of_another_tree_are_not_read(tmp_path):
    path = tmp_path / "tests.jsonl"
    Journal(path, run="another.here").write("tests", "x", "passed", keys=["cpu softmax forward"])
    assert len(read(path)) == 1
    assert Journal(path).lines() == []
    assert Journal(earlier=[path], run="another.later").lines() != []


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path).write("s", "one", "done")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole + whole[:cut])
        Journal(path).write("s", "two", "done")
        assert [line["id"] for line in Journal(path).lines()][-1] == "two"
        assert {line["id"] for line in Journal(path).lines()} == {"one", "two"}


def test_what_died_together_is_tried_one_by_one():
    def names(state: str) -> list[tuple]:
        journal, seen = Journal(), []
        for item, variants in attempts(journal, "s", "cell", ("plain", "a", "b"), ("plain",)):
            seen.append(variants)
            journal.write("s", item, state if item == "cell" else "done")
        return seen

    assert names("done") == [("plain", "a", "b")]
    for state in ("failed", "crashed", "timed out"):
        assert names(state) == [("plain", "a", "b"), ("plain",), ("plain", "a"), ("plain", "b")]


# ---- a run, its report, its comparison ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """Two small cases through the whole of benchmarks.head, with verdicts from a journal."""
    folder = tmp_path_factory.mktemp("head")
    keys = gate.needs_of_head("cpu", CPU)
    journal = Journal(folder / "lines.jsonl")
    journal.write("tests", "collected", "collected", counts=dict.fromkeys(keys, 1), whole=True)
    journal.write("tests", "test_all", "passed", keys=keys)
    command = [
        sys.executable, "-m", "benchmarks.head", "--out", folder / "head.json", "--preset", "smoke", "--rounds", "3",
        "--threads", "1", "--journal", folder / "lines.jsonl",
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], cwd=ROOT, check=True, capture_output=True)
    return json.loads((folder / "head.json").read_text())


def test_a_row_holds_what_its_docs_promise(result):
    assert {"commit", "date", "torch", "gpu", "cpu", "ceilings", "tests"} <= result.keys()
    assert [tuple(row["case"].values()) for row in result["rows"]] == head.PRESETS["smoke"]
    for row in result["rows"]:
        assert {"naive", "tuned", "ours", "ours_cpu"} <= row["variants"].keys()
        assert row["floor_ms"].keys() == {"ieee"}
        for name, one in row["variants"].items():
            wanted = {"device_ms", "eager_ms", "graph", "gb_per_s", "percent_of_copy", "over_floor", "peak_extra_mib", "needs"}
            assert wanted <= one.keys(), name
            assert one["device_ms"]["rounds"] == 3
        assert row["ratios"]["naive"]["ours_cpu"]["median"] > 0
        assert row["variants"]["naive"]["needs"] == []
        assert {one["cosine_to_naive"] > head.AGREE for one in row["variants"].values()} == {True}


def test_report_of_a_run(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "head.json"
    path.write_text(json.dumps(result))
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    for words in ("| 4×3×32×float32 | ours_cpu |", "Measured ceilings: copy", result["commit"][:20], "![roofline]"):
        assert words in text
    assert (tmp_path / "out/roofline.png").stat().st_size > 1000


def test_an_interrupted_write_leaves_the_files_that_were_there(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import step_traffic

    def interrupted(*_):
        raise KeyboardInterrupt

    page = tmp_path / "page.md"
    page.write_text(f"before\n{step_traffic.MARKS[0]}\nold\n{step_traffic.MARKS[1]}\nafter\n")
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "roofline.png").write_text("old")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(step_traffic, "DOCS", {page: next(iter(step_traffic.DOCS.values()))})
    monkeypatch.setattr(os, "replace", interrupted)
    for write in (
        step_traffic.write_docs,
        lambda: report.main([str(STORED / "head.json"), "--out", str(tmp_path), "--no-plots"]),
        lambda: report.main([str(STORED / "head.json"), "--out", str(tmp_path)]),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    monkeypatch.undo()
    monkeypatch.setattr(step_traffic, "DOCS", {page: next(iter(step_traffic.DOCS.values()))})
    step_traffic.write_docs()
    assert page.read_text().startswith(f"before\n{step_traffic.MARKS[0]}\n|")


def test_report_of_what_is_stored(tmp_path):
    pytest.importorskip("matplotlib")
    files = [str(STORED / name) for name in ("head.json", "step.json")]
    assert report.main([*files, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    ours = next(f for f in stored.figures(stored.load(STORED / "head.json")) if f.case[0] == 16 and f.variant == "ours")
    assert f"{ours.median:.4g}" in text
    assert "resnet50" in text


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"cpu region_statistics backward": {"green": False, "why": "red: test_x"}}, {"ours", "ours_cpu"}),
        ({"cpu head forward": {"green": False, "why": "3 of 4 tests ran"}}, {"ours_cpu"}),
        ({"cpu batch_norm forward": {"green": False, "why": "red: test_x"}}, set()),
        ("skipped", {"naive", "tuned", "ours", "ours_cpu"}),
        ({"cpu": {"green": False, "why": "red"}}, {"ours", "ours_cpu"}),
        ({}, set()),
    ],
    ids=["red", "not judged", "another op's", "skipped", "of a family, in an old file", "green"],
)
def test_report_refuses_what_is_not_green(result, change, refused, tmp_path):
    path, changed = tmp_path / "head.json", json.loads(json.dumps(result))
    changed["tests"] = change if isinstance(change, str) else {**changed["tests"], **change}
    if "cpu" in change:
        changed["tests"] = change
        for row in changed["rows"]:
            for one in row["variants"].values():
                del one["needs"]
    path.write_text(json.dumps(changed))
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
    lines = (ROOT / "benchmarks/results/README.md").read_text().partition("<!-- /ops -->")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] != "kernel or claim" and not set(row[0]) <= set("- ")]


def test_the_ledger_begins_with_every_op_on_every_device():
    top = (ROOT / "benchmarks/results/README.md").read_text().partition("<!-- /ops -->")[0].partition("<!-- ops -->")[2]
    rows = {row.split("`")[1]: [cell.strip() for cell in row.strip("|").split("|")][1:] for row in top.splitlines() if "`" in row}
    assert rows.keys() == {path.parent.name for path in (ROOT / "sib_fast/ops").glob("*/README.md")}
    stored_on_gpu = [path for path in (ROOT / "benchmarks/results").glob("*/*.json") if json.loads(path.read_text()).get("gpu")]
    for op, (_, emulated, interpreted, cuda, triton) in rows.items():
        kernels = getattr(importlib.import_module(f"sib_fast.ops.{op}"), "KERNELS", ())
        assert (emulated != "none") == ("cuda" in kernels), op
        assert (interpreted != "none", triton != "none") == ("triton" in kernels,) * 2, op
        assert stored_on_gpu or "unverified" in cuda, op
        assert stored_on_gpu or triton == "none" or "unverified" in triton, op


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
        "tests/triton",
        "tests/distributed",
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "::" in line]


def selects(evidence: str, collected: list[str]) -> bool:
    """`<files> -k <word>`, or -k "<word> or <word>", selects a test in each of its files, by each of its words."""
    files, _, words = evidence.partition(" -k ")
    pairs = [(file, word) for file in files.split() for word in words.strip('"').split(" or ") if word]
    return all(any(test.startswith(file) and word in test for test in collected) for file, word in pairs)


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
