"""What a study leaves in its folder, read back and checked: one number per network, quantity, method and metric.

out/study.json                                the settings, what was planned, where it ran
out/results/<arch>.<variant>.seed<k>.json     one finished network each
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sib_fast.explain import REPORTED
from sib_fast.lab.study.measures import METHODS
from sib_fast.lab.study.variants import ARCHITECTURES

STATUSES = ("running", "interrupted", "complete")
MEAN_OF_SIX = "mean_of_six"
MEAN_NOT_OPTIMISED = "mean_not_optimised"
NOT_OPTIMISED = ("saliency", "smoothgrad", "integrated_gradients", "guided_backprop", "grad_cam_earlier")
"""Methods that no loss of the study of evidence terms acts on."""
MEANS = {MEAN_OF_SIX: REPORTED, MEAN_NOT_OPTIMISED: NOT_OPTIMISED}


class Metric(NamedTuple):
    """direction: +1 if higher is better, −1 if lower is, 0 if neither, so that it is shown and never judged."""

    label: str
    direction: int
    definition: str

    @property
    def heading(self) -> str:
        return self.label + {1: " ↑", -1: " ↓", 0: ""}[self.direction]


METRICS = {
    "accuracy_in_distribution": Metric(
        "accuracy, in distribution",
        1,
        "Share of test images classified rightly; backgrounds correlated with the class as in training.",
    ),
    "accuracy_shifted": Metric("accuracy, shifted", 1, "The same objects on backgrounds that are independent of the class."),
    "energy": Metric(
        "energy inside",
        1,
        "Share of the map's mass inside the true object. A uniform map scores the object's share of the image.",
    ),
    "energy_gain": Metric("energy gain", 1, "Energy inside over the object's share of the image: 1 for a uniform map."),
    "rank_accuracy": Metric(
        "rank accuracy", 1, "Of as many most relevant pixels as the object has, the share that lies inside the object."
    ),
    "pointing_game": Metric("pointing game", 1, "Share of images whose most relevant pixel lies inside the object."),
    "iou": Metric("IoU", 1, "Intersection over union of the object and the part of the map above half of its range."),
    "log_background": Metric(
        "background, log10",
        -1,
        "log10 of mean relevance outside over mean relevance inside: 0 for a uniform map, lower is better.",
    ),
    "background_variance": Metric(
        "background variance", -1, "Variance of the map with the true object set to zero, over the variance of the whole map."
    ),
    "insertion": Metric(
        "insertion", 1, "Area under the class probability as pixels are put into a blank image, the most relevant ones first."
    ),
    "deletion": Metric(
        "deletion", -1, "Area under the class probability as pixels are blanked out, the most relevant ones first."
    ),
    "randomisation": Metric(
        "randomisation",
        0,
        "Rank correlation with the map of the same network with weights drawn anew: near 0 for a method that explains the "
        "network, near 1 for one that draws edges whatever the network knows. A property of the method, so not judged.",
    ),
    "positive_outside": Metric(
        "evidence for the class in cells without object",
        -1,
        "Of the positive part of Σ R·A at the last feature map, the share there.",
    ),
    "negative_outside": Metric(
        "evidence against the class in cells without object",
        0,
        "Of the negative part of Σ R·A, the share there: high where all that is left of it is background, so not judged alone.",
    ),
    "negative_background": Metric(
        "background used against the class",
        -1,
        "Of all of |Σ R·A|, the share that is negative and in cells without object: what a term on the positive part cannot see.",
    ),
    "effective_area": Metric(
        "effective area of the evidence", 0, "(Σ e)² / (P Σ e²) of the positive part: 1 for a constant map, 1/P for one cell."
    ),
    "swap_changed": Metric(
        "predictions changed by another background", -1, "Share of images; the object is kept, the background is another image's."
    ),
    "swap_distance": Metric(
        "probabilities moved by another background", -1, "Mean total variation ½ Σ|p − p′| between the two predictions."
    ),
    "erase_changed": Metric("predictions changed by erasing the object", 1, "Share of images; the background is kept."),
    "erase_distance": Metric(
        "probabilities moved by erasing the object", 1, "Mean total variation ½ Σ|p − p′| between the two predictions."
    ),
}
METHOD_LABELS = {
    "saliency": "vanilla gradient",
    "input_x_gradient": "input × gradient",
    "integrated_gradients": "integrated gradients",
    "smoothgrad": "SmoothGrad",
    "guided_backprop": "guided backpropagation",
    "grad_cam": "Grad-CAM",
    "grad_cam_plusplus": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "grad_cam_earlier": "Grad-CAM, earlier map",
    "occlusion": "occlusion",
    "constant": "constant map: the mean training mask",
    "centre": "constant map: a centred square",
    MEAN_OF_SIX: "mean of six",
    MEAN_NOT_OPTIMISED: "mean of five not optimised",
}


class Quantity(NamedTuple):
    """One number of a network: ("accuracy_shifted",), ("explanation", "saliency", "energy"), ("vjp", "", "energy"), …"""

    name: str
    method: str = ""
    metric: str = ""

    @property
    def kind(self) -> Metric:
        """What it measures; a metric that is not in METRICS has no direction and is not judged."""
        if self.name in ("explanation", "vjp", "evidence", "background"):
            return METRICS.get(self.metric, Metric(self.metric, 0, ""))
        return METRICS.get(self.name, Metric(" ".join(filter(None, (self.name, self.metric))), 0, ""))

    @property
    def label(self) -> str:
        whose = {"explanation": METHOD_LABELS.get(self.method, self.method), "vjp": "VJP"}.get(self.name)
        return f"{whose}: {self.kind.heading}" if whose else self.kind.heading


SHIFTED = Quantity("accuracy_shifted")
IN_DISTRIBUTION = Quantity("accuracy_in_distribution")


def explanation(method: str, metric: str) -> Quantity:
    return Quantity("explanation", method, metric)


@dataclass(frozen=True)
class Network:
    """One finished network.

    Attributes:
        values: every number of the record, NaN where it is null or not finite; and for each metric the protocol's
            mean over methods, under the name of the mean as method: NaN unless all of them have it.
    """

    arch: str
    variant: str
    seed: int
    values: dict[Quantity, float]
    settings: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.arch, self.variant, self.seed


@dataclass(frozen=True)
class Protocol:
    """What a report compares and asks.

    Attributes:
        title, question: of the page.
        page: the folder of docs/ that its protocol is in.
        headline, control: variants: what is judged, and what it is to be told from.
        mean: of :data:`MEANS`: the mean over methods that sums a network up. several: what its methods are called together.
        without: what the control is, in words.
        others: further methods that its tables show, with what they are.
        against: further (variant, against), beside everything with the baseline and the headline with everything.
        secondary: what is judged beside the primary quantities; empty: everything that has a direction, uncorrected.
    """

    title: str
    question: str
    page: str
    headline: str
    control: str
    mean: str
    several: str
    without: str
    others: dict[str, str] = field(default_factory=dict)
    against: tuple[tuple[str, str], ...] = ()
    secondary: tuple[Quantity, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of the mean."""
        return MEANS[self.mean]

    @property
    def primary(self) -> tuple[Quantity, Quantity]:
        return SHIFTED, explanation(self.mean, "energy")


