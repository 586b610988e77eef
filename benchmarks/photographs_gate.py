"""The gate before a study on photographs: does any term on input gradients or evidence maps gain on shifted backgrounds?

    python tools/photographs.py                                             # the data, once
    python -m benchmarks.photographs_gate run --root ~/.cache/sib_fast/photographs --out runs/gate
    python -m benchmarks.photographs_gate run --out runs/gate --only plain --root …   # some of them
    python -m benchmarks.photographs_gate report --out runs/gate            # tables and the rules' verdicts, at any time

One network after the other in the order of docs/photographs/gate.md, one JSON file each, written when it is done: killed at any
moment, `run` goes on with the network that was running. Several processes may work on one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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
from sib_fast.lab.datasets.cutouts import Cutouts
from sib_fast.lab.networks import LITE, NetworkSpec
from sib_fast.lab.pretrained import initialise, read_weights
from sib_fast.lab.results import commit, write_atomically
from sib_fast.lab.transforms import random_backgrounds

SEEDS = (0, 1)
TRAINING, TESTS, EXPLAINED = 1200, 480, 240
CORRELATION = 0.95
METHODS = {"gradient": ("saliency", {}), "integrated": ("integrated_gradients", {"n_steps": 16, "internal_batch_size": 60})}
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
        term: "plain", "sib", "area", "share" or "backgrounds" (half of the images get another image's background).
        at: a map of the setting. evidence: of the term. weight: of the term, lambda_bg of S-IB. mask: "own" or "true".
    """

    term: str
    at: str | None = None
    evidence: str | None = None
    weight: float | None = None
    mask: str | None = None

    @property
    def name(self) -> str:
        parts = (self.term, self.mask, self.evidence, self.at, None if self.weight is None else f"{self.weight:g}")
        return "-".join(p for p in parts if p is not None)

    @property
    def given(self) -> bool:
        return self.mask == "true" and self.term != "backgrounds"


def first_variants(setting: Setting) -> list[Variant]:
    """What runs in any case, in this order: the frame first, then forms with masks, then those without."""
    variants = [Variant("plain"), Variant("backgrounds", mask="true")]
    for at in setting.maps:
        variants += [Variant("share", at, form, 1.0, "true") for form in forms_at(at)]
    for at in setting.maps:
        # without an annotation one form is enough to see whether there is anything: the one that is safe at this map
        variants += [Variant("share", at, "rectified" if at == "last" else "absolute", 1.0, "own")]
        variants += [Variant("area", at, "rectified" if at == "last" else "absolute", 1.0)]
    return variants + [Variant("sib", weight=weight) for weight in setting.lambdas]


def forms_at(at: str) -> tuple[str, ...]:
    """Before an average pooling and a linear layer R is the same in every cell, so that its square has no place to be."""
    return tuple(form for form in FORMS if not (form == "squared" and at == "last"))


def further_variants(variant: Variant) -> list[Variant]:
    """The higher weights of a form with true masks."""
    if variant.term != "share" or variant.mask != "true" or variant.weight != 1.0:
        return []
    return [Variant(variant.term, variant.at, variant.evidence, weight, variant.mask) for weight in (3.0, 10.0)]


def criterion(variant: Variant, setting: Setting, model: nn.Module) -> nn.Module:
    if variant.term in ("plain", "backgrounds"):
        return nn.CrossEntropyLoss()
    if variant.term == "sib":
        return SIBLoss(1.0, variant.weight, window_size=setting.window, objective="expm1").attach(model)
    assert variant.at is not None
    assert variant.evidence is not None
    form: str | Callable[[Tensor, Tensor], Tensor] = variant.evidence
    if variant.evidence == "rectified" and variant.at != "last":
        form = FORMS["rectified"]  # refused by name below non-linear layers, which is what is measured here
    masks = {} if variant.term == "area" else {"mask": "given" if variant.given else "density", "window_size": setting.window}
    at = setting.maps[variant.at]
    return EvidenceLoss(variant.term, evidence=form, weight=variant.weight, at=at, **masks).attach(model)


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
    everything = tensors(data, spec)
    steps = setting.epochs * (TRAINING // setting.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setting.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    begin, sums = time.process_time(), {}
    for epoch in range(setting.epochs):
        sums = {}
        for images, labels, masks in batches(everything, setting.batch_size, generator):
            if variant.term == "backgrounds":
                images = random_backgrounds(images, masks, 0.5, generator)
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = loss_of(logits, labels, **({"mask": masks} if variant.given else {}))
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
    sib_fast.restore(model).to(memory_format=torch.contiguous_format).eval()
    count = TRAINING // setting.batch_size
    return model, spec, seconds, steps, {term: value / count for term, value in sums.items()}


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(_BATCH)])


