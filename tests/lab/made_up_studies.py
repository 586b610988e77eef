"""Folders of made-up studies whose answers are known."""

from __future__ import annotations

import json
import math

from sib_fast.explain import METHODS
from sib_fast.lab.study.records import load_study

TRIPLE = ("net", "sib", "plain")  # architecture, variant, against
VARIANTS = {"plain": "plain training", "sib": "S-IB", "unmasked": "no mask (control)"}
BASE = {
    "energy": 0.4,
    "energy_gain": 2.2,
    "rank_accuracy": 0.5,
    "pointing_game": 0.6,
    "iou": 0.3,
    "log_background": -0.5,
    "background_variance": 0.6,
    "insertion": 0.6,
    "deletion": 0.2,
    "randomisation": 0.1,
}


def record(variant, seed, *, shifted=0.0, inside=0.0, arch="net", **shifts):
    """One network. shifts: added to a metric of every method, or to "method.metric" alone.

    The seed moves every value of all variants by ±0.05, far more than the effects differ between seeds: only pairs see through.
    """
    luck = 0.05 * math.sin(37.0 * seed)

    def score(method, metric):
        return BASE[metric] + luck + shifts.get(metric, 0.0) + shifts.get(f"{method}.{metric}", 0.0)

    unknown = {name for name in shifts if name.rpartition(".")[2] not in BASE}
    assert not unknown
    return {
        "arch": arch,
        "variant": variant,
        "seed": seed,
        "settings": {"epochs": 2, "seed": seed, "lambda_bg": 0.0 if variant == "plain" else 1e6},
        "accuracy": {"in_distribution": 0.85 + luck + inside, "shifted": 0.75 + luck + shifted},
        "test_images": 500,
        "explained_images": 50,
        "mask_area": 0.18,
        "explanations": {m: {k: score(m, k) for k in BASE} | {"undefined": 0} for m in METHODS},
        "vjp": {"energy": 0.4 + luck + shifts.get("energy", 0.0)},
        "terms": {"bg": 1e-7},
        "steps": 10,
        "train_seconds": 36.0,
        "weights": "networks/x.pt",
        "commit": "abc",
    }


def write(out, records, **changed):
    """The folder of a study with these networks; planned are exactly these unless told otherwise."""
    (out / "results").mkdir(parents=True)
    keys = [[r["arch"], r["variant"], r["seed"]] for r in records]
    document = {
        "settings": {"seeds": sorted({k[2] for k in keys})},
        "variants": VARIANTS,
        "architectures": {"net": "small net"},
        "environment": {"torch": "2.14.1"},
        "status": "complete",
        "planned": keys,
        "baseline": "plain",
    } | changed
    (out / "study.json").write_text(json.dumps(document))
    for r in records:
        (out / "results" / f"{r['arch']}.{r['variant']}.seed{r['seed']}.json").write_text(json.dumps(r))
    return out


def study(out, sib, control=None, seeds=(100, 101, 102, 103, 104)):
    """A study of plain, S-IB and, if told, the control. sib, control: one dict of shifts for all seeds, or one per seed."""
    records = [record("plain", s) for s in seeds]
    for variant, shifts in (("sib", sib), ("unmasked", control)):
        if shifts is not None:
            each = [shifts] * len(seeds) if isinstance(shifts, dict) else shifts
            records += [record(variant, s, **e) for s, e in zip(seeds, each, strict=True)]
    return load_study(write(out, records))
