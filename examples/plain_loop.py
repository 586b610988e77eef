"""A training loop of one's own: `python examples/plain_loop.py`."""

import argparse

import torch
from torch.utils.data import DataLoader

import sib_fast
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.models import SmallConvNet


def main(steps: int = 200, batch_size: int = 32) -> dict[str, float]:
    torch.manual_seed(0)
    loader = DataLoader(EmbeddedDigits("train", steps * batch_size), batch_size, shuffle=True, drop_last=True)
    model = sib_fast.prepare(SmallConvNet())  # S-IB: layers with a fast double backward, same numbers
    criterion = sib_fast.SIBLoss(1.0, 1e5, window_size=7).attach(model)  # S-IB: was nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, (x, target, _) in enumerate(loader):
        loss = criterion(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(step, {name: f"{value.item():.3g}" for name, value in criterion.terms.items()})
    return {name: value.item() for name, value in criterion.terms.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