def score(model: nn.Module, spec: NetworkSpec, setting: Setting, seed: int, root: Path) -> dict[str, Any]:
    """Accuracies on three forms of the same tests, and where explanations of the shifted ones lie."""
    common = {"size": TESTS, "correlation": CORRELATION, "seed": seed, "split_seed": seed}
    sets = {
        form: tensors(Cutouts(root, "test", setting.image_size, backgrounds=form, **common), spec)
        for form in ("correlated", "shifted", "grey")
    }
    right = {form: predictions(model, images) == labels for form, (images, labels, _) in sets.items()}
    labels = sets["shifted"][1]
    by_class = {spec.classes[k]: right["shifted"][labels == k].double().mean().item() for k in range(len(spec.classes))}
    images, labels, masks = (values[:EXPLAINED] for values in sets["shifted"])
    # a map that knows nothing of its image: uniform, and the mean mask of the tests, which knows where objects are likely
    prior = masks.float().mean(0, keepdim=True).expand_as(masks)
    energy = {"uniform": inside(torch.ones_like(prior), masks), "mean_mask": inside(prior, masks)}
    energy |= {f"mean_mask_{n}": inside(coarse(prior, model, images, at), masks) for n, at in setting.maps.items()}
    for name, (method, options) in METHODS.items():
        energy[name] = inside(explained(model, images, labels, method, **options), masks)
    for name, at in setting.maps.items():
        energy[f"cam_{name}"] = inside(explained(model, images, labels, "grad_cam", layer=at), masks)
    return {
        "accuracy": {form: values.double().mean().item() for form, values in right.items()},
        "by_class": by_class,
        "worst_class": min(by_class.values()),
        "energy": energy,
    }


def explained(model: nn.Module, images: Tensor, labels: Tensor, method: str, **options: Any) -> Tensor:
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


