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


def _each_rank(rank: int) -> None:
    """Three micro-batches of each process are six of one, also where one has no part in some."""
    for view in (False, True):
        model = DistributedDataParallel(make(), gradient_as_bucket_view=view)
        statistics = fusedopt.MicroBatchSquares(each_rank=True)
        optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), lr=0.1, statistics=statistics)
        plain = make()
        expected = fusedopt.MicroBatchSquares()
        other = fusedopt.BatchDecoupledAdam(plain.parameters(), lr=0.1, statistics=expected)
        for step in range(3):
            with model.no_sync():
                for part in range(3):
                    model(data(step, part)[own_rows(rank)]).square().sum(1).mean().div(3).backward()
                    statistics.accumulate(optimizer)
            with pytest.raises(RuntimeError, match=r"all_reduce\(\)"):
                optimizer.step()
            statistics.all_reduce()
            once = [statistics.mean_square(p) for p in model.parameters()]
            statistics.all_reduce()
            assert all(map(torch.equal, once, map(statistics.mean_square, model.parameters())))
            for part in range(3):
                for process in range(RANKS):
                    rows = data(step, part)[own_rows(process)]
                    plain(rows).square().sum(1).mean().div(3 * RANKS).backward()
                    expected.accumulate(other)
            assert statistics.samples == expected.samples == 3 * RANKS
            for a, b in zip(statistics.noise_scale(), expected.noise_scale(), strict=True):
                torch.testing.assert_close(a, b)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(statistics.mean_square(p), expected.mean_square(q))
                ratio = statistics.signal_to_noise(p)
                torch.testing.assert_close(ratio, expected.signal_to_noise(q), rtol=1e-6, atol=0)
            for one in (optimizer, other):
                one.step()
                one.zero_grad()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    # Averages are not a process' own.
    model(data(0, 0)[own_rows(rank)]).sum().backward()
    with pytest.raises(RuntimeError, match=r"within its no_sync\(\)"):
        statistics.accumulate(optimizer)
    with pytest.raises(RuntimeError, match="each_rank=True"):
        expected.all_reduce()
    _each_shard(rank)


def _each_shard(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make(), mesh=init_device_mesh("cpu", (RANKS,)))
    statistics = fusedopt.MicroBatchSquares(each_rank=True)
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), lr=0.1, statistics=statistics)
    model(data(0, 0)[own_rows(rank)]).sum().backward()
    with pytest.raises(RuntimeError, match=r"DTensors.*leave it out"):
        statistics.accumulate(optimizer)


def test_each_process_gradient_is_a_micro_batch(tmp_path):
    in_ranks(RANKS, tmp_path, _each_rank)
