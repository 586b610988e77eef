"""The measurement behind the convolution's rules: it runs, and a stored one holds the rules to what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import convolution_choice
from sib_fast.ops.convolution import choice

STORED = sorted((Path(__file__).parent.parent / "benchmarks/results").glob("*/convolution_choice.json"))


def row(**changes) -> dict:
    base = {
        "derivative": "second", "layer": "depthwise", "layout": "channels_last", "precision": "bf16", "device": "cuda",
        "x": [2, 96, 56, 56], "shape": [96, 96, 96, 56, 7, 1, 3], "ways": {"pytorch": {"ms": 9.0}, "routed": {"ms": 1.0}},
    }  # fmt: skip
    return {**base, **changes}


@pytest.mark.skipif(not STORED, reason="no device's measurement is stored yet")
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_rules_follow_the_stored_measurements(path):
    assert convolution_choice.losing(json.loads(path.read_text())["rows"]) == []


def test_a_rule_that_loses_is_named():
    """Whatever way a rule takes, rows that measured it slower are red; PyTorch's failing is no reason against ours."""
    assert convolution_choice.losing([row()]) == []
    assert convolution_choice.losing([row(ways={"pytorch": {"failed": "out of memory"}, "routed": {"ms": 1.0}})]) == []
    slow = row(ways={"pytorch": {"ms": 1.0}, "routed": {"ms": 1.5}})
    assert convolution_choice.losing([slow]) == [
        "second depthwise channels_last bf16: routed takes 1.50 times the fastest way's time"
    ]
    assert convolution_choice.lost(row(ways={"pytorch": {"ms": 1.0}, "routed": {"failed": "no kernel"}})) == float("inf")


def test_rules_of_a_device_follow_its_row(monkeypatch):
    """The CPU's phases and channels last are not CUDA's, and a changed rule changes what the same row says."""
    stem = {"derivative": "input", "shape": [64, 3, 1, 224, 7, 2, 3], "x": [8, 3, 224, 224], "precision": "float32"}
    weight = {"derivative": "weight", "shape": [96, 96, 96, 56, 7, 1, 3], "precision": "float32"}
    assert [convolution_choice.chosen(row(**stem, device=device)) for device in ("cpu", "cuda")] == ["phases", "library"]
    assert [convolution_choice.chosen(row(**weight, device=d)) for d in ("cpu", "cuda")] == ["channels_last", "library"]
    own = choice.RULES["cuda"]._replace(second=lambda x, weight, groups: x.dtype != torch.bfloat16)
    monkeypatch.setitem(choice.RULES, "cuda", own)
    assert convolution_choice.chosen(row()) == "pytorch"
    assert convolution_choice.chosen(row(precision="tf32")) == "routed"


def test_a_measurement_has_every_way_and_what_the_rule_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convolution_choice, "SECOND", {"grouped": (1, 4, 4, 2, 6, 3, 1, 1)})
    monkeypatch.setattr(convolution_choice, "INPUT", {"stem": (1, 3, 4, 1, 16, 7, 2, 3)})
    monkeypatch.setattr(
        convolution_choice, "WEIGHT", {"depthwise": (1, 4, 4, 4, 14, 5, 1, 2), "late": (1, 384, 384, 1, 3, 3, 1, 1)}
    )
    out = tmp_path / "choice.json"
    convolution_choice.main(
        ["--out", str(out), "--rounds", "1", "--threads", "1", "--skip-tests", "--precisions", "float32", "bf16"]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(r["derivative"], r["layout"], r["precision"]) for r in rows] == [
        (derivative, layout, precision)
        for precision in ("float32", "bf16")
        for derivative in ("second", "input", "weight", "weight")
        for layout in ("contiguous_format", "channels_last")
    ]
    for r in rows:
        ours = {"grouped": "routed", "stem": "phases", "depthwise": "channels_last", "late": "map"}[r["layer"]]
        assert set(r["ways"]) == {convolution_choice.DEFAULT_WAYS[r["derivative"]], ours}
        assert all(way["ms"] > 0 for way in r["ways"].values())
        assert r["chosen"] == ours  # the CPU's rules take all four here
        times = {name: way["ms"] for name, way in r["ways"].items()}
        assert r["lost"] == pytest.approx(times[r["chosen"]] / min(times.values()), abs=1e-3)
    assert "fastest way's time" in capsys.readouterr().out