def run_network(name: str, variant: Variant, seed: int, root: Path, out: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    model, spec, seconds, steps, terms = train(name, variant, seed, root)
    record = {
        "setting": name,
        "variant": variant.name,
        "seed": seed,
        "options": asdict(variant),
        **score(model, spec, SETTINGS[name], seed, root),
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


def path_of(out: Path, name: str, variant: Variant, seed: int) -> Path:
    return out / f"{name}-{variant.name}-{seed}.json"


def load(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    records = (json.loads(path.read_text()) for path in sorted(out.glob("*.json")))
    return {(r["setting"], r["variant"], r["seed"]): r for r in records}


def mean(records: dict, name: str, variant: str, *keys: str) -> float:
    """Over the selection seeds; NaN until all of them are there."""
    total = 0.0
    for seed in SEEDS:
        value: Any = records.get((name, variant, seed))
        for key in keys:
            value = None if value is None else value.get(key)
        total += math.nan if value is None else value
    return total / len(SEEDS)


def worth_more(records: dict, name: str, variant: Variant) -> bool:
    """Whether a form's higher weights run: not where weight 1 already costs 0.1 of the accuracy in distribution."""
    lost = mean(records, name, "plain", "accuracy", "correlated") - mean(records, name, variant.name, "accuracy", "correlated")
    return lost < 0.1


def plan(out: Path) -> Iterator[tuple[str, Variant, int]]:
    """The networks in their order, as far as what is done says which there are."""
    for name, setting in SETTINGS.items():
        for variant in first_variants(setting):
            for seed in SEEDS:
                yield name, variant, seed
    for name, setting in SETTINGS.items():
        for first in first_variants(setting):
            for variant in further_variants(first):
                for seed in SEEDS:
                    if worth_more(load(out), name, first):
                        yield name, variant, seed


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


def run(root: Path, out: Path, only: str, seeds: tuple[int, ...]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for name, variant, seed in plan(out):
        path = path_of(out, name, variant, seed)
        if path.exists() or seed not in seeds or not re.search(only, path.stem):
            continue
        with claim(path) as ours:
            if ours:
                record = run_network(name, variant, seed, root, out)
                accuracy = "  ".join(f"{form} {value:.3f}" for form, value in record["accuracy"].items())
                print(f"{path.stem}: {accuracy}  {record['cpu_seconds']:.0f} CPU s", flush=True)
    return 0


def verdicts(records: dict) -> list[str]:
    """The stop rules of docs/photographs/gate.md on what is there."""
    lines = []
    for name in SETTINGS:
        variants = sorted({v for n, v, _ in records if n == name})
        options = {v: next(r["options"] for (n, w, _), r in records.items() if (n, w) == (name, v)) for v in variants}

        def gain(variant: str, *keys: str, name: str = name) -> float:
            return mean(records, name, variant, *keys) - mean(records, name, "plain", *keys)

        def greatest(values: dict[str, float]) -> tuple[str, float]:
            known = {v: value for v, value in values.items() if not math.isnan(value)}
            return max(known.items(), key=lambda item: item[1]) if known else ("none yet", math.nan)

        free = {v: gain(v, "accuracy", "shifted") for v in variants if options[v]["mask"] != "true" and v != "plain"}
        best, value = greatest(free)
        lines.append(f"{name}: without masks the best shifted gain is {value:+.3f} ({best})")
        masked = [v for v in variants if options[v]["mask"] == "true" and options[v]["term"] == "share"]
        best, value = greatest({v: gain(v, "accuracy", "shifted") for v in masked})
        lines.append(f"{name}: with true masks the best shifted gain is {value:+.3f} ({best})")
        energies = {v: max(gain(v, "energy", m, "mean") for m in METHODS) for v in masked}
        best, value = greatest(energies)
        lines.append(f"{name}: with true masks the best gain of an energy that no term optimises is {value:+.3f} ({best})")
    return lines


def report(out: Path) -> int:
    records = load(out)
    for name, setting in SETTINGS.items():
        columns = ["uniform", "mean_mask", *METHODS, *(f"{c}_{m}" for m in setting.maps for c in ("mean_mask", "cam"))]
        print(f"\n| {name} | networks | in distribution | shifted | worst class | grey | {' | '.join(columns)} | CPU s |")
        print("|---" * (len(columns) + 7) + "|")
        variants = list(dict.fromkeys(v for n, v, _ in records if n == name))
        for variant in sorted(variants, key=lambda v: (v != "plain", v)):
            found = [r for (n, v, _), r in records.items() if (n, v) == (name, variant)]

            def cell(*keys: str, found: list = found) -> str:
                values = []
                for value in found:
                    for key in keys:
                        value = value[key]
                    values.append(value)
                return " · ".join(f"{v:.0f}" if keys == ("cpu_seconds",) else f"{v:.3f}" for v in values)

            accuracies = [cell("accuracy", f) for f in ("correlated", "shifted")]
            accuracies += [cell("worst_class"), cell("accuracy", "grey")]
            energies = [cell("energy", c, "mean") for c in columns]
            print(f"| {variant} | {len(found)} | {' | '.join([*accuracies, *energies])} | {cell('cpu_seconds')} |")
    print()
    print("\n".join(verdicts(records)))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path("runs/photographs-gate"))
        if name == "run":
            command.add_argument("--root", type=Path, required=True, help="the folder that tools/photographs.py made")
            command.add_argument("--only", default="", help="a regular expression of results' names, e.g. lite0-plain")
            command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
            command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.command == "report":
        return report(args.out)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*cells, fewer than.*")  # the 4×4 cells of 128 pixels are what is compared
    return run(args.root, args.out, args.only, tuple(args.seeds))


if __name__ == "__main__":
    sys.exit(main())
