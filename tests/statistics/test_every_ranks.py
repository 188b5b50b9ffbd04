"""Steps without squares in several processes: they agree on which, and on how many samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from across_ranks import (
    adam,
    all_equal,
    alone,
    assert_same,
    ids,
    local_loss,
    losses,
    outcomes_of,
    parameters,
)
from across_ranks import share as share_of
from observed import Everything
from per_sample import DEVICE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt import PerSampleSquares

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="processes on the CPU, over gloo"
)
WITHIN, STEPS, EVERY, SIZES = 1e-10, 7, 3, (3, 5)


def make() -> nn.Module:
    torch.manual_seed(0)
    return Everything().double()


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(model, **options)


def train(
    model: nn.Module,
    call: Any,
    optimizer: Any,
    rank: int | None,
    micro: int = 1,
    before_step: Callable[[], Any] = lambda: None,
    start: int = 0,
) -> Any:
    """Train on whole batches, or on this process' share; return the parameters in the end."""
    for step in range(start, STEPS):
        for part in range(micro):
            x = ids(10 * step + part)
            if rank is None:
                loss = losses(call(x)).mean()
            else:
                loss = local_loss(call(share_of(x, rank, SIZES)), 2, 8)
            (loss / micro).backward()
        before_step()
        statistics = optimizer.statistics
        if statistics is not None:
            assert statistics.measured == (step % EVERY == 0), step
            assert statistics.samples == 8 * micro, step
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def whole(micro: int = 1, **options: Any) -> Any:
    """The same in one process with all samples, whose squares nobody adds to."""
    model = make()
    optimizer = adam(model, PerSampleSquares(model, every=EVERY), **options)
    return train(model, model, optimizer, None, micro, lambda: alone(optimizer.statistics))


def replicas(rank: int) -> None:
    """Uneven shares. Catches a phase, or a number of samples, of one process alone."""
    expected = whole()
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        model = make()
        wrapped = ddp(model, **options)
        optimizer = adam(model, PerSampleSquares(model, every=EVERY))
        assert_same(train(model, wrapped, optimizer, rank), expected, WITHIN, str(options))


def micro_batches(rank: int) -> None:
    expected = whole(micro=2)
    model = make()
    wrapped = ddp(model)
    optimizer = adam(model, PerSampleSquares(model, every=EVERY))
    assert_same(train(model, wrapped, optimizer, rank, 2), expected, WITHIN, "two micro-batches")


def shards(rank: int) -> None:
    """Kept squares are shards as their parameters are."""
    expected = whole()
    model = make()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.attention, model.conv, model):
        fully_shard(module, mesh=mesh)
    optimizer = adam(model, PerSampleSquares(model, every=EVERY))
    assert_same(train(model, model, optimizer, rank), expected, WITHIN, "shards")
    p = next(model.parameters())
    assert optimizer.state[p]["mean_square"].placements == p.placements


def averaged_by_hand(rank: int) -> None:
    expected = whole()
    model = make()
    optimizer = adam(model, PerSampleSquares(model, every=EVERY))

    def average() -> None:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= 2
        optimizer.statistics.all_reduce()

    found = train(model, model, optimizer, rank, before_step=average)
    assert_same(found, expected, WITHIN, "averaged by hand")


def whole_batch_is_adamw(rank: int) -> None:
    """b is the batch of both processes, at every step, but for bits of observed attention."""
    found = []
    for decoupled in (True, False):
        model = make()
        wrapped = ddp(model)
        options: dict[str, Any] = {"lr": 0.01, "betas": (0.6, 0.8), "eps": 1e-3}
        if decoupled:
            statistics = PerSampleSquares(model, every=EVERY)
            optimizer: Any = fusedopt.BatchDecoupledAdam(
                model.parameters(), **options, statistics=statistics, virtual_batch_size=8
            )
        else:
            optimizer = fusedopt.AdamW(model.parameters(), **options)
        found.append(train(model, wrapped, optimizer, rank))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-9, atol=1e-11), name


def joined_late(rank: int) -> None:
    """A parameter whose first gradient comes where none is measured: an error on all, and a way."""
    model = make()
    frozen = list(model.head.parameters())
    for p in frozen:
        p.requires_grad_(False)
    statistics = PerSampleSquares(model, every=EVERY)
    optimizer = adam(model, statistics)

    def backward() -> None:
        x = share_of(ids(0), rank, SIZES)
        # Which parameters are trained is what it asks when it is made.
        wrapped = ddp(model)
        local_loss(wrapped(x), 2, 8).backward()

    backward()
    optimizer.step()
    optimizer.zero_grad()
    for p in frozen:
        p.requires_grad_(True)
    before = parameters(model)
    backward()
    with pytest.raises(RuntimeError, match=r"every=3 .*measure\(\)"):
        optimizer.step()
    assert all_equal(before.values(), parameters(model).values())
    optimizer.zero_grad()
    statistics.measure()
    backward()
    optimizer.step()
    assert all(p in optimizer.state for p in frozen)


def a_sum_is_refused(rank: int) -> None:
    model = make()
    wrapped = ddp(model)
    optimizer = adam(model, PerSampleSquares(model, "sum", every=EVERY))
    losses(wrapped(share_of(ids(0), rank, SIZES))).sum().backward()
    with pytest.raises(RuntimeError, match="loss_reduction='sum'"):
        optimizer.step()


def nobody_averages(rank: int) -> None:
    """Processes would drift apart."""
    model = make()
    optimizer = adam(model, PerSampleSquares(model, every=EVERY))
    losses(model(ids(rank))).mean().backward()
    with pytest.raises(RuntimeError, match="several processes"):
        optimizer.step()


SCENARIOS = {
    2: (replicas, micro_batches, shards, averaged_by_hand, whole_batch_is_adamw, joined_late,
        a_sum_is_refused, nobody_averages),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    return outcomes_of(SCENARIOS, tmp_path_factory)


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS[2]])
def test_in_two_processes(name: str, outcomes: Callable[[int], dict[str, str]]) -> None:
    found = outcomes(2)
    assert name in found, f"not reached: {[n for n, error in found.items() if error]}"
    assert not found[name], found[name]
