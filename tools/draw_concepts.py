"""Draws docs/images/concepts.png: `python tools/draw_concepts.py` (a few minutes on one core; needs the extra `lab`).

Two small networks of one seed, one trained plainly and one with S-IB, as the study trains them. For one image of the shifted test
set: what the concepts' page speaks of, as the package computes it. The photograph is scikit-image's `chelsea` (CC0).
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sib_fast
from sib_fast.evidence import FORMS
from sib_fast.explain import find_layer
from sib_fast.lab.data import EmbeddedDigits, denormalise
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.results import write_atomically

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "concepts.png"
SEED, EPOCHS, BATCH, WINDOW = 100, 50, 32, 7
WEIGHTS = {"plain": None, "S-IB": (1.0, 1e6)}  # docs/study/protocol.md
COLUMNS = ("image", "VJP", "mask", "foreground", "background", "evidence map")
SHOWN = 5  # the first image of this class


def trained(weights: tuple[float, float] | None) -> nn.Module:
    torch.manual_seed(SEED)
    model = sib_fast.prepare(SmallConvNet())
    criterion: nn.Module = nn.CrossEntropyLoss()
    if weights:
        criterion = sib_fast.SIBLoss(*weights, objective="expm1", window_size=WINDOW).attach(model)
    loader = DataLoader(EmbeddedDigits("train", 512, seed=SEED), BATCH, shuffle=True, drop_last=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for x, target, _ in loader:
            loss = criterion(model(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    if weights:
        criterion.remove()
    return model.eval()


def maps(model: nn.Module, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """VJP, mask and evidence map of one image."""
    features: list[Tensor] = []
    with find_layer(model, x).register_forward_hook(lambda module, args, out: features.append(out)):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
    vjp = sib_fast.vjp_map(logits, leaf)
    at_features = sib_fast.vjp_map(logits, features[0], scalar="label_logit", labels=label)
    evidence = FORMS["rectified"](at_features, features[0])
    return tuple(map_.detach()[0] for map_ in (vjp, sib_fast.foreground_mask(vjp, window_size=WINDOW), evidence))


def main() -> None:
    images = EmbeddedDigits("test", 200, correlation=0.0, seed=SEED)
    x, label, _ = next(images[i] for i in range(len(images)) if int(images[i][1]) == SHOWN)
    x, label = x[None], torch.as_tensor(label)[None]
    picture = denormalise(x[0]).permute(1, 2, 0).clamp(0, 1)
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    axes = figure.subplots(len(WEIGHTS), len(COLUMNS))
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=10)
    for row, (name, weights) in zip(axes, WEIGHTS.items(), strict=True):
        vjp, mask, evidence = maps(trained(weights), x, label)
        mask = mask[0, :, :, None]
        shown = (picture, vjp.mean(0).abs(), mask[..., 0], picture * mask, picture * (1 - mask), evidence[0])
        for axis, values, title in zip(row, shown, COLUMNS, strict=True):
            limits = {"vmin": 0, "vmax": 1} if title == "mask" else {}
            axis.imshow(values.numpy(), cmap="magma", interpolation="nearest", **limits)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomically(OUT, file.getvalue())


if __name__ == "__main__":
    main()
