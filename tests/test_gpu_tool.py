"""`make gpu`: its phases run here on the CPU (--dry-run), and what goes wrong in one does not take the others along."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.provenance import ROOT, commit

SCRIPT = ROOT / "tools/gpu.sh"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "KEPT", tmp_path / "kept")
    return tool.Run(tmp_path / "out", 60, dry=True)


def script(*arguments: object) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})


def test_phases_write_their_results_as_they_come(tmp_path):
    result = script(tmp_path, "--dry-run", "--budget", 300, "build", "smoke", "sanitizer")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["phases"]) == ["build", "smoke", "sanitizer"]
    assert all(one["ok"] for one in summary["phases"].values())
    assert summary["provenance"]["commit"] == commit()
    assert summary["phases"]["smoke"]["checks"]["cpu head"]["ok"]
    assert any("backend cpu" in line for line in summary["phases"]["build"]["doctor"])
    assert "exit status 0" in (tmp_path / "log.txt").read_text()
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) <= 8  # what the lent machine gives back
    assert re.search(r"^smoke +ok", result.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = script(tmp_path, "smoke")
    assert result.returncode == 2
    assert "torch sees no GPU here (--dry-run" in result.stderr


def test_an_unknown_phase_is_a_sentence(tmp_path):
    result = script(tmp_path, "smok")
    assert result.returncode == 2
    assert "unknown phase: smok" in result.stderr


def test_a_command_that_hangs_is_ended_with_its_children(run):
    began = time.monotonic()
    status, text = run.command("bash", "-c", "echo started; sleep 60 & sleep 60", timeout=1)
    assert status == 124
    assert "started" in text
    assert time.monotonic() - began < 20


def test_a_broken_phase_is_red_and_the_next_one_runs(tool, tmp_path, monkeypatch, capsys):
    def breaks(run, seconds):
        raise ValueError("planted")

    monkeypatch.setattr(tool, "smoke", breaks)
    monkeypatch.setattr(tool, "step", lambda run, seconds: {"ok": True})
    monkeypatch.setattr(tool.sys, "argv", ["gpu.py", str(tmp_path), "smoke", "step", "--dry-run"])
    assert tool.main() == 1
    phases = json.loads((tmp_path / "summary.json").read_text())["phases"]
    assert phases["smoke"]["why"] == "ValueError: planted"
    assert phases["step"]["ok"]
    assert re.search(r"^smoke +RED .*planted", capsys.readouterr().out, re.MULTILINE)


def test_results_of_another_commit_are_not_used_again(run, tmp_path):
    (run.out / "tests.json").write_text(json.dumps({"commit": "another", "verdicts": {}}))
    assert run.kept("tests.json") is None
    (run.out / "tests.json").write_text(json.dumps({"commit": commit(), "verdicts": {}}))
    assert run.kept("tests.json") == run.out / "tests.json"


def test_ops_are_not_timed_where_no_backend_is_green(tool, run):
    verdicts = {"cpu": {"green": False, "why": "red: test_x"}}
    (run.out / "tests.json").write_text(json.dumps({"commit": commit(), "verdicts": verdicts}))
    assert tool.ops(run, 10) == {"ok": False, "why": "no backend's tests are green"}


def test_the_table_says_which_backend_is_left_out(tool):
    verdicts = {"cuda": {"green": True}, "triton": {"green": False, "why": "red: test_x"}}
    out = tool.table({"phases": {"tests": {"ok": False, "seconds": 3.0, "backends": verdicts}}})
    assert "cuda: green" in out
    assert "triton: LEFT OUT of the timings: red: test_x" in out


def test_failures_come_from_the_junit_report(tool, run, tmp_path, monkeypatch):
    file = tmp_path / "test_two.py"
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2, 'planted'\n")
    monkeypatch.setattr(run, "dry", False)
    found = tool._pytest(run, str(file), timeout=100)
    assert (found["ok"], found["passed"], found["failed"], found["skipped"]) == (False, 1, 1, 0)
    assert "planted" in next(iter(found["red"].values()))


def test_prepare_writes_commit_and_libraries(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CARRIED", tmp_path / "gpu")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)  # nothing to strip
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libsib_fast_cuda.so").write_text("one")
    (tmp_path / "lib/build_info.json").write_text('{"cuda_architectures": "90a-real"}')
    assert tool.prepare() == 0
    assert (tmp_path / "gpu/commit").read_text().strip() == commit()
    assert {p.name for p in (tmp_path / "gpu/lib").glob("*")} == {"libsib_fast_cuda.so", "build_info.json"}


def test_prepare_rebuilds_libraries_of_several_architectures_for_the_lent_one(tool, tmp_path, monkeypatch):
    """All of them together would be more than may travel."""
    asked = {}

    def build(command, env, **options):
        asked.update(env)
        out = Path(command[command.index("--build-lib") + 1]) / "sib_fast/lib"
        out.mkdir(parents=True)
        (out / "libsib_fast_cuda.so").write_text("small")

    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr(tool.subprocess, "run", build)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/build_info.json").write_text('{"cuda_architectures": "80-real 90a-real"}')
    assert (tool._of_one_architecture() / "libsib_fast_cuda.so").read_text() == "small"
    assert asked["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def test_the_calls_of_the_document_fit_the_lent_machine():
    """At most 2,000 characters, at most 8 carried paths, phases that exist, inside ten minutes."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    commands = re.findall(r"^ +(?:export .*?; )?(.*tools/gpu\.sh \$OUT .*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert len(command) <= 2000
        phases = command.split("$OUT ", 1)[1].split()
        assert "build" in phases, "a fresh machine is bare"
        budget = float(phases[phases.index("--budget") + 1]) if "--budget" in phases else 560
        assert budget <= 585
