"""torchvision: its ResNet-18 in the shape of its reference loop, evaluation included: `python examples/torchvision_loop.py`."""

import argparse

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import sib_fast
from sib_fast.lab.data import EmbeddedDigits


def train_one_epoch(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    for step, (image, target, _) in enumerate(loader):
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(step, {name: f"{value.item():.3g}" for name, value in criterion.terms.items()})


def evaluate(model: nn.Module, criterion: nn.Module, loader: DataLoader) -> tuple[float, float]:
    model.eval()
    losses, right, count = [], 0, 0
    with torch.inference_mode():
        for image, target, _ in loader:
            output = model(image)
            losses.append(criterion(output, target).item())  # the base loss: the criterion sees that this is no training
            right += (output.argmax(1) == target).sum().item()
            count += len(target)
    return sum(losses) / len(losses), right / count


def main(steps: int = 40, batch_size: int = 32) -> dict[str, float]:
    torch.manual_seed(0)
    train = DataLoader(EmbeddedDigits("train", steps * batch_size), batch_size, shuffle=True, drop_last=True)
    test = DataLoader(EmbeddedDigits("test", 4 * batch_size), batch_size)
    model = sib_fast.prepare(torchvision.models.resnet18(num_classes=10))  # S-IB
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=7).attach(model)  # S-IB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train_one_epoch(model, criterion, optimizer, train)
    loss, accuracy = evaluate(model, criterion, test)
    print(f"test loss {loss:.3f}, accuracy {accuracy:.3f}")
    return {"loss": loss, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
