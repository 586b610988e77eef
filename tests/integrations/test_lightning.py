"""Lightning: a LightningModule under Trainer.fit, validate and DDP strategies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="extra [lab]", exc_type=ImportError)

from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from sib_fast import EvidenceLoss, SIBLoss  # noqa: E402
from sib_fast.integrations.lightning import SIBCallback  # noqa: E402
from sib_fast.testing.networks import conv_net  # noqa: E402
from tests.integrations.steps import WEIGHTS, assert_same_parameters, batches_of, explicit_steps  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),  # Lightning's own, of any part
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


@pytest.mark.filterwarnings("ignore:.*fewer than 7×7")
def test_fit_with_evidence_alone(tmp_path):
    module, batches = Module(EvidenceLoss("share", window_size=5)), batches_of(4)
    trainer_of(tmp_path, callbacks=[SIBCallback()], accumulate_grad_batches=2).fit(module, loader(batches))
    wanted = explicit_steps(batches, lr=0.1, every=2, criterion=EvidenceLoss("share", window_size=5))
    assert_same_parameters(module.model, wanted)
    assert "sib/share" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


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


# ---- a model in eval mode, which Lightning keeps -----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "criterion", "both"])
def test_fit_in_eval_mode_warns_and_trains_the_base_loss(part, tmp_path):
    module, plain = Module(SIBLoss(**WEIGHTS)), Module(nn.CrossEntropyLoss())
    {"model": module.model, "criterion": module.criterion, "both": module}[part].eval()
    plain.model.train(part == "criterion")
    with pytest.warns(UserWarning, match="SIBCallback: criterion and model must be in training mode .*eval mode") as seen:
        trainer_of(tmp_path, callbacks=[SIBCallback(fast=False)]).fit(module, loader(batches_of(2)))
    assert sum("base loss alone" in str(w.message) for w in seen) == 1
    trainer_of(tmp_path).fit(plain, loader(batches_of(2)))
    assert_same_parameters(module.model, plain.model)


def test_fit_with_frozen_batch_norm(tmp_path):
    module, batches = Module(SIBLoss(**WEIGHTS, train_in_eval_mode=True)), batches_of(3)
    module.model.eval()
    trainer_of(tmp_path, callbacks=[SIBCallback()]).fit(module, loader(batches), loader(batches[:1]))
    assert_same_parameters(module.model, explicit_steps(batches, lr=0.1, training=False))
    assert all(loss == base for loss, base in module.validated)


# ---- what a step is -----------------------------------------------------------------------------------------------------


class Watched(Module):
    """Keeps what every training call applied, with the step that Lightning was in. optimiser: "sgd", "lbfgs" or "by hand"."""

    def __init__(self, criterion: nn.Module, optimiser: str = "sgd") -> None:
        super().__init__(criterion)
        self.applied, self.optimiser = [], optimiser
        self.automatic_optimization = optimiser != "by hand"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.applied.append((self.trainer.global_step, "foreground" in self.criterion.terms))
        if self.automatic_optimization:
            return loss
        super().training_step(batch, batch_idx)
        self.applied.append((self.trainer.global_step, "foreground" in self.criterion.terms))
        self.optimizers().step()
        return None

    def configure_optimizers(self):
        if self.optimiser == "lbfgs":
            return torch.optim.LBFGS(self.model.parameters(), lr=0.01, max_iter=3)
        return super().configure_optimizers()


@pytest.mark.parametrize(("optimiser", "accumulate"), [("sgd", 2), ("lbfgs", 1), ("by hand", 1)])
def test_the_terms_apply_at_every_kth_step_of_lightnings(optimiser, accumulate, tmp_path):
    module = Watched(SIBLoss(**WEIGHTS, every=2), optimiser)
    trainer = trainer_of(tmp_path, callbacks=[SIBCallback()], accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(batches_of(3 * accumulate)), loader(batches_of(1)))
    assert {step for step, _ in module.applied} == {0, 1, 2}
    assert all(applied == (step % 2 == 0) for step, applied in module.applied)
    assert len(module.applied) >= 6  # several calls a step
    assert int(module.criterion.state_dict()["calls"]) == 3


def test_accumulation_steps_of_the_criterion_are_left_alone(tmp_path):
    module = Watched(SIBLoss(**WEIGHTS, every=2, accumulation_steps=2))
    trainer_of(tmp_path, callbacks=[SIBCallback()], accumulate_grad_batches=2).fit(module, loader(batches_of(6)))
    assert [applied for _, applied in module.applied] == [True, True, False, False, True, True]


def test_a_step_that_raised_is_not_counted(tmp_path):
    class Fails(Watched):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    module, callback = Fails(SIBLoss(**WEIGHTS, every=2)), SIBCallback()
    callback.on_train_batch_end = lambda *_: None  # the module's own hook fails before the step is over
    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, callbacks=[callback]).fit(module, loader(batches_of(1)))
    assert module.criterion.state_dict()["calls"] == 0
    assert module.criterion._open_step is None


def test_what_would_fail_is_refused_in_words(tmp_path):
    with pytest.raises(TypeError, match=r"SIBCallback: Module.criterion must be a SIBLoss or EvidenceLoss, got CrossEntropyLoss"):
        trainer_of(tmp_path, callbacks=[SIBCallback()]).fit(Module(nn.CrossEntropyLoss()), loader(batches_of(1)))
    callback, module = SIBCallback(), Module(SIBLoss(**WEIGHTS))
    trainer = trainer_of(tmp_path, strategy=DDPStrategy(static_graph=True, process_group_backend="gloo"))
    with pytest.raises(RuntimeError, match=r"DDPStrategy\(static_graph=True\) must not be used"):
        callback.setup(trainer, module, "fit")
