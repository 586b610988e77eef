"""The test itself: every version of every image through the network, then explanations against the masks."""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast.explain import METHODS, UndefinedMethodError, explain
from sib_fast.lab.results import Interrupted, as_json, environment, write_atomically
from sib_fast.lab.shortcut.answers import Answers, ask
from sib_fast.lab.shortcut.images import Images, gather
from sib_fast.lab.shortcut.numbers import Estimate, estimates
from sib_fast.lab.shortcut.pictures import Strip, example_strip, worst_first, worst_strips
from sib_fast.lab.shortcut.subject import Subject, as_subject, in_eval_mode
from sib_fast.lab.shortcut.verdict import Facts, Verdict, judge
from sib_fast.lab.shortcut.versions import (
    MIXED,
    MIXED_RAND,
    MIXED_SAME,
    ONLY_BG_T,
    ORIGINAL,
    VERSIONS,
    backgrounds,
    draw_shots,
)

_OP = "diagnose"
FORMAT = "sib_fast.diagnosis.1"
JSON_FILE, PAGE_FILE = "diagnosis.json", "diagnosis.html"
# As the study has them. Each step is a backward pass, and these two are most of the time.
METHOD_OPTIONS: dict[str, dict[str, int]] = {
    "integrated_gradients": {"n_steps": 16, "internal_batch_size": 16},
    "smoothgrad": {"n_samples": 16},
}
_SAME_DRAWS = 2
_READING = 0.04  # of the time, at 224 px from files; only the progress shown depends on it
_BACKWARD = 2.4  # a forward with its backward pass, in forward passes; as above
_EXPLAINED_AT_ONCE = 16

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Energy:
    """Of one method: the share of its map's weight inside the mask, mean over images, beside maps that know nothing.

    Attributes:
        share: NaN with n 0 where the method cannot explain this network; then `reason`.
        above_constant: share − what a constant map has, the object's share of the image, image by image.
        above_place: share − what the other images' mean mask has: a map that only knows where objects usually are.
    """

    share: Estimate
    above_constant: Estimate
    above_place: Estimate
    reason: str = ""


