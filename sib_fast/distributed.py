"""Statistics of the global batch: what makes S-IB on W processes the S-IB of one process with all the images.

HSIC is no mean over images: W processes with N images each estimate it W times, each with a bias of about 1/(N−1), and the
mean of these is not the estimate of the W·N images. `SIBLoss(gather=True)` takes it over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sib_fast.ops import region_statistics
from sib_fast.types import RegionStatistics

_OP = "global_region_statistics"


def global_region_statistics(
    vjp: Tensor,
    x: Tensor,
    mask: Tensor,
    *,
    background_grams: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> RegionStatistics:
    """`region_statistics` of the images of all ranks, the same on every rank, differentiable once in vjp and mask.

    Rows are not gathered. Each rank is sent its share of the pixels of every image, computes the Grams over these pixels, and
    the [W·N, W·N] Grams are summed: each rank sends and receives one image batch (R, x and the mask once, whatever W is)
    where gathering the rows would receive W−1 of them, and computes 1/W of the Grams.

    Shapes:  vjp, x [N, C, H, W'], mask [N, 1, H, W'] of this rank, N equal on all ranks -> Grams float64 [W·N, W·N] and
             variances float64 [W·N], in rank order.
    Scale:   as `region_statistics`. The gradient that reaches this rank's vjp is that of the sum of all ranks' losses, so
             that the mean over ranks which DDP and FSDP take of the parameters' gradients is the gradient of one loss.
    Errors:  ValueError for different N among the ranks (checked on the CPU; on a GPU that would be a synchronisation, and
             NCCL waits for ever: use drop_last=True); RuntimeError without a process group.
    Source:  SPEC 4; G = Σ_slices a_s a_sᵀ.
    """
    _require_group(_OP)
    world = dist.get_world_size(group)
    own = region_statistics(vjp, x, mask, background_grams=background_grams and world == 1, backend=backend)
    if world == 1:
        return own
    _require_same_batch(vjp, world, group)
    pieces = [_exchange(map_, world, group) for map_ in (vjp, x, mask)]
    partial = region_statistics(*pieces, background_grams=background_grams, backend=backend)
    grams = [
        None if gram is None else _SumOfRanks.apply(gram, group)
        for gram in (partial.gram_vjp, partial.gram_x, partial.background_gram_vjp, partial.background_gram_x)
    ]
    # Gathered as a sum, in which every rank's place is zero on all others: exact, and one collective less to differentiate.
    mine = torch.stack([own.background_variance, own.vjp_variance])
    places = mine.new_zeros((2, world, len(vjp)))
    places[:, dist.get_rank(group)] = mine
    variances = _SumOfRanks.apply(places, group).flatten(1)
    return RegionStatistics(grams[0], grams[1], variances[0], variances[1], grams[2], grams[3])


def global_mean(values: Tensor, counted: Tensor, *, gather: bool = False) -> tuple[Tensor, Tensor]:
    """Mean of the values that count, and how many do not, over this process, or with gather over all ranks, the same on each.

    Shapes:  values [N]; counted bool [N]; N may differ among the ranks -> 0-d, in the graph; 0-d int64.
    Scale:   the sum over the number that count; 0 where none does. What does not count has a gradient of zero. With gather the
             gradient that reaches this rank's values is that of the sum of all ranks' losses, as `global_region_statistics`.
    Errors:  RuntimeError with gather and without a process group.
    """
    total = torch.where(counted, values, 0.0).sum()
    count, images = counted.sum(), torch.full_like(counted, True).sum()
    if gather:
        _require_group("global_mean")
        total = _SumOfRanks.apply(total, None)
        of_all = torch.stack([count, images])
        dist.all_reduce(of_all)
        count, images = of_all.unbind()
    return total / count.clamp(min=1), images - count


def _require_group(op: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{op}: a process group must be initialised, got none: call torch.distributed.init_process_group")


class _SumOfRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, on every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        return _SumOfRanks.apply(grad_total, ctx.group), None


class _AllToAll(torch.autograd.Function):
    """Slice r of the first dimension goes to rank r; the gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, send: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        received = torch.empty_like(send, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, send.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad_received: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad_received, ctx.group), None


def _exchange(map_: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's share of the pixels of every image. Shapes: [N, C, H, W'] -> [W·N, C, 1, p], p·W >= H·W', zeros beyond."""
    images, channels, height, width = map_.shape
    share = max(2, -(-height * width // world))  # two, since a variance wants two elements
    flat = torch.nn.functional.pad(map_.flatten(2), (0, share * world - height * width))
    send = flat.view(images, channels, world, share).permute(2, 0, 1, 3).contiguous()
    return _AllToAll.apply(send, group).view(world * images, channels, 1, share)


def _require_same_batch(vjp: Tensor, world: int, group: dist.ProcessGroup | None) -> None:
    if vjp.device.type != "cpu":
        return
    mine = torch.tensor(vjp.shape)
    shapes = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(shapes, mine, group=group)
    if any(not torch.equal(shape, mine) for shape in shapes):
        raise ValueError(
            f"{_OP}: every rank must hold the same number of images, got {[shape.tolist() for shape in shapes]}: drop the "
            "last partial batch, DataLoader(drop_last=True)"
        )