_TRAINED = "at the map that the terms act on, so optimised"
_KNOWS_NOTHING = "knows neither network nor image"
PROTOCOLS = {
    "s-ib": Protocol(
        title="Does S-IB training put explanations on the object?",
        question="Two ways of training the same networks on the same images. Where do their explanations find the evidence: on "
        "the object, or on the background? And which network is right more often?",
        page="study",
        headline="sib",
        control="unmasked",
        mean=MEAN_OF_SIX,
        several="six methods",
        without="a penalty that has no mask",
        others=dict.fromkeys(("input_x_gradient", "layer_cam"), "not of the six"),
    ),
    "evidence": Protocol(
        title="What do terms on the evidence at the last feature map do?",
        question="Several ways of training the same networks on the same images: cross entropy alone, S-IB, and terms on the "
        "evidence at the last feature map. Where do explanations find the evidence that no term acts on, and which network is "
        "right when the background no longer tells the class?",
        page="study-evidence",
        headline="share",
        control="area",
        mean=MEAN_NOT_OPTIMISED,
        several="five methods that nothing optimised",
        without="effective area, which has no mask",
        others={
            "occlusion": "no loss trains on it",
            "grad_cam": _TRAINED,
            "grad_cam_plusplus": _TRAINED,
            "constant": _KNOWS_NOTHING,
            "centre": _KNOWS_NOTHING,
        },
        against=(
            ("area", "sib"),
            ("area", "unmasked"),
            ("sib_area", "sib"),
            ("sib_share", "sib"),
            ("sib_share", "sib_area"),
        ),
        secondary=(
            IN_DISTRIBUTION,
            *(explanation(method, "energy") for method in (*NOT_OPTIMISED, "occlusion", "grad_cam", "grad_cam_plusplus")),
            *(explanation(MEAN_NOT_OPTIMISED, metric) for metric in ("log_background", "insertion", "deletion")),
            *(Quantity("evidence", "", metric) for metric in ("positive_outside", "negative_background")),
            *(Quantity("background", "", metric) for metric in ("swap_changed", "erase_changed")),
        ),
    ),
}


