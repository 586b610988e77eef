"""Lightning: a LightningModule under Trainer.fit, validate and DDP strategies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="extra [lab]", exc_type=ImportError)

from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from sib_fast import SIBLoss  # noqa: E402
from sib_fast.integrations.lightning import SIBCallback  # noqa: E402
from sib_fast.testing.networks import conv_net  # noqa: E402
from tests.integrations.steps import WEIGHTS, assert_same_parameters, batches_of, explicit_steps  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]


class Module(lightning.LightningModule):
    """A user's module: nothing in it knows about S-IB."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.model = conv_net()
        self.criterion = criterion
        self.validated = []

    def training_step(self, batch, batch_idx):
        x, target = batch
        return self.criterion(self.model(x), target)

    def validation_step(self, batch, batch_idx):
        x, target = batch
        loss = self.criterion(self.model(x), target)
        self.validated.append((loss.item(), nn.functional.cross_entropy(self.model(x), target).item()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def trainer_of(tmp_path, **options):
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "logger": CSVLogger(tmp_path), "log_every_n_steps": 1,
    }  # fmt: skip
    return lightning.Trainer(**{**defaults, **options})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_trains_as_the_explicit_form_does(accumulate, tmp_path):
    module, batches = Module(SIBLoss(**WEIGHTS)), batches_of(4)
    trainer = trainer_of(tmp_path, callbacks=[SIBCallback()], accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(batches), loader(batches[:1]))
    assert_same_parameters(module.model, explicit_steps(batches, lr=0.1, every=accumulate))
    assert module.validated
    assert all(loss == base for loss, base in module.validated)
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    for term in ("loss", "base", "foreground", "background", "mask_area"):
        assert f"sib/{term}" in logged
    assert not module.criterion.attached


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_and_test_see_the_base_loss(inference_mode, tmp_path):
    module = Module(SIBLoss(**WEIGHTS))
    trainer_of(tmp_path, callbacks=[SIBCallback()], inference_mode=inference_mode).validate(
        module, loader(batches_of(1)), verbose=False
    )
    assert module.validated
    assert all(loss == base for loss, base in module.validated)


def test_a_checkpoint_of_the_module_loads_without_the_callback(tmp_path):
    module = Module(SIBLoss(**WEIGHTS))
    trainer = trainer_of(tmp_path, callbacks=[SIBCallback()])
    trainer.fit(module, loader(batches_of(1)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = Module(SIBLoss(**WEIGHTS))
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert_same_parameters(other.model, module.model)


def test_what_would_fail_is_refused_in_words(tmp_path):
    with pytest.raises(TypeError, match=r"SIBCallback: Module.criterion must be a SIBLoss, got CrossEntropyLoss"):
        trainer_of(tmp_path, callbacks=[SIBCallback()]).fit(Module(nn.CrossEntropyLoss()), loader(batches_of(1)))
    callback, module = SIBCallback(), Module(SIBLoss(**WEIGHTS))
    trainer = trainer_of(tmp_path, strategy=DDPStrategy(static_graph=True, process_group_backend="gloo"))
    with pytest.raises(RuntimeError, match=r"DDPStrategy\(static_graph=True\) must not be used"):
        callback.setup(trainer, module, "fit")