@dataclass(frozen=True)
class ClassResult:
    """Means over a class's images; NaN where a version is not defined on any."""

    name: str
    images: int
    original: float
    mixed_same: float
    mixed_rand: float
    gap: float
    worst: float
    taken_for: str  # the commonest wrong answer under Mixed-Rand


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        accuracy, truth, moved, flips: by version (Original, Mixed-Same, …): right answers, probability of the true class, total
            variation between the softmaxes on this version and on the original, and how often the answer is another one.
        measures: gap (BG-Gap, Mixed-Same − Mixed-Rand), loss (Original − Mixed-Rand), worst (right on every one of the Mixed-Rand
            backgrounds), paste (Original − Mixed-Same), between_moved and between_flips (two Mixed-Rand backgrounds of one object
            against each other), known (Original − always the commonest class), background_known (Only-BG-T − the same).
        energy: by explanation method; constant, place: what maps that know nothing have.
        verdict: what it comes to, in words. guessing: the accuracy of answering `always`, the commonest class.
        area: the masks' mean share of an image.
        images: one dict per image, with every answer. left_out: (name, reason) of images that could not be tested.
        without_background: images that give no background. outlined: images whose outline is filled, not their box.
    """

    network: str
    class_map: str
    classes: tuple[str, ...]
    mask_kind: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    accuracy: Mapping[str, Estimate]
    truth: Mapping[str, Estimate]
    moved: Mapping[str, Estimate]
    flips: Mapping[str, Estimate]
    measures: Mapping[str, Estimate]
    energy: Mapping[str, Energy]
    constant: Estimate
    place: Estimate
    per_class: tuple[ClassResult, ...]
    verdict: Verdict
    guessing: float
    always: str
    area: float
    images: tuple[Mapping[str, Any], ...]
    left_out: tuple[tuple[str, str], ...]
    without_background: int
    outlined: int
    example: Strip
    worst: tuple[Strip, ...]
    command: str = ""

    def to_json(self) -> str:
        """Every number, and every image's answers. What is not defined is null."""
        document = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PICTURES}
        document["worst"] = [strip.name for strip in self.worst]
        return json.dumps(as_json(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_html(self) -> str:
        """One page that needs no other file."""
        from sib_fast.lab.shortcut.report import html

        return html(self)

    def save(self, folder: Path | str) -> list[Path]:
        """diagnosis.html and diagnosis.json, each in one step, once both are made. Returns their paths."""
        folder = Path(folder)
        contents = {PAGE_FILE: self.to_html(), JSON_FILE: self.to_json()}
        folder.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []
        for name, text in contents.items():
            try:
                write_atomically(folder / name, text.encode())
            except KeyboardInterrupt as error:
                if written:
                    raise Interrupted(f"{written[0]} is whole, {name} is not there or an earlier one.") from error
                raise
            written.append(folder / name)
        return written


_PICTURES = ("example", "worst")  # JPEG


def diagnose(
    network: Any,
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    mapping: Mapping[str, Sequence[int | str]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    images: int = 500,
    explained: int = 50,
    methods: Sequence[str] = tuple(METHODS),
    layer: str | None = None,
    backgrounds_each: int = 5,
    batch_size: int = 32,
    shown: int = 8,
    seed: int = 0,
    command: str = "",
    tell: Tell = lambda stage, share: None,
) -> Diagnosis:
    """Whether a network leans on the background, by the versions and measures of Xiao et al. 2021, on your own images.

    The network runs in eval mode and is left as it was. Equal arguments give equal numbers.

    Args:    network: a module, any function of images [N, C, H, W] that returns logits [N, classes], a :class:`Subject`, or the
             path of a file that ``sib-fast train`` wrote. A function that torch cannot differentiate has no gradient maps.
        data: gives (image, label, mask): a data set of :func:`sib_fast.lab.datasets.open_dataset`, any other, or a DataLoader;
            the mask as `sib_fast.masks.collate` takes it, boxes among them. Images are normalised as the network wants them
            (a Subject's own normalisation takes the place of the data's).
        classes: of the labels, default the data's. mean, std: that undo the data's normalisation, default the data's.
        mapping: the logits of each class of the data, where they are not the same classes (1,000 logits, nine classes).
        images: how many to test, drawn at random where the data has a length. explained: of them, by every method.
        methods: of :data:`sib_fast.explain.METHODS`; none is allowed. layer: for the CAMs.
        backgrounds_each: k, Mixed-Rand backgrounds of every object. shown: worst images on the page. seed: of every draw.
        tell: is told the stage and the share of the work that is done.

    Errors:  ValueError, TypeError, FileNotFoundError, ImportError, each with the rule and what was found.
    """
    for method in methods:
        _checks.require_choice(_OP, "methods", method, tuple(METHODS))
    for name, value, least in (("images", images, 2), ("backgrounds_each", backgrounds_each, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{_OP}: {name} must be an int of at least {least}, got {value!r}")
    if explained < 0 or shown < 0 or seed < 0:
        raise ValueError(f"{_OP}: explained, shown and seed must not be negative, got {explained}, {shown} and {seed}")
    _require_extras(methods if explained else ())
    begin = time.perf_counter()
    subject = as_subject(network, data, mean, std)
    if layer is not None and layer not in dict(subject.model.named_modules()):
        raise ValueError(f"{_OP}: layer must be a name in the network's named_modules(), got {layer!r}")
    tell("reading images", 0.0)
    pictures = gather(
        data, images, classes=classes, mean=mean, std=std, seed=seed, tell=lambda share: tell("reading images", _READING * share)
    )
    if len(pictures.labels.unique()) < 2:
        only = pictures.classes[int(pictures.labels[0])]
        raise ValueError(f"{_OP}: data must hold images of two classes or more, got {len(pictures)} of {only!r} alone")
    own = backgrounds(pictures.masks)
    shots = draw_shots(pictures.labels, own.usable, len(pictures.classes), backgrounds_each, _SAME_DRAWS, seed)
    explained = min(explained, len(pictures)) if methods else 0
    used = tuple(dict.fromkeys(methods)) if explained else ()
    passes = {method: max(METHOD_OPTIONS.get(method, {"": 1}).values()) * _BACKWARD + 1 for method in used}
    work, done = len(shots) * len(pictures) + explained * sum(passes.values()), 0.0

    def step(stage: str, passes_done: float) -> None:
        nonlocal done
        done += passes_done
        tell(stage, _READING + (1 - _READING) * done / work)

    with in_eval_mode(subject.model):
        answers = ask(subject, pictures, own, shots, mapping, batch_size, step)
        maps: dict[str, Tensor | str] = {}
        for method in used:
            stage = f"explaining by {method.replace('_', ' ')}"
            maps[method] = _maps(
                subject, pictures.pixels[:explained], method, layer, lambda n, s=stage, p=passes[method]: step(s, n * p)
            )
        worst = worst_first(answers)[:shown]
        method = next((method for method, found in maps.items() if isinstance(found, Tensor)), None)
        heat = _maps(subject, pictures.pixels[[i for i, _ in worst]], method, layer, lambda n: None) if worst and method else None
        strips = worst_strips(answers, worst, heat if isinstance(heat, Tensor) else None, method or "")
    settings = {
        "images": len(pictures),
        "images asked for": images,
        "explained": explained,
        "methods": list(used),
        "layer": layer,
        "backgrounds_each": backgrounds_each,
        "seed": seed,
        "image_size": list(pictures.pixels.shape[2:]),
        "mean": subject.mean,
        "std": subject.std,
        "training": dict(subject.notes or {}),
    }
    place = "cuda" if subject.device.type == "cuda" else "cpu"
    where = environment(torch.get_num_threads(), place, "none") | {"seconds": round(time.perf_counter() - begin, 1)}
    return _summary(subject.name, answers, maps, settings, where, strips, command)


def _require_extras(methods: Sequence[str]) -> None:
    """Now, not after minutes. Errors: ImportError that names the extra."""
    _checks.require_package(_OP, "scipy", "lab")
    _checks.require_package(_OP, "pillow", "lab", "PIL")
    if methods:
        _checks.require_package(_OP, "torchmetrics", "explain")
        _checks.require_package(_OP, "captum", "explain")
        _checks.require_package(_OP, "grad-cam", "explain", "pytorch_grad_cam")


def _maps(subject: Subject, pixels: Tensor, method: str, layer: str | None, step: Callable[[int], None]) -> Tensor | str:
    """Maps [N, 1, H, W] on the CPU for the network's own answers, or why there are none."""
    found = []
    for part in pixels.split(_EXPLAINED_AT_ONCE):
        options: dict[str, Any] = dict(METHOD_OPTIONS.get(method, {}))
        if layer is not None and method.endswith(("cam", "cam_plusplus")):
            options["layer"] = layer
        try:
            with warnings.catch_warnings():
                # Guided backpropagation says at every call that it is partly defined; the page says it once.
                warnings.filterwarnings("ignore", message=".*guided_backprop is defined for rectifiers only")
                found.append(explain(subject.model, subject.prepared(part), None, method, **options).cpu())
        except UndefinedMethodError as error:
            return str(error).split(": ")[1]  # the rule and what was found, without the op and the advice
        except ValueError as error:  # outputs that are no tensor, a layer that is no feature map: the answers need neither
            return str(error).partition(": ")[2]
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"torch cannot differentiate this network: {str(error).splitlines()[0]}"
        step(len(part))
    maps = torch.cat(found)
    return maps if torch.isfinite(maps).all() else "its maps hold NaN or Inf"


# ---- what it comes to ---------------------------------------------------------------------------------------------------


def _summary(
    network: str,
    answers: Answers,
    maps: Mapping[str, Tensor | str],
    settings: Mapping[str, Any],
    where: Mapping[str, Any],
    worst: tuple[Strip, ...],
    command: str,
) -> Diagnosis:
    images, own, labels = answers.images, answers.own, answers.labels
    columns = _columns(answers)
    found = estimates(columns, labels, settings["seed"])
    by_kind = {
        kind: {version: found[f"{kind} {version}"] for version in VERSIONS} for kind in ("accuracy", "truth", "moved", "flips")
    }
    measures = {name: found[name] for name in MEASURES}
    energy, constant, place = _energies(images, maps, settings["explained"], settings["seed"])
    given = np.unique(answers.predictions[answers.predictions >= 0])
    facts = Facts(
        accuracy=by_kind["accuracy"],
        measures=measures,
        guessing=float(np.bincount(labels).max() / len(labels)),
        always=images.classes[int(np.bincount(labels).argmax())],
        one_answer=answers.names[int(given[0])] if len(given) == 1 else None,
        backgrounds_each=settings["backgrounds_each"],
        boxes=images.mask_kind == "box",
        energy={name: e.above_constant for name, e in energy.items() if e.share.n},
    )
    return Diagnosis(
        network=network,
        class_map=answers.class_map.said,
        classes=images.classes,
        mask_kind=images.mask_kind,
        settings=settings,
        environment=where,
        **by_kind,
        measures=measures,
        energy=energy,
        constant=constant,
        place=place,
        per_class=tuple(_per_class(answers, columns)),
        verdict=judge(facts),
        guessing=facts.guessing,
        always=facts.always,
        area=float(images.masks.double().mean()),
        images=tuple(_records(answers)),
        left_out=images.left_out,
        without_background=int((~own.usable).sum()),
        outlined=int((own.outlined & own.usable).sum()),
        example=example_strip(answers),
        worst=worst,
        command=command,
    )


MEASURES = ("gap", "loss", "worst", "paste", "between_moved", "between_flips", "known", "background_known")


def _columns(answers: Answers) -> dict[str, np.ndarray]:
    """Per image, NaN where it is not defined; of several draws the mean, or what the name says."""
    labels, predictions = answers.labels, answers.predictions
    defined = predictions >= 0
    right = np.where(defined, predictions == labels[:, None], np.nan)
    moved, flips = _apart(answers, np.zeros(len(answers.shots), dtype=int), np.arange(len(answers.shots)))
    columns = {
        f"{kind} {version}": _row_mean(values[:, answers.columns(version)])
        for kind, values in (("accuracy", right), ("truth", answers.truth), ("moved", moved), ("flips", flips))
        for version in VERSIONS
    }
    random = answers.columns(MIXED_RAND)
    between_moved, between_flips = _apart(answers, *np.array(list(itertools.combinations(random, 2))).T)
    original, same, rand = (columns[f"accuracy {v}"] for v in (ORIGINAL, MIXED_SAME, MIXED_RAND))
    constant = labels == np.bincount(labels).argmax()
    return columns | {
        "gap": same - rand,
        "loss": original - rand,
        "worst": right[:, random].min(axis=1),
        "paste": original - same,
        "between_moved": _row_mean(between_moved),
        "between_flips": _row_mean(between_flips),
        "known": original - constant,
        "background_known": columns[f"accuracy {ONLY_BG_T}"] - constant,
    }


def _apart(answers: Answers, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Total variation between the softmaxes of pairs of shots, and whether their answers differ. Shapes: [P] -> [N, P] each."""
    a, b = answers.predictions[:, first], answers.predictions[:, second]
    moved = 0.5 * np.abs(answers.probabilities[:, first] - answers.probabilities[:, second]).sum(axis=2)
    return moved, np.where((a >= 0) & (b >= 0), a != b, np.nan)


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean of what is defined in a row, NaN for nothing."""
    defined = np.isfinite(values)
    count = defined.sum(axis=1)
    return np.divide(np.where(defined, values, 0).sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0)


def _energies(
    images: Images, maps: Mapping[str, Tensor | str], explained: int, seed: int
) -> tuple[dict[str, Energy], Estimate, Estimate]:
    from sib_fast.explain.metrics import EnergyPointingGame

    masks, labels = images.masks[:explained], images.labels[:explained].numpy()
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    if not explained:
        return {}, nothing, nothing
    others = (images.masks.sum(dim=0, keepdim=True) - masks.long()).double() / (len(images) - 1)
    scores = EnergyPointingGame().scores
    constant, place = scores(torch.ones_like(others), masks).numpy(), scores(others, masks).numpy()
    columns = {"constant": constant, "place": place}
    for method, values in maps.items():
        if isinstance(values, Tensor):
            share = scores(values, masks).numpy()
            columns |= {method: share, f"{method} constant": share - constant, f"{method} place": share - place}
    found = estimates(columns, labels, seed)
    energy = {
        method: Energy(nothing, nothing, nothing, values)
        if isinstance(values, str)
        else Energy(found[method], found[f"{method} constant"], found[f"{method} place"])
        for method, values in maps.items()
    }
    return energy, found["constant"], found["place"]


def _per_class(answers: Answers, columns: Mapping[str, np.ndarray]) -> Iterator[ClassResult]:
    labels = answers.labels
    wanted = (f"accuracy {ORIGINAL}", f"accuracy {MIXED_SAME}", f"accuracy {MIXED_RAND}", "gap", "worst")
    for k in np.unique(labels):
        here = labels == k
        answered = answers.predictions[here][:, answers.columns(MIXED_RAND)]
        wrong = answered[(answered >= 0) & (answered != k)]
        taken = answers.names[int(np.bincount(wrong).argmax())] if len(wrong) else ""
        means = (float(_row_mean(columns[name][here][None])[0]) for name in wanted)
        yield ClassResult(answers.images.classes[k], int(here.sum()), *means, taken)


def _records(answers: Answers) -> Iterator[dict[str, Any]]:
    """Of every shot: version, whose background it has where that is another image's, answer, probability of the true class."""
    names = answers.images.names
    for i, name in enumerate(names):
        label, given = int(answers.labels[i]), []
        for column, shot in enumerate(answers.shots):
            if answers.predictions[i, column] < 0:
                continue
            record: dict[str, Any] = {"version": shot.version}
            if shot.version in MIXED:
                record["background"] = names[int(shot.donor[i])]
            record["answer"] = answers.names[int(answers.predictions[i, column])]
            record["probability_of_label"] = round(float(answers.probabilities[i, column, label]), 6)
            given.append(record)
        yield {"name": name, "label": answers.images.classes[label], "answers": given}
