"""One network on the photographs: its data, its training in one of several ways, its scores; for the gate and the study."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sib_fast
from sib_fast import EvidenceLoss, SIBLoss
from sib_fast.evidence import FORMS
from sib_fast.explain import explain
from sib_fast.explain.metrics import EnergyPointingGame
from sib_fast.lab.annotation import choose_annotated
from sib_fast.lab.datasets.cutouts import Cutouts
from sib_fast.lab.networks import LITE, NetworkSpec
from sib_fast.lab.pretrained import initialise, read_weights
from sib_fast.lab.results import commit, write_atomically
from sib_fast.lab.transforms import random_backgrounds
from sib_fast.masks import GivenMask

TRAINING, TESTS, EXPLAINED = 1200, 480, 240
CORRELATION = 0.95
METHODS = {"gradient": ("saliency", {}), "integrated": ("integrated_gradients", {"n_steps": 16, "internal_batch_size": 16})}
FORMS_OF_TESTS = ("correlated", "shifted", "grey")
_BATCH = 60


@dataclass(frozen=True)
class Setting:
    """A network and its training. maps: the names of the gate's feature maps; cells: their side."""

    arch: str
    init: str | None
    options: dict[str, Any]
    image_size: int
    epochs: int
    batch_size: int
    lr: float
    window: int
    maps: dict[str, str]
    lambdas: tuple[float, ...]


