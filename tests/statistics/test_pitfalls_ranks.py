"""Pitfalls of per-sample squares, f and g: several processes.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from multiprocessing import Manager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from observed import adam_without_decay
from per_sample import (
    DEVICE,
    LanguageModel,
    assert_near,
    mean_square_of,
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
)
from ranks import in_ranks
from torch import Tensor, nn

from fusedopt import MicroBatchSquares, PerSampleSquares

# f


def _two_ranks_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """q of the whole batch from two ranks' squares, each of two accumulation steps."""
    share = []
    for rank in range(2):
        part = x[4 * rank : 4 * rank + 4]
        rows = []
        for micro in part.chunk(2):
            out = model(micro)
            rows += rows_of(out.square().sum(1) / 4, [model[0].weight])
        share.append(torch.cat(rows).square().sum(0))
    return 8 * (share[0] + share[1]) / 4


def test_pitfall_f_formula_over_ranks() -> None:
    """S = sum of S_r / R**2, N = sum of N_r: the q of one process with all samples."""
    (model,) = to(torch.float64, mlp())
    x = randn(8, 4)
    rows = rows_of(model(x).square().sum(1) / 8, [model[0].weight])[0]
    assert_near(_two_ranks_by_hand(model, x), mean_square_of(rows), 1e-12, "two ranks")


def _rank(rank: int, tied: bool, results: Any) -> None:
    torch.manual_seed(0)
    model = LanguageModel(tied=tied).double()
    x = randint(7, 8, 3)
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics, virtual_batch_size=2)
    mine = x[4 * rank : 4 * rank + 4].chunk(2)
    for part in mine:
        (model(part).square().sum() / 4).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad.div_(2)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step()
        refused = "it was not"
    except RuntimeError as error:
        refused = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    statistics.all_reduce()
    squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
    samples = statistics.samples
    optimizer.step()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    # A second step: what was reduced once is not taken for this one.
    optimizer.zero_grad()
    model(mine[0]).square().mean().backward()
    try:
        optimizer.step()
        again = "it was not"
    except RuntimeError as error:
        again = str(error)
    results[rank] = (refused, same, samples, squares, after, again)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="two processes on the CPU")
@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_pitfall_f_two_processes(tied: bool, tmp_path: Path) -> None:
    """Two ranks with two accumulation steps each are one process with all eight samples.

    Gradients are averaged by hand. Catches a forgotten 1/R**2, squares of the reduced gradient,
    counts of one rank alone, and a step that runs on unreduced squares.
    """
    with Manager() as manager:
        results = manager.dict()
        in_ranks(2, tmp_path, _rank, tied, results)
        ranks = [results[0], results[1]]
    torch.manual_seed(0)
    model = LanguageModel(tied=tied).double()
    x = randint(7, 8, 3)
    statistics = PerSampleSquares(model)
    optimizer = adam_without_decay(model.parameters(), statistics, virtual_batch_size=2)
    (model(x).square().sum() / 8).backward()
    squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
    optimizer.step()
    for refused, same, samples, theirs, after, again in ranks:
        assert "all_reduce" in refused
        assert "all_reduce" in again
        assert same, "the step that raised had changed parameters"
        assert samples == 8
        for name, p in model.named_parameters():
            assert_near(theirs[name], squares[name], 1e-11, name)
            assert_near(after[name], p, 1e-11, name)


# g


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


gloo = pytest.mark.skipif(
    DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="one gloo group on the CPU"
)


@gloo
def test_pitfall_g_sharded_parameters_are_refused(mesh: Any) -> None:
    """FSDP2's parameters: a message that names one and the way out, before anything is hooked."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(4, 3))
    weight = distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)])
    model[0].weight = nn.Parameter(weight)
    with pytest.raises(RuntimeError, match=r"0\.weight.*MicroBatchSquares|MicroBatchSquares"):
        PerSampleSquares(model)


@gloo
@pytest.mark.parametrize("b", [1, 2, 4])
def test_pitfall_g_micro_batches_on_sharded_parameters(mesh: Any, b: int) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    start, gradients = randn(4, 3), randn(4, 4, 3, seed=1)
    sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    plain = nn.Parameter(start.clone())
    for p in (sharded, plain):
        statistics = MicroBatchSquares()
        optimizer = adam_without_decay([p], statistics, virtual_batch_size=b)
        for g in gradients:
            if p is plain:
                (p * g / 4).sum().backward()
            elif p.grad is None:
                p.grad = distribute_tensor(g / 4, mesh, [Shard(0)])
            else:
                p.grad += distribute_tensor(g / 4, mesh, [Shard(0)])
            statistics.accumulate(optimizer)
        optimizer.step()
        assert statistics.samples == 4
        assert isinstance(optimizer.state[p]["exp_avg_sq"], DTensor) == (p is sharded)
    assert_near(sharded.full_tensor(), plain, 1e-12, "sharded")
    assert not torch.equal(plain, start)


@gloo
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["samples", "micro-batches"])
def test_pitfall_g_fully_sharded_model(mesh: Any, kind: str) -> None:
    """fully_shard itself: both give the plain model's steps."""
    from torch.distributed.fsdp import fully_shard

    (plain,) = to(torch.float64, mlp())
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    x = randn(8, 4)
    for model in (plain, sharded):
        statistics = MicroBatchSquares() if kind == "micro-batches" else PerSampleSquares(model)
        optimizer = adam_without_decay(model.parameters(), statistics, virtual_batch_size=2)
        for _ in range(2):
            for part in x.chunk(4):
                (squared_error()(model(part)).sum() / 4).backward()
                if isinstance(statistics, MicroBatchSquares):
                    statistics.accumulate(optimizer)
            assert statistics.samples == (4 if kind == "micro-batches" else 8)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert_near(q.full_tensor(), p, 1e-11, "fully sharded")
