"""Several processes (gloo; NCCL where GPUs are): DDP in its settings, the global batch, FSDP2; each against one process."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sib_fast import EvidenceLoss, SIBLoss, region_statistics
from sib_fast.criterion import Criterion
from sib_fast.testing.networks import conv_net
from tests.distributed.cases import CASES, EVIDENCE, WEIGHTS, batch_of, gradients, network, no_base, run_all, some_of

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
FOUR = ("ddp", "ddp_gather", "global_statistics")  # what could depend on the number of processes


@pytest.fixture(scope="module", params=[(2, "cpu"), (4, "cpu"), (2, "cuda")], ids=["2", "4", "2-nccl"])
def ranks(request, tmp_path_factory):
    """One start of the processes for all cases: what every rank returned, or the words of what it raised."""
    world, device = request.param
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"NCCL needs {world} GPUs, torch sees {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp(f"{world}_processes_{device}")
    names = tuple(CASES) if world == 2 else FOUR
    if device == "cuda":
        names = tuple(name for name in names if name != "unequal_batches")  # NCCL waits for ever
    mp.spawn(run_all, (world, str(folder), names, device), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(world)]


def results(ranks, name):
    if name not in ranks[0]:
        pytest.skip("not run with these processes")
    out = [rank[name] for rank in ranks]
    assert not any(isinstance(o, str) for o in out), out
    return out


def refusals(ranks, name):
    if name not in ranks[0]:
        pytest.skip("not run with these processes")
    assert all(isinstance(rank[name], str) for rank in ranks)
    return [rank[name] for rank in ranks]


def explicit(images: list[tuple], criterion: Criterion) -> tuple[dict, Criterion]:
    """Parameter gradients of one process on the images given, in the explicit form."""
    net = network()
    x, target = (torch.cat(parts) for parts in zip(*images, strict=True))
    x.requires_grad_()
    features = net[:6](x)  # read by a criterion with an evidence term alone
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cells, fewer than 7×7")
        criterion(net[6:](features), target, x, features=None if criterion.evidence is None else features).backward()
    return gradients(net), criterion


def assert_equal_on_all_ranks(got, wanted):
    for rank in got:
        for name, value in wanted.items():
            error = (rank[name] - value).norm() / value.norm()
            assert error <= 1e-9, f"{name}: {error:.1e}"


def mean_of(parts):
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


@pytest.mark.parametrize("name", ["ddp", "ddp_find_unused", "ddp_bucket_view"])
def test_ddp_averages_the_explicit_gradients(ranks, name):
    wanted = mean_of([explicit([batch_of(rank)], SIBLoss(**WEIGHTS))[0] for rank in range(len(ranks))])
    assert_equal_on_all_ranks(results(ranks, name), wanted)


def test_ddp_with_frozen_batch_norm(ranks):
    parts = []
    for rank in range(len(ranks)):
        net, (x, target) = conv_net().double().eval(), batch_of(rank)
        x.requires_grad_()
        SIBLoss(**WEIGHTS)(net(x), target, x).backward()
        parts.append(gradients(net))
    assert_equal_on_all_ranks(results(ranks, "ddp_frozen_batch_norm"), mean_of(parts))


def test_eval_mode_warns_once_on_every_rank(ranks):
    assert [int(rank["warned"]) for rank in results(ranks, "ddp_eval_mode_warns")] == [1] * len(ranks)


def test_accumulation_under_no_sync(ranks):
    got = results(ranks, "ddp_no_sync")
    wanted = mean_of([explicit([batch_of(part)], SIBLoss(**WEIGHTS))[0] for part in range(2 * len(ranks))])
    assert_equal_on_all_ranks(got, wanted)


@pytest.mark.parametrize("name", ["ddp_static_graph", "ddp_static_graph_explicit"])
def test_static_graph_is_refused(ranks, name):
    for words in refusals(ranks, name):
        assert "DistributedDataParallel(static_graph=True) must not be used" in words


def test_gather_equals_one_process_with_the_whole_batch(ranks):
    whole = [batch_of(rank) for rank in range(len(ranks))]
    wanted, _ = explicit(whole, SIBLoss(**WEIGHTS))
    assert_equal_on_all_ranks(results(ranks, "ddp_gather"), wanted)
    # and it matters: without it the gradient is another one
    apart = results(ranks, "ddp")[0]
    name = "0.weight"
    assert (apart[name] - wanted[name]).norm() > 1e-3 * wanted[name].norm()


def test_gather_with_background_hsic_and_cka(ranks):
    got = results(ranks, "ddp_gather_background_hsic")
    options = {**WEIGHTS, "background": "hsic", "lambda_bg": 2.0, "estimator": "cka"}
    assert_equal_on_all_ranks(got, explicit([batch_of(rank) for rank in range(len(ranks))], SIBLoss(**options))[0])


def test_terms_are_those_of_the_whole_batch(ranks):
    got = results(ranks, "gather_terms")
    _, criterion = explicit([batch_of(rank) for rank in range(len(ranks))], SIBLoss(**WEIGHTS))
    for rank in got:
        for name, value in rank.items():
            torch.testing.assert_close(value, criterion.terms[name], rtol=1e-9, atol=0)


def test_statistics_of_the_global_batch(ranks):
    got = results(ranks, "global_statistics")
    inputs = torch.cat([rank["inputs"] for rank in got])
    wanted = region_statistics(inputs[:, :2], inputs[:, 2:4], inputs[:, 4:], background_grams=True)
    for rank in got:
        for name, value in wanted._asdict().items():
            torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_batches_of_different_sizes_are_refused(ranks):
    for words in refusals(ranks, "unequal_batches"):
        assert "every rank must hold the same number of images" in words
        assert "drop_last=True" in words


def test_ddp_averages_the_explicit_gradients_of_evidence(ranks):
    wanted = mean_of([explicit([batch_of(rank)], EvidenceLoss(**EVIDENCE))[0] for rank in range(len(ranks))])
    assert_equal_on_all_ranks(results(ranks, "ddp_evidence"), wanted)


def test_gathered_evidence_is_the_mean_over_all_ranks_images(ranks):
    """Of different numbers of images, some of them dead: not the mean of the ranks' means."""
    got = results(ranks, "ddp_evidence_gather")
    images = [some_of(rank) for rank in range(len(ranks))]
    wanted, criterion = explicit(images, EvidenceLoss(**EVIDENCE, base_loss=no_base))
    del wanted["8.bias"]  # 0, as without a base loss nothing depends on it
    assert_equal_on_all_ranks(got, wanted)
    assert all(torch.equal(rank["share"], got[0]["share"]) for rank in got)
    assert torch.isclose(got[0]["share"], criterion.terms["share"], rtol=1e-12)
    assert got[0]["evidence_dead"] == criterion.terms["evidence_dead"]
    means = [explicit([part], EvidenceLoss(**EVIDENCE, base_loss=no_base))[1].terms["share"] for part in images]
    assert abs(sum(means) / len(means) - criterion.terms["share"]) > 1e-6


@pytest.mark.parametrize(("way", "by_ddp"), [("fsdp", "three_steps_by_ddp"), ("fsdp_evidence", "three_steps_by_ddp_evidence")])
def test_fsdp2_by_the_helper_equals_ddp(ranks, way, by_ddp):
    wanted = results(ranks, by_ddp)[0]
    got = results(ranks, way)
    assert_equal_on_all_ranks(got, wanted)
    start = network().state_dict()
    assert all((wanted[name] - start[name]).norm() > 1e-5 for name in wanted)


def test_fsdp2_without_the_helper_is_refused(ranks):
    for words in refusals(ranks, "fsdp_without_the_helper"):
        assert "sib_fast.integrations.fsdp.allow_double_backward(model, optimizer)" in words


def test_a_process_group_is_needed():
    from sib_fast.distributed import global_region_statistics

    vjp = torch.randn(2, 1, 4, 4)
    with pytest.raises(RuntimeError, match="a process group must be initialised"):
        global_region_statistics(vjp, vjp, torch.rand(2, 1, 4, 4))
