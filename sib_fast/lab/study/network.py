"""One network of a study: train it, explain it, score it, put all of it on disk."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

import sib_fast
from sib_fast.explain import METHODS as EXPLAINERS
from sib_fast.explain.controls import insertion_deletion, randomisation
from sib_fast.explain.metrics import localisation
from sib_fast.lab.data import NUM_CLASSES, PIXEL_MEAN, PIXEL_STD, EmbeddedDigits
from sib_fast.lab.evaluate import accuracy, gradient_map
from sib_fast.lab.fit import fit
from sib_fast.lab.networks import NetworkSpec, build_network, save_network
from sib_fast.lab.results import as_json, commit, write_atomically
from sib_fast.lab.study.composites import composites
from sib_fast.lab.study.measures import background_measures, evidence_map, evidence_measures, maps_of, method_options
from sib_fast.lab.study.progress import Tell, work
from sib_fast.lab.study.records import METHOD_LABELS, file_stem
from sib_fast.lab.study.variants import Variant

_BATCH = 100
CLASSES = tuple(map(str, range(NUM_CLASSES)))


def run_network(
    arch: str, variant: Variant, seed: int, settings: dict[str, Any], out: Path, tell: Tell = lambda stage, share: None
) -> dict[str, Any]:
    """Train and score one network; its result file is written last, so where it stands the network is done.

    Returns: the record, as `results/<stem>.json` holds it.
    """
    stem = file_stem(arch, variant.name, seed)
    training, scoring = work((arch, variant.name, seed), settings)
    trained = training / (training + scoring)
    tell("making its images", 0.0)
    train = composites("train", settings, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(arch, NUM_CLASSES, width=settings["width"])
    sib_fast.prepare(model)
    # every variant alike: oneDNN's convolutions of few channels are faster so, and the strided ones' input gradient most of all
    model.to(memory_format=torch.channels_last)
    steps, seconds, terms = fit(
        model,
        variant.criterion(model),
        variant.training_set(train),
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        seed=seed,
        device="cpu",
        log_folder=out / "logs" / stem,
        epoch_done=lambda n: tell(f"epoch {n} of {settings['epochs']}", trained * n / settings["epochs"]),
        precision=variant.precision,
        given_masks=variant.given_masks,
    )
    sib_fast.restore(model)
    model.to(memory_format=torch.contiguous_format)  # scored as whoever loads the file has it
    spec = NetworkSpec(
        arch,
        CLASSES,
        settings["image_size"],
        (PIXEL_MEAN,) * 3,
        (PIXEL_STD,) * 3,
        {"width": settings["width"]},
        variant.settings(),
    )
    weights = Path("networks") / f"{stem}.pt"
    save_network(out / weights, spec, model)

    begin = time.perf_counter()
    same, shifted = (composites("test", settings, seed, shifted=s) for s in (False, True))
    record = {
        "arch": arch,
        "variant": variant.name,
        "seed": seed,
        "settings": variant.settings(),
        "accuracy": {"in_distribution": accuracy(model, same), "shifted": accuracy(model, shifted)},
        "test_images": len(shifted),
        **score(
            model,
            arch,
            shifted,
            train.masks.double().mean(0),
            settings,
            lambda stage, share: tell(stage, trained + (1 - trained) * share),
        ),
        "terms": terms,
        "steps": steps,
        "train_seconds": seconds,
        "evaluate_seconds": time.perf_counter() - begin,
        "weights": str(weights),
        "commit": commit(),
    }
    document = json.dumps(as_json(record), indent=1, allow_nan=False)
    write_atomically(out / "results" / f"{stem}.json", (document + "\n").encode())
    return record


def score(
    model: nn.Module, arch: str, data: EmbeddedDigits, mean_mask: Tensor, settings: dict[str, Any], tell: Tell
) -> dict[str, Any]:
    """Every method's maps of the first images of a set, for the true class, against the true masks.

    Insertion and deletion on a fifth of the images, randomisation on a twentieth: they cost as much as the maps.

    Args:    mean_mask [1, H, W]: of the training set. settings: the study's.
    """
    explained, methods = settings["explained"], settings["methods"]
    images, labels, masks = data.images[:explained], data.labels[:explained], data.masks[:explained]
    few, fewer = -(-explained // 5), -(-explained // 20)
    explanations = {}
    for i, method in enumerate(methods):
        tell(f"scored by {METHOD_LABELS[method]}", i / len(methods))
        maps = maps_of(model, arch, images, labels, method, mean_mask)
        insertion, deletion = insertion_deletion(model, images[:few], labels[:few], maps[:few])
        explanations[method] = _localisation(maps, masks) | {
            "insertion": float(insertion.mean()),
            "deletion": float(deletion.mean()),
        }
        if settings["randomisation"] and method in EXPLAINERS:
            survives = randomisation(model, images[:fewer], labels[:fewer], method, **method_options(method))
            explanations[method]["randomisation"] = float(survives.nanmean())
    evidence = torch.cat([evidence_map(model, *b) for b in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)])
    return {
        "explained_images": len(images),
        "mask_area": float(masks.double().mean()),
        "explanations": explanations,
        "vjp": _localisation(gradient_map(model, images), masks),
        "evidence": evidence_measures(evidence, masks),
        "background": background_measures(model, data, explained),
    }


def _localisation(maps: Tensor, masks: Tensor) -> dict[str, float]:
    metrics: MetricCollection = localisation()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
        metrics.update(maps, masks)
        values = {name: float(value) for name, value in metrics.compute().items()}
    return values | {"undefined": metrics["energy"].undefined}
