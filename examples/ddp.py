"""DDP with the statistics of the global batch: `torchrun --nproc-per-node 2 examples/ddp.py`."""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import sib_fast
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.models import SmallConvNet


def main(steps: int = 100, batch_size: int = 32) -> dict[str, float]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = EmbeddedDigits("train", steps * batch_size * dist.get_world_size())
    loader = DataLoader(data, batch_size, sampler=DistributedSampler(data), drop_last=True)
    model = DistributedDataParallel(sib_fast.prepare(SmallConvNet()))  # S-IB: prepare, before or after
    criterion = sib_fast.SIBLoss(1.0, 1e5, window_size=7, gather=True).attach(model)  # S-IB: HSIC over all ranks' images
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, (x, target, _) in enumerate(loader):
        loss = criterion(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(step, {name: f"{value.item():.3g}" for name, value in criterion.terms.items()})
    terms = {name: value.item() for name, value in criterion.terms.items()}
    dist.destroy_process_group()
    return terms


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
