"""Training in memory, as the study does it."""

import csv
import signal

import pytest
import torch

pytest.importorskip("lightning")
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.fit import fit
from sib_fast.lab.models import SmallConvNet


def fit_tiny(data, tmp_path, **options):
    model = SmallConvNet(width=2)
    arguments = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.0, "seed": 0, "device": "cpu"}
    return fit(model, torch.nn.CrossEntropyLoss(), data, **arguments | options, log_folder=tmp_path / "log")


def test_fit_counts_its_steps_and_logs_its_terms(tmp_path):
    steps, seconds, terms = fit_tiny(EmbeddedDigits("train", 12, seed=0), tmp_path, epochs=2)
    assert steps == 6
    assert seconds > 0
    with (tmp_path / "log" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["loss"]) == pytest.approx(terms["loss"])


def test_fits_terms_are_means_over_their_epoch(tmp_path):
    class Counting(torch.nn.Module):
        """The loss is the number of the call."""

        calls = 0

        def forward(self, logits, target):
            self.calls += 1
            return 0 * logits.sum() + self.calls

    data = EmbeddedDigits("train", 12, seed=0)
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.0, "seed": 0, "device": "cpu"}
    _, _, terms = fit(SmallConvNet(width=2), Counting(), data, **options, log_folder=tmp_path / "log")
    assert terms["loss"] == 5.0  # of the calls 4, 5 and 6
    with (tmp_path / "log" / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [2.0, 5.0]


def test_interrupt_inside_lightning_arrives_as_one_and_the_next_interrupt_still_works(tmp_path):
    class Interrupting(EmbeddedDigits):
        def __getitem__(self, index):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_tiny(Interrupting("train", 8, seed=0), tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