@dataclass(frozen=True)
class Study:
    """A study as far as it has come.

    Attributes:
        variants, architectures: name -> label, in the order of display.
        planned: (arch, variant, seed) of every network it is to hold; empty: whatever is there counts.
        baseline, headline, control: variants: what is compared with (plain training), what is judged, and what that is to be told
            from.
        protocol: what the report compares and asks.
        networks: in the order of architectures, variants and seeds.
        unplanned: results in the folder that were not planned: left out, so that no seed is chosen after the fact.
        command: what repeats it.
        step_seconds: architecture -> what `sib_fast.lab.study.timing.time_steps` found, where steps were timed.
    """

    out: Path
    settings: dict[str, Any]
    variants: dict[str, str]
    architectures: dict[str, str]
    environment: dict[str, Any]
    status: str
    planned: tuple[tuple[str, str, int], ...]
    baseline: str
    headline: str
    control: str
    networks: tuple[Network, ...]
    protocol: Protocol = PROTOCOLS["s-ib"]
    unplanned: tuple[tuple[str, str, int], ...] = ()
    command: str = "sib-fast study"
    step_seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def missing(self) -> list[tuple[str, str, int]]:
        """Planned networks that have no result."""
        there = {n.key for n in self.networks}
        return [key for key in self.planned if key not in there]

    def of(self, arch: str, variant: str | None = None) -> list[Network]:
        return [n for n in self.networks if n.arch == arch and variant in (None, n.variant)]

    def values(self, arch: str, variant: str, quantity: Quantity) -> dict[int, float]:
        """seed -> value, only where it is defined."""
        found = ((n.seed, n.values.get(quantity, math.nan)) for n in self.of(arch, variant))
        return {seed: value for seed, value in found if math.isfinite(value)}

    def quantities(self, arch: str) -> list[Quantity]:
        """Everything that any network of this architecture reports."""
        return list(dict.fromkeys(q for n in self.of(arch) for q in n.values))

    def present(self, arch: str) -> dict[str, str]:
        """The variants that have a network of this architecture, name -> label."""
        return {v: label for v, label in self.variants.items() if self.of(arch, v)}

    @property
    def reported(self) -> list[str]:
        """The architectures that have a network."""
        return [arch for arch in self.architectures if self.of(arch)]

    def label(self, variant: str) -> str:
        return self.variants.get(variant, variant)


def file_stem(arch: str, variant: str, seed: int) -> str:
    """What every file of a network is called, without its suffix."""
    # a colon is no character for a file on every system
    return f"{arch}.{variant.replace(':', '@')}.seed{seed}"


def load_study(out: Path) -> Study:
    """Read a study's folder. Keys that are not known are ignored, or kept where they are numbers.

    Errors:  FileNotFoundError without ``study.json``; ValueError that names the file for one that is not as promised.
    """
    out = Path(out)
    path = out / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"study: out must hold study.json, got {out}: run `sib-fast study` first")
    document = _read(path)
    for name, kind in _STUDY_KEYS.items():
        _require(isinstance(document.get(name), kind), path, f"{name} must be {_name(kind)}", document.get(name))
    status, variants, architectures = (document[k] for k in ("status", "variants", "architectures"))
    _require(status in STATUSES, path, f"status must be one of {', '.join(STATUSES)}", status)
    baseline = document["baseline"]
    _require(baseline in variants, path, f"baseline must be one of {', '.join(variants)}", baseline)
    name = document.get("protocol", "s-ib")
    _require(name in PROTOCOLS, path, f"protocol must be one of {', '.join(PROTOCOLS)}", name)
    protocol = PROTOCOLS[name]
    planned = []
    for entry in document["planned"]:
        good = isinstance(entry, list) and len(entry) == 3 and entry[0] in architectures and entry[1] in variants
        _require(good and _is_int(entry[2]), path, "planned must hold [arch, variant, seed] of the study", entry)
        planned.append(tuple(entry))

    found = [_network(file, protocol.mean) for file in sorted((out / "results").glob("[!.]*.json"))]
    known = [n for n in found if (n.key in planned if planned else n.arch in architectures and n.variant in variants)]
    rows, columns = list(architectures), list(variants)
    return Study(
        out=out,
        settings=document["settings"],
        variants=variants,
        # a name in words may become better after a study has run
        architectures={arch: ARCHITECTURES.get(arch, label) for arch, label in architectures.items()},
        environment=document["environment"],
        status=status,
        planned=tuple(planned),
        baseline=baseline,
        headline=document.get("headline", protocol.headline),
        control=document.get("control", protocol.control),
        protocol=protocol,
        networks=tuple(sorted(known, key=lambda n: (rows.index(n.arch), columns.index(n.variant), n.seed))),
        unplanned=tuple(n.key for n in found if n not in known),
        command=document.get("command", "sib-fast study"),
        step_seconds=document.get("step_seconds") or {},
    )


