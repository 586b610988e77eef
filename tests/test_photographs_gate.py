"""The gate's script on a tiny tree: what it runs and in which order, that a kill loses one network, and what its rules say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("captum")
pytest.importorskip("pytorch_grad_cam")

from benchmarks import photographs_gate as gate
from benchmarks import photographs_training as training
from benchmarks.photographs_gate import SETTINGS, Variant, first_variants, further_variants, main, plan
from benchmarks.photographs_training import claim
from tests.lab.cutout_tree import write_cutouts
from tests.tiny_photographs import shrink


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    shrink(monkeypatch, tests=9)
    return write_cutouts(tmp_path / "tree"), tmp_path / "out"


def test_every_variant_of_the_protocol_is_there_once():
    lite, small = (first_variants(SETTINGS[name]) for name in ("lite0", "small"))
    assert len({v.name for v in lite}) == len(lite)
    assert [v.name for v in lite[:2]] == ["plain", "backgrounds-true"]
    masked = {(v.at, v.evidence) for v in lite if v.term == "share" and v.mask == "true"}
    every = {(at, form) for at in ("last", "block11") for form in ("rectified", "absolute", "squared")}
    assert masked == every - {("last", "squared")}
    assert {(v.term, v.at) for v in lite if v.term == "area" or v.mask == "own"} == {
        (term, at) for term in ("area", "share") for at in ("last", "block11")
    }
    assert {v.weight for v in lite if v.term == "sib"} == set(SETTINGS["lite0"].lambdas)
    assert {v.at for v in small if v.at} == {"last"}
    assert [v.weight for v in further_variants(Variant("share", "last", "absolute", 1.0, "true"))] == [3.0, 10.0]
    assert further_variants(Variant("share", "last", "absolute", 1.0, "own")) == []


def test_the_gates_maps_are_those_of_the_protocol():
    from sib_fast.lab.networks import build_network

    for name, sides in {"lite0": {"last": 4, "block11": 8}, "small": {"last": 16}}.items():
        setting, seen = SETTINGS[name], {}
        model = build_network(setting.arch, 6, **setting.options).eval()
        for at, module in setting.maps.items():
            model.get_submodule(module).register_forward_hook(
                lambda _, __, output, at=at, seen=seen: seen.update({at: output.shape[2:]})
            )
        model(torch.randn(1, 3, setting.image_size, setting.image_size))
        assert {at: tuple(shape) for at, shape in seen.items()} == {at: (side, side) for at, side in sides.items()}


def test_a_run_writes_a_network_at_a_time_and_goes_on_where_it_was(tiny, capsys, monkeypatch):
    root, out = tiny
    arguments = ["run", "--root", str(root), "--out", str(out)]
    assert main([*arguments, "--only", "plain|share-true-absolute", "--seeds", "0"]) == 0
    done = {p.stem for p in out.glob("*.json")}
    assert done == {"small-plain-0", "small-share-true-absolute-last-1-0"}
    assert {p.suffix for p in out.iterdir()} == {".json"}
    record = json.loads((out / "small-share-true-absolute-last-1-0.json").read_text())
    assert set(record["accuracy"]) == {"correlated", "shifted", "grey"}
    assert set(record["energy"]) == {"uniform", "mean_mask", "mean_mask_last", "gradient", "integrated", "cam_last"}
    assert record["steps"] == 2
    assert 0 <= record["terms"]["share"] <= 1
    assert record["worst_class"] == min(record["by_class"].values())
    assert record["energy"]["mean_mask"]["mean"] > record["energy"]["uniform"]["mean"]
    # what is done is not done again
    monkeypatch.setattr(training, "train", lambda *a: pytest.fail("trained again"))
    assert main([*arguments, "--only", "plain|share-true-absolute", "--seeds", "0"]) == 0
    capsys.readouterr()
    assert main(["report", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"| share-true-absolute-last-1 | {record['accuracy']['correlated']:.3f}" in printed


@pytest.mark.parametrize("variant", [v for v in first_variants(SETTINGS["small"]) if v.term != "plain"], ids=lambda v: v.name)
def test_every_variant_trains(tiny, variant):
    root, _ = tiny
    model, _, _, steps, terms = training.train("small", variant, 0, root)
    assert steps == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    expected = {"sib": "background", "backgrounds": "loss"}.get(variant.term, variant.term)
    assert expected in terms


def test_networks_of_one_seed_begin_alike_and_see_the_same_images_in_the_same_order(tiny, monkeypatch):
    root, _ = tiny
    seen = []
    monkeypatch.setattr(
        training, "batches", lambda data, *a, real=training.batches: seen.append(data[0].clone()) or real(data, *a)
    )
    first, *_ = training.train("small", Variant("plain"), 0, root)
    again, *_ = training.train("small", Variant("plain"), 0, root)
    other, *_ = training.train("small", Variant("plain"), 1, root)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_result_is_made_by_one_process_at_a_time_and_a_kill_gives_it_free(tmp_path):
    path = tmp_path / "a.json"
    holder = (
        "import sys, time; from pathlib import Path; from benchmarks.photographs_training import claim\n"
        "with claim(Path(sys.argv[1])) as ours: print(ours, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with claim(path) as ours:
            assert not ours
    finally:
        process.kill()
        process.communicate()
    with claim(path) as ours:
        assert ours
    path.write_text("{}")
    with claim(path) as ours:
        assert not ours


def write_record(out, variant, seed, in_distribution, shifted=0.6, gradient=0.3):
    record = {
        "setting": "small",
        "variant": variant.name,
        "seed": seed,
        "options": dataclasses.asdict(variant),
        "accuracy": {"correlated": in_distribution, "shifted": shifted, "grey": 0.5},
        "energy": {m: {"mean": gradient, "undefined": 0} for m in gate.METHODS},
    }
    out.mkdir(exist_ok=True)
    (out / f"small-{variant.name}-{seed}.json").write_text(json.dumps(record))


def test_higher_weights_run_only_where_the_first_costs_little(tiny):
    _, out = tiny
    costly, cheap = (Variant("share", "last", form, 1.0, "true") for form in ("rectified", "absolute"))
    assert not [v for _, v, _ in plan(out) if v.weight == 10.0]  # nothing is known yet
    for seed in gate.SEEDS:
        write_record(out, Variant("plain"), seed, 0.8)
        write_record(out, costly, seed, 0.65)
        write_record(out, cheap, seed, 0.75)
    assert {v.evidence for _, v, _ in plan(out) if v.weight == 10.0} == {"absolute"}


def test_the_rules_are_about_the_mean_of_both_seeds(tiny):
    _, out = tiny
    masked, free = Variant("share", "last", "absolute", 1.0, "true"), Variant("area", "last", "rectified", 1.0)
    for seed in gate.SEEDS:
        write_record(out, Variant("plain"), seed, 0.8)
        write_record(out, masked, seed, 0.8, shifted=0.6 + 0.1 * seed, gradient=0.37)
    write_record(out, free, 0, 0.8, shifted=0.9)
    lines = gate.verdicts(gate.load(out))
    assert lines[0] == "small: without masks the best shifted gain is +nan (none yet)"
    assert lines[1] == f"small: with true masks the best shifted gain is +0.050 ({masked.name})"
    assert lines[2].endswith(f"+0.070 ({masked.name})")
    write_record(out, free, 1, 0.8, shifted=0.5)
    assert gate.verdicts(gate.load(out))[0] == f"small: without masks the best shifted gain is +0.100 ({free.name})"


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stored():
    return training.load(ROOT / "benchmarks/results/amd-epyc-2-cores/photographs_gate")


def block(page: str) -> str:
    return (ROOT / "docs" / page).read_text().partition("<!-- gate -->\n")[2].partition("<!-- /gate -->")[0]


def test_the_gates_table_is_that_of_the_records(stored):
    assert block("photographs/gate.md") == gate.report(stored)
    seeds: dict[tuple[str, str], set[int]] = {}
    for name, variant, seed in stored:
        seeds.setdefault((name, variant), set()).add(seed)
    assert set(map(frozenset, seeds.values())) == {frozenset(gate.SEEDS)}


def shown_gains(records) -> str:
    """The table of `docs/which.md`."""
    rows = {
        "plain training": "plain",
        "background randomisation, all masks": "backgrounds-true",
        "background share at the last map, all masks": "share-true-rectified-last-1",
        "background share at the last map, own mask": "share-own-rectified-last-1",
        "effective area at the last map": "area-rectified-last-1",
        "S-IB as published, 1e3": "sib-1000",
        "S-IB as published, 1e5": "sib-100000",
        "S-IB as published, 1e7": "sib-1e+07",
    }
    quantities = {
        "shifted accuracy": ("accuracy", "shifted"),
        "in distribution": ("accuracy", "correlated"),
        "input gradient on the object": ("energy", "gradient", "mean"),
    }
    lines = ["| | " + " | ".join(quantities) + " |", "| --- |" + " ---: |" * len(quantities)]
    for label, variant in rows.items():
        value, form = (gate.mean, ".3f") if variant == "plain" else (gate.gain, "+.3f")
        cells = [format(value(records, "lite0", variant, *keys), form).replace("-", "−") for keys in quantities.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for label, name in {"a uniform map": "uniform", "a map of where objects usually are": "mean_mask"}.items():
        lines.append(f"| {label} | | | {gate.mean(records, 'lite0', 'plain', 'energy', name, 'mean'):.3f} |")
    return "\n".join(lines) + "\n"


def test_the_page_on_forms_shows_the_gate(stored):
    assert block("which.md") == shown_gains(stored)
