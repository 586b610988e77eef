"""The study's script on a tiny tree: what is compared, that every way trains, the competitors' losses, and its tables."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("captum")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("scipy")

import sib_fast
from benchmarks import photographs_gate as gate
from benchmarks import photographs_study as study
from benchmarks import photographs_training as training
from benchmarks.photographs_study import over_objects, paired, ways
from benchmarks.photographs_training import SETTINGS, Guidance, RightReasons, Variant, criterion
from sib_fast import SIBLoss
from sib_fast.masks import GivenMask
from tests.lab.cutout_tree import write_cutouts
from tests.tiny_photographs import shrink

TERMS = {"rrr": "penalty", "guidance": "penalty", "unmasked": "background", "backgrounds": "loss", "plain": "loss"}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    shrink(monkeypatch, tests=12)
    for name, value in {"NAME": "small", "TESTS": 12, "EXPLAINED": 6, "SEEDS": (10, 11)}.items():
        monkeypatch.setattr(study, name, value)
    return write_cutouts(tmp_path / "tree"), tmp_path / "out"


def gate_records(shifted: dict[str, float], in_distribution: dict[str, float] = {}) -> dict:  # noqa: B006
    """Of every variant of the tiny gate, 0.6 shifted where nothing else is said."""
    variants = gate.first_variants(gate.SETTINGS["small"])
    variants += [v for first in variants for v in gate.further_variants(first)]
    return {
        ("small", v.name, seed): {
            "setting": "small",
            "options": dataclasses.asdict(v),
            "accuracy": {"correlated": in_distribution.get(v.name, 0.8), "shifted": shifted.get(v.name, 0.6)},
        }
        for v in variants
        for seed in gate.SEEDS
    }


def selected(shifted: dict[str, float]) -> dict:
    return {
        ("small", v.name, seed): {"accuracy": {"correlated": 0.8, "shifted": shifted.get(v.name, 0.6)}}
        for term in study.WEIGHTS
        for v in study.candidates(term)
        for seed in gate.SEEDS
    }


def test_what_is_compared_is_what_gate_and_selection_chose(tiny):
    masked, own = "share-true-absolute-last-3", "share-own-rectified-last-1"
    found = gate_records({masked: 0.7, "share-true-rectified-last-10": 0.75, own: 0.63}, {"share-true-rectified-last-10": 0.76})
    compared = ways(found, selected({"rrr-true-0.05": 0.61, "guidance-true-last-10": 0.62, "unmasked-1e+07": 0.64}))
    assert {way: variant.name for way, variant in compared.items()} == {
        "plain": "plain",
        "free": own,
        "sib": "sib-100000",
        "unmasked": "unmasked-1e+07",
        "share-100": masked,  # the other one costs more than 0.03 in distribution
        "share-10": f"{masked}-of0.1",
        "backgrounds-100": "backgrounds-true",
        "backgrounds-10": "backgrounds-true-of0.1",
        "both-100": f"{masked}-backgrounds",
        "both-10": f"{masked}-of0.1-backgrounds",
        "guidance-100": "guidance-true-last-10",
        "guidance-10": "guidance-true-last-10-of0.1",
        "rrr-100": "rrr-true-0.05",
        "rrr-10": "rrr-true-0.05-of0.1",
    }


def test_where_nothing_without_masks_gained_the_study_is_about_masks(tiny):
    compared = ways(gate_records({"share-own-rectified-last-1": 0.61}), selected({}))
    assert {"free", "sib", "unmasked"}.isdisjoint(compared)
    assert study.searched(gate_records({})) == ["rrr", "guidance"]


def test_selection_comes_first_and_what_has_not_run_is_named(tiny):
    _, out = tiny
    with pytest.raises(ValueError, match="every form must have run on the seeds"):
        ways(gate_records({}), {})
    planned = study.plan(gate_records({}), out)
    first = [next(planned) for _ in range(12)]
    assert {v.term for _, v, _ in first} == {"rrr", "guidance"}
    assert {seed for *_, seed in first} == set(gate.SEEDS)


@pytest.mark.parametrize("annotated", [1.0, 0.3])
@pytest.mark.parametrize("term", ["share", "backgrounds", "both", "guidance", "rrr", "unmasked"])
def test_every_way_trains(tiny, term, annotated):
    root, _ = tiny
    variant = {
        "share": Variant("share", "last", "rectified", 1.0, "true", annotated),
        "both": Variant("share", "last", "rectified", 1.0, "true", annotated, beside=True),
        "backgrounds": Variant("backgrounds", mask="true", annotated=annotated),
        "guidance": Variant("guidance", "last", None, 1.0, "true", annotated),
        "rrr": Variant("rrr", None, None, 1e-2, "true", annotated),
        "unmasked": Variant("unmasked", weight=1e5, annotated=annotated),
    }[term]
    model, _, _, steps, terms = training.train("small", variant, 0, root)
    assert steps == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert TERMS.get(variant.term, variant.term) in terms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Softplus(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batch():
    torch.manual_seed(1)
    known = torch.tensor([True, False, True, True])
    masks = torch.rand(4, 1, 8, 8) < 0.4
    return torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), masks, known


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_right_for_the_right_reasons_is_the_papers():
    model, (x, y, masks, known) = network(), batch()
    x.requires_grad_()
    ours = RightReasons(0.5)(model(x), y, x, GivenMask(masks, known))
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1).sum(), x, create_graph=True)
    squares = [gradient[i][:, ~masks[i, 0]].square().sum() for i in range(4) if known[i]]
    theirs = nn.functional.cross_entropy(logits, y) + 0.5 * sum(squares) / 3
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs), rtol=1e-9, atol=1e-12)


def test_guidance_is_the_papers_energy_loss():
    model, (x, y, masks, known) = network(), batch()
    with torch.no_grad():
        model[-1].weight.abs_()  # every label has positive attributions
    guidance = Guidance(model[3], 2.0)
    ours = guidance(model(x), y, GivenMask(masks, known))
    guidance.remove()
    features = model[:4](x)
    logits = model[4:](features)
    losses = []
    for i in (0, 2, 3):
        (gradient,) = torch.autograd.grad(logits[i, y[i]], features, create_graph=True)
        attribution = (gradient[i] * features[i]).sum(0)[None, None]
        shown = nn.functional.interpolate(attribution, (8, 8), mode="bilinear", align_corners=False)[0, 0].clamp_min(0)
        losses.append(1 - shown[masks[i, 0]].sum() / shown.sum())
    theirs = nn.functional.cross_entropy(logits, y) + 2 * sum(losses) / 3
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs), rtol=1e-9, atol=1e-12)


def test_the_unmasked_penalty_is_s_ibs_background_term_of_everything():
    model, (x, y, masks, _) = network().train(), batch()
    loss_of = criterion(Variant("unmasked", weight=1.0), SETTINGS["small"], model)
    x = sib_fast.vjp_leaf(x)
    loss = loss_of(model(x), y)
    loss_of.remove()
    theirs = SIBLoss(0.0, 1.0, objective="expm1")(model(x), y, x, mask=torch.zeros_like(masks))
    torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=0)
    assert loss > nn.functional.cross_entropy(model(x), y)


def test_a_run_records_what_the_report_shows(tiny, capsys, tmp_path):
    root, out = tiny
    records = gate_records({})
    (tmp_path / "gate").mkdir()
    for (_, name, seed), record in records.items():
        text = json.dumps(record | {"variant": name, "seed": seed})
        (tmp_path / "gate" / f"small-{name}-{seed}.json").write_text(text)
    out.mkdir()
    for (_, name, seed), record in selected({}).items():
        text = json.dumps(record | {"setting": "small", "variant": name, "seed": seed})
        (out / f"small-{name}-{seed}.json").write_text(text)
    arguments = ["--out", str(out), "--gate", str(tmp_path / "gate")]
    assert study.main(["run", "--root", str(root), *arguments, "--only", r"small-(plain|guidance.*|backgrounds-true)-1[01]"]) == 0
    record = json.loads((out / "small-plain-10.json").read_text())
    assert set(record["diagnosis"]["measures"]) == set(study.MEASURES)
    assert len(record["objects"]) == len(record["right"]["shifted"]) == 12
    assert all("/" in name for name in record["objects"])
    assert record["accuracy"]["shifted"] == pytest.approx(record["right"]["shifted"].count("1") / 12)
    capsys.readouterr()
    assert study.main(["report", *arguments]) == 0
    printed = capsys.readouterr().out
    plain = [json.loads((out / f"small-plain-{seed}.json").read_text()) for seed in (10, 11)]
    assert f"| plain | plain | 2 | {np.mean([r['accuracy']['correlated'] for r in plain]):.3f} |" in printed
    assert "| backgrounds-100 − plain | 2 | " in printed
    assert "| share-10 − guidance-10 | 0 | " in printed


# ---- statistics -----------------------------------------------------------------------------------------------------


def made_up(seed, right, objects=None):
    return {
        "seed": seed,
        "accuracy": {"shifted": right.count("1") / len(right)},
        "right": {"shifted": right},
        "objects": objects or [f"o{i}" for i in range(len(right))],
    }


def test_differences_are_paired_by_seed():
    ours, theirs = [made_up(s, r) for s, r in ((1, "1111"), (2, "1110"), (3, "0000"))], [made_up(1, "1100"), made_up(2, "1100")]
    mean, low, high = paired(ours, theirs, "shifted")
    assert mean == pytest.approx(0.375)
    half = 12.706 * 0.125 * math.sqrt(2) / math.sqrt(2)
    assert (low, high) == pytest.approx((0.375 - half, 0.375 + half), rel=1e-3)
    assert math.isnan(paired(ours[:1], theirs, "shifted")[1])
    assert math.isnan(paired([], theirs, "shifted")[0])


def test_the_primary_comparisons_are_one_family():
    rises = [[made_up(s, "1" * (3 + s) + "0" * (7 - s)) for s in range(4)], [made_up(s, "1" + "0" * 9) for s in range(4)]]
    found = {"share-10": rises[0], "plain": rises[1], "guidance-10": rises[1], "rrr-10": rises[0]}
    (plain, a), (guidance, b), (_, same) = study.primary(found)
    from scipy.stats import ttest_1samp

    alone = ttest_1samp([0.2, 0.3, 0.4, 0.5], 0).pvalue
    assert (plain, guidance) == ("share-10 − plain", "share-10 − guidance-10")
    assert a == b == pytest.approx(2 * alone)  # the third is not defined: it never moves
    assert math.isnan(same)
    assert all(math.isnan(p) for _, p in study.primary({way: records[:1] for way, records in found.items()}))


def test_an_object_is_drawn_with_all_its_images():
    """Ten objects of 40 images that all say the same are ten pieces of evidence, not 400."""
    rng = np.random.default_rng(0)
    says = rng.random(10) < 0.5
    right = "".join(str(int(v)) for v in np.repeat(says, 40))
    none = "0" * 400
    together = [f"a/{i // 40}" for i in range(400)]
    mean, low, high = over_objects([made_up(1, right, together)], [made_up(1, none, together)])
    alone = over_objects([made_up(1, right)], [made_up(1, none)])
    assert mean == alone[0] == pytest.approx(says.mean())
    assert high - low > 4 * (alone[2] - alone[1])
    assert math.isnan(over_objects([made_up(1, right)], [made_up(2, none)])[0])
