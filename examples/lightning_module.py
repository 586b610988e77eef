"""Lightning: a module that knows nothing of S-IB, and a callback: `python examples/lightning_module.py`."""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader

import sib_fast
from sib_fast.integrations.lightning import SIBCallback
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.models import SmallConvNet


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = SmallConvNet()
        self.criterion = sib_fast.SIBLoss(1.0, 1e5, window_size=7)  # S-IB: was nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, target, _ = batch
        return self.criterion(self.model(x), target)

    def validation_step(self, batch, batch_idx):
        x, target, _ = batch
        self.log("val_loss", self.criterion(self.model(x), target), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=2e-3)


def main(steps: int = 200, batch_size: int = 32, **trainer_options) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    train = DataLoader(EmbeddedDigits("train", steps * batch_size), batch_size, shuffle=True, drop_last=True)
    test = DataLoader(EmbeddedDigits("test", 4 * batch_size), batch_size)
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, "log_every_n_steps": 10, **trainer_options}
    trainer = lightning.Trainer(callbacks=[SIBCallback()], **options)  # S-IB
    trainer.fit(Classifier(), train, test)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print({name: f"{value:.3g}" for name, value in logged.items()})
    return logged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
