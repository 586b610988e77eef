"""What the README shows must run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import sib_fast
from sib_fast.testing.networks import conv_net, image_batch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    logged = []
    model = conv_net()
    x, target = image_batch()
    names = {"sib_fast": sib_fast, "model": model, "loader": [(x, target)], "log": logged.append}
    exec(blocks[0], names)
    assert logged[0].keys() == {"loss", "base", "foreground", "background", "mask_area"}
    assert all(p.grad is not None for p in model.parameters())
    leaf = x.clone().requires_grad_()
    names |= {"x": leaf, "logits": conv_net()(leaf)}
    exec(blocks[1], names)
    assert names["mask"].shape == (x.shape[0], 1, *x.shape[2:])
    assert torch.isfinite(names["fg"] + names["bg"])


def test_files_that_it_names_exist():
    root = Path(__file__).parent.parent
    linked = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(linked) > 8
    assert [path for path in linked if not (root / path).exists()] == []
