"""What runs on every rank: each case returns numbers, or raises. Started by test_processes.py, once per number of processes."""

from __future__ import annotations

import copy
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sib_fast import EvidenceLoss, SIBLoss
from sib_fast.criterion import Criterion
from sib_fast.distributed import global_region_statistics
from sib_fast.testing.networks import conv_net, image_batch

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}
EVIDENCE = {"kind": "share", "window_size": 5}
IMAGES = 6


def network() -> nn.Module:
    # Group norm: with batch norm, ranks see their own batch's statistics and cannot equal one process.
    return conv_net(norm="group").double()


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    x, target = image_batch(images=IMAGES, seed=10 + rank)
    return x.double(), target


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters()}


def _ddp(rank: int, world: int, *, accumulate: int = 1, criterion: Criterion | None = None, **options) -> dict[str, Tensor]:
    net = network()
    model = DistributedDataParallel(net, **options)
    criterion = (criterion or SIBLoss(**WEIGHTS)).attach(model)
    for step in range(accumulate):
        x, target = batch_of(rank + world * step)
        if step < accumulate - 1:
            with model.no_sync():
                (criterion(model(x), target) / accumulate).backward()
        else:
            (criterion(model(x), target) / accumulate).backward()
    return gradients(net)


def ddp(rank, world):
    return _ddp(rank, world)


def _frozen(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """The gradients of a step in eval mode, as fine-tuning with frozen statistics has it."""
    criterion = SIBLoss(**WEIGHTS, train_in_eval_mode=True).attach(model.eval())
    x, target = batch_of(rank)
    criterion(model(x), target).backward()
    return gradients(model)


def ddp_frozen_batch_norm(rank, world):
    # In eval mode batch norm uses stored statistics, so that even it equals one process.
    return _frozen(DistributedDataParallel(conv_net().double()), rank)


def ddp_eval_mode_warns(rank, world):
    model = DistributedDataParallel(network())
    criterion = SIBLoss(**WEIGHTS).attach(model.eval())
    x, target = batch_of(rank)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            criterion(model(x), target).backward()
    return {"warned": torch.tensor(sum("in eval mode" in str(w.message) for w in seen))}


def ddp_find_unused(rank, world):
    return _ddp(rank, world, find_unused_parameters=True)


def ddp_bucket_view(rank, world):
    return _ddp(rank, world, gradient_as_bucket_view=True)


def ddp_no_sync(rank, world):
    return _ddp(rank, world, accumulate=2)


def ddp_static_graph(rank, world):
    SIBLoss(**WEIGHTS).attach(DistributedDataParallel(network(), static_graph=True))


def ddp_static_graph_explicit(rank, world):
    model = DistributedDataParallel(network(), static_graph=True)
    x, target = batch_of(rank)
    x.requires_grad_()
    SIBLoss(**WEIGHTS)(model(x), target, x)


def ddp_gather(rank, world):
    return _ddp(rank, world, criterion=SIBLoss(**WEIGHTS, gather=True))


def ddp_gather_background_hsic(rank, world):
    options = {**WEIGHTS, "background": "hsic", "lambda_bg": 2.0, "estimator": "cka"}
    return _ddp(rank, world, criterion=SIBLoss(**options, gather=True))


def ddp_evidence(rank, world):
    return _ddp(rank, world, criterion=EvidenceLoss(**EVIDENCE))


def no_base(logits: Tensor, target: Tensor) -> Tensor:
    return 0 * logits.sum()


def some_of(rank: int) -> tuple[Tensor, Tensor]:
    """Another number of images on every rank, and some without evidence."""
    x, target = batch_of(rank)
    return x[: IMAGES - rank], target[: IMAGES - rank]


def ddp_evidence_gather(rank, world):
    net = network()
    model = DistributedDataParallel(net)
    criterion = EvidenceLoss(**EVIDENCE, gather=True, base_loss=no_base).attach(model)
    x, target = some_of(rank)
    criterion(model(x), target).backward()
    return {**gradients(net), **{name: criterion.terms[name] for name in ("share", "evidence_dead")}}


def gather_terms(rank, world):
    net = network()
    criterion = SIBLoss(**WEIGHTS, gather=True).attach(net)
    x, target = batch_of(rank)
    criterion(net(x), target)
    return {name: criterion.terms[name] for name in ("foreground", "background")}


def global_statistics(rank, world):
    like = {"generator": torch.Generator("cpu").manual_seed(rank), "dtype": torch.float64, "device": "cpu"}
    vjp, x = (torch.randn(3, 2, 5, 7, **like).to(torch.get_default_device()) for _ in range(2))
    mask = torch.rand(3, 1, 5, 7, **like).to(torch.get_default_device())
    vjp = vjp.contiguous(memory_format=torch.channels_last)
    out = global_region_statistics(vjp, x, mask, background_grams=True)
    return {**out._asdict(), "inputs": torch.cat([vjp, x, mask], dim=1)}


def unequal_batches(rank, world):
    vjp = torch.randn(3 + (rank == 0), 2, 5, 7)
    global_region_statistics(vjp, vjp, torch.rand(len(vjp), 1, 5, 7))


def _fsdp(rank, world, allow: bool, criterion: Criterion):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from sib_fast.integrations.fsdp import allow_double_backward

    net = network()
    mesh = init_device_mesh(torch.get_default_device().type, (world,))
    for layer in (net[0], net[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    if allow:
        allow_double_backward(net, optimiser)
    criterion.attach(net)
    for step in range(3):
        x, target = batch_of(rank + world * step)
        criterion(net(x), target).backward()
        optimiser.step()
        optimiser.zero_grad()
    return {name: value.full_tensor() for name, value in net.state_dict().items()}


def fsdp(rank, world):
    return _fsdp(rank, world, allow=True, criterion=SIBLoss(**WEIGHTS))


def fsdp_evidence(rank, world):
    return _fsdp(rank, world, allow=True, criterion=EvidenceLoss(**EVIDENCE))


def fsdp_without_the_helper(rank, world):
    return _fsdp(rank, world, allow=False, criterion=SIBLoss(**WEIGHTS))


def three_steps_by_ddp(rank, world):
    return _three_steps(rank, world, SIBLoss(**WEIGHTS))


def three_steps_by_ddp_evidence(rank, world):
    return _three_steps(rank, world, EvidenceLoss(**EVIDENCE))


def _three_steps(rank: int, world: int, criterion: Criterion) -> dict[str, Tensor]:
    net = network()
    model = DistributedDataParallel(net)
    criterion.attach(model)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        x, target = batch_of(rank + world * step)
        criterion(model(x), target).backward()
        optimiser.step()
        optimiser.zero_grad()
    return copy.deepcopy(net.state_dict())


CASES = {
    f.__name__: f
    for f in (
        ddp, ddp_find_unused, ddp_bucket_view, ddp_no_sync, ddp_static_graph, ddp_static_graph_explicit, ddp_gather,
        ddp_gather_background_hsic, gather_terms, global_statistics, fsdp, three_steps_by_ddp,
        ddp_evidence, ddp_evidence_gather, fsdp_evidence, three_steps_by_ddp_evidence,
        fsdp_without_the_helper, unequal_batches, ddp_frozen_batch_norm, ddp_eval_mode_warns,
    )
}  # fmt: skip


def run_all(rank: int, world: int, folder: str, names: tuple[str, ...], device: str) -> None:
    """Runs the cases; what each returned or raised goes to <folder>/<rank>.pt. A store each: a case may break its group."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*torch.distributed.*deprecated")
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    results: dict[str, object] = {}
    for name in names:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{folder}/{name}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        try:
            results[name] = CASES[name](rank, world)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")