SETTINGS = {
    "lite0": Setting(LITE, "DEFAULT", {}, 128, 4, 32, 1e-3, 29, {"last": "act1", "block11": "blocks.11.act0"}, (1e3, 1e5, 1e7)),
    "small": Setting("small_conv_net", None, {"width": 16}, 64, 30, 32, 3e-3, 15, {"last": "features"}, (1e4, 1e6, 1e8)),
}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        term: "plain"; "sib"; "area", "share"; "backgrounds" (half of the images get another image's background); or what else a
            user would do: "unmasked" (S-IB's variance of the whole VJP), "rrr" (:class:`RightReasons`), "guidance"
            (:class:`Guidance`).
        at: a map of the setting. evidence: of the term. weight: of the term, lambda_bg of S-IB. mask: "own" or "true".
        annotated: share of the training images whose true mask is known. beside: with "backgrounds" beside the term.
    """

    term: str
    at: str | None = None
    evidence: str | None = None
    weight: float | None = None
    mask: str | None = None
    annotated: float = 1.0
    beside: bool = False

    @property
    def name(self) -> str:
        known = None if self.annotated == 1 else f"of{self.annotated:g}"
        beside = "backgrounds" if self.beside else None
        weight = None if self.weight is None else f"{self.weight:g}"
        parts = (self.term, self.mask, self.evidence, self.at, weight, known, beside)
        return "-".join(p for p in parts if p is not None)

    @property
    def given(self) -> bool:
        """Whether the loss gets the true masks."""
        return self.mask == "true" and self.term != "backgrounds"

    @property
    def replaces_backgrounds(self) -> bool:
        return self.beside or self.term == "backgrounds"


# ---- losses ---------------------------------------------------------------------------------------------------------


def criterion(variant: Variant, setting: Setting, model: nn.Module) -> nn.Module:
    weight = variant.weight
    if variant.term in ("plain", "backgrounds"):
        return nn.CrossEntropyLoss()
    if variant.term == "sib":
        return SIBLoss(1.0, weight, window_size=setting.window, objective="expm1").attach(model)
    if variant.term == "unmasked":
        return SIBLoss(0.0, weight, mask=lambda vjp: torch.zeros_like(vjp[:, :1]), objective="expm1").attach(model)
    if variant.term == "rrr":
        return RightReasons(weight)
    assert variant.at is not None
    at = setting.maps[variant.at]
    if variant.term == "guidance":
        return Guidance(model.get_submodule(at), weight)
    assert variant.evidence is not None
    form: str | Callable[[Tensor, Tensor], Tensor] = variant.evidence
    if variant.evidence == "rectified" and variant.at != "last":
        form = FORMS["rectified"]  # refused by name below non-linear layers, which is what is measured here
    masks = {}
    if variant.term == "share":
        # images without a known mask have the loss's own
        masks = {"mask": "given" if variant.given and variant.annotated == 1 else "density", "window_size": setting.window}
    return EvidenceLoss(variant.term, evidence=form, weight=weight, at=at, normalise_cotangent=True, **masks).attach(model)


def known_masks(mask: Tensor | GivenMask, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes: -> values [N, 1, H, W] and 1 or 0 [N], whether they are known, in the dtype of `like`."""
    values, known = mask if isinstance(mask, GivenMask) else (mask, torch.ones(len(mask), dtype=torch.bool))
    return values.to(like.dtype), known.to(like.dtype)


class _Penalised(nn.Module):
    """Cross entropy and a mean over the images with a known mask. terms: detached 0-d tensors of the latest call."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight, self.terms = weight, {}

    def combine(self, logits: Tensor, target: Tensor, values: Tensor, known: Tensor) -> Tensor:
        base, penalty = nn.functional.cross_entropy(logits, target), (values * known).sum() / known.sum().clamp_min(1)
        loss = base + self.weight * penalty
        self.terms = {"loss": loss.detach(), "base": base.detach(), "penalty": penalty.detach()}
        return loss


class RightReasons(_Penalised):
    """Right for the right reasons: the squared gradient of the summed log-probabilities, summed over the background.

    Source: Ross, Hughes and Doshi-Velez 2017.
    """

    def forward(self, logits: Tensor, target: Tensor, x: Tensor, mask: Tensor | GivenMask) -> Tensor:
        gradient = sib_fast.vjp_map(logits, x, scalar=lambda logits, _: logits.log_softmax(1).sum())
        values, known = known_masks(mask, gradient)
        return self.combine(logits, target, (gradient * (1 - values)).square().flatten(1).sum(1), known)


class Guidance(_Penalised):
    """Model Guidance's energy loss: the share of the positive attributions that lies on the background, attributions being input
    times gradient of the label's logit at a feature map, resized to the image.

    Source: Rao et al. 2023, who sum over a batch of 16 where this is a mean.
    """

    def __init__(self, module: nn.Module, weight: float):
        super().__init__(weight)
        self._map = torch.empty(0)
        self._handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output

    def remove(self) -> None:
        self._handle.remove()

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | GivenMask) -> Tensor:
        gradient = sib_fast.vjp_map(logits, self._map, "label_logit", target)
        attribution = (gradient * self._map).sum(1, keepdim=True)
        values, known = known_masks(mask, attribution)
        attribution = nn.functional.interpolate(attribution, values.shape[2:], mode="bilinear", align_corners=False).relu()
        inside, whole = ((attribution * part).flatten(1).sum(1) for part in (values, torch.ones_like(values)))
        return self.combine(logits, target, 1 - torch.where(whole < 1e-7, inside, inside / whole.clamp_min(1e-7)), known)


# ---- one network ----------------------------------------------------------------------------------------------------


def batches(data: list[Tensor], size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
    order = torch.randperm(len(data[0]), generator=generator)
    for chosen in order.split(size):
        if len(chosen) == size:
            yield [values[chosen] for values in data]


def tensors(data: Cutouts, spec: NetworkSpec) -> list[Tensor]:
    """All of a set, normalised for the network."""
    images, labels, masks = zip(*(data[i] for i in range(len(data))), strict=True)
    return [spec.normalise(data.denormalise(torch.stack(images))), torch.stack(labels), torch.stack(masks)]


def train(name: str, variant: Variant, seed: int, root: Path, epoch_done: Callable[[int], None] = lambda _: None) -> tuple:
    """Returns: the model in eval mode, its spec, seconds of CPU in the steps, steps, means of the last epoch's terms."""
    setting = SETTINGS[name]
    data = Cutouts(root, "train", setting.image_size, size=TRAINING, correlation=CORRELATION, seed=seed, split_seed=seed)
    weights = None if setting.init is None else read_weights(setting.init, setting.arch)
    mean, std = (data.mean, data.std) if weights is None or weights.mean is None else (weights.mean, weights.std)
    spec = NetworkSpec(setting.arch, data.classes, setting.image_size, mean, std, setting.options)
    torch.manual_seed(seed)
    model = spec.build()
    if weights is not None:
        initialise(model, spec, weights)
    sib_fast.prepare(model).to(memory_format=torch.channels_last).train()
    loss_of = criterion(variant, setting, model)
    known = torch.zeros(len(data), dtype=torch.bool)
    known[sorted(choose_annotated(data.labels, variant.annotated, seed))] = True
    everything = [*tensors(data, spec), known]
    steps = setting.epochs * (TRAINING // setting.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setting.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    begin, sums = time.process_time(), {}
    for epoch in range(setting.epochs):
        sums = {}
        for images, labels, masks, known in batches(everything, setting.batch_size, generator):
            given = masks if variant.annotated == 1 else GivenMask(masks, known)
            if variant.replaces_backgrounds:
                images = random_backgrounds(images, given, 0.5, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            more = {"mask": given} if variant.given else {}
            if isinstance(loss_of, RightReasons):
                more["x"] = images = sib_fast.vjp_leaf(images)
            loss = loss_of(model(images), labels, **more)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            terms = getattr(loss_of, "terms", None) or {"loss": loss.detach()}
            for term, value in terms.items():
                sums[term] = sums.get(term, 0.0) + float(value)
        epoch_done(epoch + 1)
    seconds = time.process_time() - begin
    if hasattr(loss_of, "remove"):
        loss_of.remove()
    sib_fast.restore(model).eval()
    count = TRAINING // setting.batch_size
    return model, spec, seconds, steps, {term: value / count for term, value in sums.items()}


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(_BATCH)])


def score(model: nn.Module, spec: NetworkSpec, setting: Setting, seed: int, root: Path, explained: int) -> dict[str, Any]:
    """Accuracies on three forms of the same tests, and where explanations of the first shifted ones lie."""
    common = {"size": TESTS, "correlation": CORRELATION, "seed": seed, "split_seed": seed}
    data = {form: Cutouts(root, "test", setting.image_size, backgrounds=form, **common) for form in FORMS_OF_TESTS}
    sets = {form: tensors(images, spec) for form, images in data.items()}
    right = {form: predictions(model, images) == labels for form, (images, labels, _) in sets.items()}
    labels = sets["shifted"][1]
    by_class = {spec.classes[k]: right["shifted"][labels == k].double().mean().item() for k in range(len(spec.classes))}
    images, labels, masks = (values[:explained] for values in sets["shifted"])
    images = images.contiguous(memory_format=torch.channels_last)  # the network's layout
    # a map that knows nothing of its image: uniform, and the mean mask of the tests, which knows where objects are likely
    prior = masks.float().mean(0, keepdim=True).expand_as(masks)
    energy = {"uniform": inside(torch.ones_like(prior), masks), "mean_mask": inside(prior, masks)}
    energy |= {f"mean_mask_{n}": inside(coarse(prior, model, images, at), masks) for n, at in setting.maps.items()}
    for name, (method, options) in METHODS.items():
        energy[name] = inside(explanations(model, images, labels, method, **options), masks)
    for name, at in setting.maps.items():
        energy[f"cam_{name}"] = inside(explanations(model, images, labels, "grad_cam", layer=at), masks)
    return {
        "accuracy": {form: values.double().mean().item() for form, values in right.items()},
        "by_class": by_class,
        "worst_class": min(by_class.values()),
        "energy": energy,
        "objects": [group_of(composite.object, root) for composite in data["shifted"].composites],
        "right": {form: "".join(str(int(value)) for value in values) for form, values in right.items()},
    }


def group_of(path: str, root: Path) -> str:
    """An object's class and group, which is its file where it is in none."""
    return "/".join(Path(path).relative_to(root / "objects").parts[:2])


def explanations(model: nn.Module, images: Tensor, labels: Tensor, method: str, **options: Any) -> Tensor:
    parts = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return torch.cat([explain(model, x, y, method, **options) for x, y in parts])


def inside(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean energy inside over the images where there is a map, and how many there are not."""
    scores = EnergyPointingGame().scores(maps, masks)
    defined = scores[~scores.isnan()]
    return {"mean": defined.mean().item() if len(defined) else math.nan, "undefined": int(scores.isnan().sum())}


def coarse(prior: Tensor, model: nn.Module, images: Tensor, at: str) -> Tensor:
    """The mean mask as a CAM at this map could show it: averaged to its cells and resized as CAMs are."""
    sizes: list[torch.Size] = []
    handle = model.get_submodule(at).register_forward_hook(lambda _, __, output: sizes.append(output.shape[2:]))
    with torch.no_grad():
        model(images[:2])
    handle.remove()
    cells = nn.functional.adaptive_avg_pool2d(prior, tuple(sizes[0]))
    return nn.functional.interpolate(cells, size=prior.shape[2:], mode="bilinear", align_corners=False)


def run_network(
    name: str,
    variant: Variant,
    seed: int,
    root: Path,
    out: Path,
    explained: int | None = None,
    more: Callable[[nn.Module, NetworkSpec], dict[str, Any]] = lambda model, spec: {},
) -> dict[str, Any]:
    """Train one and write its record. more: what is asked of the network beside."""
    begin = time.perf_counter()
    model, spec, seconds, steps, terms = train(name, variant, seed, root)
    record = {
        "setting": name,
        "variant": variant.name,
        "seed": seed,
        "options": asdict(variant),
        **score(model, spec, SETTINGS[name], seed, root, EXPLAINED if explained is None else explained),
        **more(model, spec),
        "terms": terms,
        "cpu_seconds": seconds,
        "steps": steps,
        "wall_seconds": time.perf_counter() - begin,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
    write_atomically(path_of(out, name, variant, seed), (json.dumps(record, indent=1) + "\n").encode())
    return record


# ---- all of them ----------------------------------------------------------------------------------------------------


Records = dict[tuple[str, str, int], dict[str, Any]]
"""By setting, name of the variant and seed."""


def path_of(out: Path, name: str, variant: Variant, seed: int) -> Path:
    return out / f"{name}-{variant.name}-{seed}.json"


def load(out: Path) -> Records:
    records = (json.loads(path.read_text()) for path in sorted(out.glob("*.json")))
    return {(r["setting"], r["variant"], r["seed"]): r for r in records}


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process is the one to make a result: it holds a lock, which the system takes from it when it dies."""
    mark = path.with_suffix(".running")
    with mark.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield not path.exists()  # it may have been made between the look and the claim
        finally:
            mark.unlink(missing_ok=True)


def run(
    plan: Iterable[tuple[str, Variant, int]],
    out: Path,
    only: str,
    seeds: Iterable[int],
    network: Callable[[str, Variant, int], dict[str, Any]],
) -> int:
    """One network after the other, those that are there or that another process makes left out."""
    out.mkdir(parents=True, exist_ok=True)
    for name, variant, seed in plan:
        path = path_of(out, name, variant, seed)
        if path.exists() or seed not in seeds or not re.search(only, path.stem):
            continue
        with claim(path) as ours:
            if ours:
                record = network(name, variant, seed)
                accuracy = "  ".join(f"{form} {value:.3f}" for form, value in record["accuracy"].items())
                print(f"{path.stem}: {accuracy}  {record['cpu_seconds']:.0f} CPU s", flush=True)
    return 0


def parse(doc: str | None, out: Path, seeds: tuple[int, ...], argv: list[str] | None, gate: bool = False) -> argparse.Namespace:
    """Of ``run`` and ``report``; for ``run`` torch is as the networks need it afterwards. gate: its records are needed too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=out)
        if gate:
            command.add_argument("--gate", type=Path, required=True, help="the folder of the gate's records")
        if name == "run":
            command.add_argument("--root", type=Path, required=True, help="the folder that tools/photographs.py made")
            command.add_argument("--only", default="", help="a regular expression of results' names, e.g. lite0-plain")
            command.add_argument("--seeds", type=int, nargs="+", default=seeds)
            command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.command == "run":
        torch.set_num_threads(args.threads)
        warnings.filterwarnings("ignore", message=".*cells, fewer than.*")  # the 4×4 cells of 128 pixels are what is compared
    return args
