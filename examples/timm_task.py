"""timm through its task API: `python examples/timm_task.py`."""

import argparse

import timm.optim
import torch
from torch.utils.data import DataLoader

import sib_fast
from sib_fast.integrations.timm import SIBTask
from sib_fast.lab.data import EmbeddedDigits


def main(steps: int = 60, batch_size: int = 32) -> dict[str, float]:
    torch.manual_seed(0)
    loader = DataLoader(EmbeddedDigits("train", steps * batch_size), batch_size, shuffle=True, drop_last=True)
    model = timm.create_model("resnet10t", num_classes=10)
    task = SIBTask(model, sib_fast.SIBLoss(1.0, 1e4, window_size=7))  # S-IB: was ClassificationTask(model)
    task.setup_ema(decay=0.99)
    optimizer = timm.optim.create_optimizer_v2(task, opt="adamw", lr=2e-3)
    task.train()
    for step, (x, target, _) in enumerate(loader):
        result = task(x, target)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        task.update_ema(step)
        if step % 20 == 0:
            print(step, {name: f"{value.item():.3g}" for name, value in result.items() if name != "output"})
    return {name: value.item() for name, value in result.items() if name != "output"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