_STUDY_KEYS = {
    "settings": dict,
    "variants": dict,
    "architectures": dict,
    "environment": dict,
    "status": str,
    "planned": list,
    "baseline": str,
}
_BLOCKS = ("accuracy", "explanations", "vjp", "terms", "evidence", "background")


def _network(path: Path, mean: str) -> Network:
    record = _read(path)
    arch, variant, seed = (record.get(k) for k in ("arch", "variant", "seed"))
    for name, value in (("arch", arch), ("variant", variant)):
        _require(isinstance(value, str), path, f"{name} must be a string", value)
    _require(_is_int(seed), path, "seed must be an integer", seed)
    expected = f"{file_stem(arch, variant, seed)}.json"
    _require(path.name == expected, path, f"the file's name must be {expected}", path.name)
    settings = record.get("settings") or {}
    _require(isinstance(settings, dict), path, "settings must be an object", settings)
    values = dict(_numbers(path, record))
    for quantity in (IN_DISTRIBUTION, SHIFTED):
        value = values.get(quantity, math.nan)
        _require(math.isnan(value) or 0 <= value <= 1, path, f"{quantity.name} must be a share in [0, 1]", value)
    metrics = dict.fromkeys(q.metric for q in values if q.name == "explanation" and q.metric != "undefined")
    for metric in metrics:
        several = [values.get(explanation(method, metric), math.nan) for method in MEANS[mean]]
        values[explanation(mean, metric)] = math.fsum(several) / len(several)
    return Network(arch, variant, seed, values, settings, record.get("commit"))


def _numbers(path: Path, record: dict[str, Any]) -> Iterator[tuple[Quantity, float]]:
    blocks = {name: record.get(name) or {} for name in _BLOCKS}
    for name, block in blocks.items():
        _require(isinstance(block, dict), path, f"{name} must be an object", block)
    for name, value in blocks["accuracy"].items():
        yield Quantity(f"accuracy_{name}"), _number(path, f"accuracy.{name}", value)
    # the methods that we know in their own order, others after them
    methods = [*(m for m in METHODS if m in blocks["explanations"]), *(m for m in blocks["explanations"] if m not in METHODS)]
    for method in methods:
        scores = blocks["explanations"][method] or {}
        _require(isinstance(scores, dict), path, f"explanations.{method} must be an object", scores)
        for metric, value in scores.items():
            yield explanation(method, metric), _number(path, f"explanations.{method}.{metric}", value)
    for name, block in (("vjp", "vjp"), ("term", "terms"), ("evidence", "evidence"), ("background", "background")):
        for metric, value in blocks[block].items():
            yield Quantity(name, "", metric), _number(path, f"{block}.{metric}", value)
    for name, value in record.items():
        if name != "seed" and isinstance(value, int | float) and not isinstance(value, bool):
            yield Quantity(name), _number(path, name, value)


def _number(path: Path, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    _require(isinstance(value, int | float) and not isinstance(value, bool), path, f"{name} must be a number or null", value)
    return float(value) if math.isfinite(value) else math.nan


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"study: {path} must be JSON, got {error}") from error
    _require(isinstance(document, dict), path, "it must be a JSON object", document)
    return document


def _name(kind: type) -> str:
    return {dict: "an object", list: "a list", str: "a string"}[kind]


def _require(good: bool, path: Path, rule: str, got: Any) -> None:
    if not good:
        text = repr(got)
        raise ValueError(f"study: {path}: {rule}, got {text if len(text) <= 80 else text[:77] + '...'}")
