"""MicroBatchSquares in several processes, against one process with the whole micro-batches."""

from __future__ import annotations

import pytest
import torch
from ranks import in_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt

RANKS = 2


def data(step, part):
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def train(model, rows, set_to_none=True):
    """Two steps of three micro-batches; return parameters and the last noise scale."""
    statistics = fusedopt.MicroBatchSquares()
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), lr=0.1, statistics=statistics)
    for step in range(3):
        for part in range(3):
            (model(data(step, part)[rows]).square().sum(1).mean() / 3).backward()
            statistics.accumulate(optimizer)
        noise = statistics.noise_scale()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return [p.detach() for p in model.parameters()], noise


def own_rows(rank):
    return slice(2 * rank, 2 * rank + 2)


def _buckets(rank: int, set_to_none: bool) -> None:
    model = DistributedDataParallel(make(), gradient_as_bucket_view=True)
    found, noise = train(model, own_rows(rank), set_to_none)
    expected, whole = train(make(), slice(None))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(noise.ratio, whole.ratio)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_views_of_buckets(tmp_path, set_to_none):
    in_ranks(RANKS, tmp_path, _buckets, set_to_none)


def _no_sync(rank: int) -> None:
    model = DistributedDataParallel(make())
    statistics = fusedopt.MicroBatchSquares()
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), lr=0.1, statistics=statistics)
    before = [p.detach().clone() for p in model.parameters()]
    with model.no_sync():
        model(data(0, 0)[own_rows(rank)]).sum().backward()
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        statistics.accumulate(optimizer)
    optimizer.zero_grad()
    model(data(0, 0)[own_rows(rank)]).sum().backward()
    statistics.accumulate(optimizer)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_gradients_of_one_process_alone_are_refused_on_all(tmp_path):
    in_ranks(RANKS, tmp_path, _no_sync)


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    _, noise = train(model, own_rows(rank))
    _, whole = train(make(), slice(None))
    for a, b in zip(noise, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_noise_scale_of_shards_is_that_of_the_whole(tmp_path):
    """The second layer has two rows, and 5 rows do not divide evenly."""
    in_ranks(RANKS, tmp_path, _sharded)
