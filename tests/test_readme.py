"""What the README shows must run, and what pages link to must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sib_fast.testing.networks import conv_net, image_batch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WITH_PAGES = ("docs", "examples", "sib_fast", "benchmarks")
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for folder in WITH_PAGES for path in sorted((ROOT / folder).rglob("*.md")))]


def test_the_lines_that_train_run():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = conv_net()
    printed = []
    names = {
        "model": model,
        "loader": [image_batch()],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "print": printed.append,
    }
    exec(block, names)
    assert printed[0].keys() == {"loss", "base", "foreground", "background", "mask_area"}
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_link_to_exist(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    linked = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text)
    assert page != "README.md" or len(linked) > 8, "the search itself must find something"
    assert [path for path in linked if not ((ROOT / page).parent / path).exists()] == []
