"""docs/trainers.md and examples/: what they show runs."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sib_fast
from sib_fast import prepare
from sib_fast.testing.networks import conv_net
from tests.integrations.steps import assert_same_parameters, batches_of, explicit_steps

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trainers.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
NEEDS = {
    "timm": ["timm.task"],
    "Lightning": ["lightning"],
    "Hugging Face": ["transformers", "accelerate"],
    "Accelerate": ["accelerate"],
}
FROZEN, SEVERAL_CALLS = "Fine-tuning with frozen batch norm", "Steps of several calls: LBFGS, SAM, a mixup of two losses"
ALONE, BESIDE = "Evidence terms: `EvidenceLoss`", "S-IB together with an evidence term"
TERMS = {"base", "foreground", "background"}
# What the blocks of evidence terms have, by hand, and what is logged of it.
EVIDENCE = {
    ALONE: (lambda: sib_fast.EvidenceLoss("area"), {"loss", "base", "area", "evidence_dead"}),
    BESIDE: (
        lambda: sib_fast.SIBLoss(window_size=5, evidence=sib_fast.EvidenceTerm("share")),
        {"loss", *TERMS, "mask_area", "share", "evidence_dead", "object_cells"},
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_every_section_with_code_is_run():
    assert set(SECTIONS) == {
        "A loop of your own, torchvision's reference loop",
        "timm",
        "Lightning",
        "Hugging Face",
        "Accelerate",
        FROZEN,
        SEVERAL_CALLS,
        ALONE,
        BESIDE,
    }
    assert PAGE.count("```python") == len(SECTIONS)


def lbfgs_steps(batches):
    """What the block of LBFGS does, by hand: the terms in all calls of the first step, in none of the second."""
    net = prepare(conv_net())
    optimiser = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=3)
    criterion = sib_fast.SIBLoss(lambda_fg=2 * 0.01, lambda_bg=2 * 1000.0, window_size=5)
    for number, (x, target) in enumerate(batches):
        criterion.train(number % 2 == 0)

        def closure(x=x, target=target):
            optimiser.zero_grad()
            leaf = x.clone().requires_grad_()
            loss = criterion(net(leaf), target, leaf)
            loss.backward()
            return loss

        optimiser.step(closure)
    return net


@pytest.mark.parametrize("section", SECTIONS)
def test_the_block_trains_as_the_explicit_form_does(section, tmp_path, monkeypatch):
    for package in NEEDS.get(section, []):
        pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    model, batches, logged = conv_net(), batches_of(2), []
    names = {"sib_fast": sib_fast, "torch": torch, "model": model, "log": logged.append}
    names["loader"] = torch.utils.data.DataLoader(batches, batch_size=None)
    names["quiet"] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    names["quiet"]["enable_model_summary"] = False
    if section == "Hugging Face":
        from transformers import PretrainedConfig, Trainer

        from tests.integrations.test_huggingface import Classifier, rows_of, trainer_of

        in_order = torch.utils.data.SequentialSampler
        monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, *_: in_order(self.train_dataset))
        names["hf_model"] = Classifier(PretrainedConfig())
        names["rows"] = rows_of(batches)
        names["arguments"] = trainer_of(tmp_path, Classifier(PretrainedConfig()), names["rows"]).args
        model = names["hf_model"].body
    exec(SECTIONS[section], names)
    # The block of Accelerate does not prepare the model; every other way does.
    if section == SEVERAL_CALLS:
        wanted = lbfgs_steps(batches)
    elif section in EVIDENCE:
        wanted = explicit_steps(batches, lr=0.1, criterion=EVIDENCE[section][0]())
    else:
        wanted = explicit_steps(batches, lr=0.1, fast=section != "Accelerate", training=section != FROZEN, lambda_fg=0.01)
    assert_same_parameters(model, wanted)
    seen = {name.removeprefix("sib/") for name in logged[0]}
    assert seen >= TERMS if section not in EVIDENCE else seen == EVIDENCE[section][1], logged[0]


EXAMPLES = {
    "plain_loop": ["skimage"], "torchvision_loop": ["skimage", "torchvision"], "timm_task": ["skimage", "timm.task"],
    "lightning_module": ["skimage", "lightning"], "huggingface_trainer": ["skimage", "transformers", "accelerate"],
    "accelerate_loop": ["skimage", "accelerate"],
}  # fmt: skip


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "ddp"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, monkeypatch, tmp_path):
    for package in EXAMPLES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} if name == "lightning_module" else {}
    out = module.main(2, 8, **options)
    assert all(math.isfinite(value) for value in out.values() if isinstance(value, float))
    if name != "torchvision_loop":
        assert {key.removeprefix("sib/") for key in out} >= TERMS


@pytest.mark.long
def test_the_ddp_example():
    pytest.importorskip("skimage", exc_type=ImportError)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "examples/ddp.py",
        "--steps",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this tree, whatever is installed
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "foreground" in result.stdout
