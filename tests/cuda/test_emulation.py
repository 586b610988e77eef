"""The emulation itself (csrc/cuda/emulation.h): it computes what CUDA would, and shows the mistakes that it is there to show."""

from __future__ import annotations

import pytest
import torch

from sib_fast import _backends

pytestmark = pytest.mark.skipif(_backends.MISSING["emulated"] is not None, reason=f"{_backends.MISSING['emulated']}")

MIRROR, NO_BARRIER, RACE, UNWRITTEN, DIVERGENT, OUTSIDE_MASK = range(6)
ALL_LANDED, ONE_PENDING, BOTH_PENDING, COLLECTIVES, HALF_WARP, MUCH_SHARED = range(6, 12)
BEFORE_SHARED, BEHIND_SHARED, CONTRACTION = range(12, 15)


def probe(number: int, threads: int = 128) -> torch.Tensor:
    return torch.ops.sib_fast_emulated._probe(torch.arange(threads, dtype=torch.float32), number)


def test_a_barrier_orders_shared_memory():
    for _ in range(10):
        assert torch.equal(probe(MIRROR), torch.arange(128.0).flip(0))


def test_a_missing_barrier_shows():
    """A thread that reads too early finds the NaN that shared memory is filled with; which, changes from run to run."""
    results = [probe(NO_BARRIER) for _ in range(10)]
    assert all(r.isnan().any() for r in results)
    assert any(not torch.equal(r.isnan(), results[0].isnan()) for r in results[1:])


def test_a_race_between_blocks_shows():
    winners = {probe(RACE)[0].item() for _ in range(20)}
    assert len(winners) > 5


def test_shared_memory_is_poisoned_before_every_block():
    assert probe(UNWRITTEN).isnan().all()


@pytest.mark.parametrize(
    ("number", "message"),
    [(DIVERGENT, "not all of its threads reach"), (OUTSIDE_MASK, "outside the mask")],
    ids=["barrier", "mask"],
)
def test_a_divergent_collective_is_an_error_and_not_a_hang(number, message):
    with pytest.raises(RuntimeError, match=message):
        probe(number)
    assert torch.equal(probe(MIRROR), torch.arange(128.0).flip(0))  # and the next launch starts afresh


def test_asynchronous_copies_land_at_wait():
    want = torch.arange(128.0)
    want[-1] = 0  # its copy is not valid: zeros
    assert torch.equal(probe(ALL_LANDED), want)
    late = probe(ONE_PENDING)
    assert torch.equal(late[:64], want[:64])
    assert late[64:].isnan().all()
    assert probe(BOTH_PENDING).isnan().all()


def test_collectives():
    lanes = torch.arange(32.0)
    got = probe(COLLECTIVES, 64)
    for first in (0.0, 32.0):  # two warps, each among its own lanes
        v = lanes + first
        want = torch.stack(
            [
                v[torch.arange(32) ^ 3],
                torch.cat([v[:2], v[:-2]]),
                torch.full((32,), 7.0),
            ]
        )
        assert torch.equal(got[int(first) : int(first) + 32], want[torch.arange(32) % 3, torch.arange(32)])


def test_half_a_warp_may_leave():
    got = probe(HALF_WARP, 32)
    assert torch.equal(got[:16], torch.arange(16.0)[torch.arange(16) ^ 1])
    assert (got[16:] == -1).all()


@pytest.mark.parametrize("number", [BEFORE_SHARED, BEHIND_SHARED], ids=["before", "behind"])
def test_a_write_outside_of_shared_memory_is_an_error(number):
    with pytest.raises(RuntimeError, match="a write outside the block's shared memory"):
        probe(number)
    assert torch.equal(probe(MIRROR), torch.arange(128.0).flip(0))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this processor has no FMA")
def test_a_product_and_a_sum_are_rounded_once():
    assert (probe(CONTRACTION) == -(2.0**-46)).all()


def test_shared_memory_has_the_device_s_limit(monkeypatch):
    assert torch.equal(probe(MUCH_SHARED), torch.arange(128.0).flip(0))
    monkeypatch.setenv("SIB_FAST_EMULATION_SHARED", "99")
    with pytest.raises(RuntimeError, match="may not have 102400 bytes of shared memory"):
        probe(MUCH_SHARED)


def test_the_seed_decides_the_schedule(monkeypatch):
    def early_readers(seed: str) -> list[bool]:
        monkeypatch.setenv("SIB_FAST_EMULATION_SEED", seed)
        return probe(NO_BARRIER).isnan().tolist()

    first, other, again = early_readers("1"), early_readers("2"), early_readers("1")
    assert first == again
    assert first != other
