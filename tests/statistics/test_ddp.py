"""PerSampleSquares under DistributedDataParallel: no call by the user, and as one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from across_ranks import (
    adam,
    all_equal,
    alone,
    assert_same,
    findings,
    ids,
    local_loss,
    losses,
    outcomes_of,
    parameters,
)
from across_ranks import share as share_of
from observed import Everything
from per_sample import DEVICE
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fusedopt import PerSampleSquares

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="processes on the CPU, over gloo"
)
WITHIN = 1e-10
# Samples of each process, by the number of processes.
SIZES = {2: (3, 5), 3: (4, 1, 3)}


def make(kind: Callable[[], nn.Module] = Everything) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(model, **options)


def whole(steps: int, micro: int = 1, kind: Callable[[], nn.Module] = Everything) -> list[Any]:
    """Findings of each step, and the parameters in the end, of one process with all samples."""
    model = make(kind)
    statistics = PerSampleSquares(model)
    optimizer = adam(model, statistics)
    found = []
    for step in range(steps):
        for part in range(micro):
            (losses(model(ids(10 * step + part))).mean() / micro).backward()
        found.append(findings(model, alone(statistics)))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, parameters(model)]


def parts(rank: int, model: Any, optimizer: Any, syncs: list[bool], wrapped: Any = None) -> Any:
    """Three steps of as many micro-batches as there are flags, of which some are not reduced."""
    statistics = optimizer.statistics
    wrapped = model if wrapped is None else wrapped
    world = dist.get_world_size()
    found = []
    for step in range(3):
        for part, sync in enumerate(syncs):
            x = share_of(ids(10 * step + part), rank, SIZES[world])
            with nullcontext() if sync else wrapped.no_sync():
                out = wrapped(x)
                (local_loss(out, world, 8) / len(syncs)).backward()
        found.append(findings(model, statistics))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, parameters(model)]


def same(found: list[Any], expected: list[Any], what: str) -> None:
    for index, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(own, other, WITHIN, f"{what}, step {index}")


WRAPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
    "static graph": {"static_graph": True},
    "unused parameters are looked for": {"find_unused_parameters": True},
}


def added_up_without_a_call(rank: int) -> None:
    """Uneven batches: catches squares that stay local, a missing 1/R^2, and a mean of counts."""
    expected = whole(3)
    for name, options in WRAPPED.items():
        model = make()
        wrapped = ddp(model, **options)
        statistics = PerSampleSquares(model)
        found = parts(rank, model, adam(model, statistics), [True], wrapped)
        same(found, expected, name)
    model = make()
    optimizer = adam(model, PerSampleSquares(model))
    same(parts(rank, model, optimizer, [True], ddp(model)), expected, "wrapped after")
    outer = ddp(make())
    found = parts(rank, outer, adam(outer, PerSampleSquares(outer)), [True])
    same(found, expected, "the wrapper is observed")


def accumulation(rank: int) -> None:
    """Catches squares that are added up twice, and those of earlier passes left at one process."""
    expected = whole(3, micro=3)
    orders = {"no_sync, no_sync, reduced": [False, False, True], "all reduced": [True] * 3,
              "reduced, no_sync, reduced": [True, False, True]}  # fmt: skip
    for name, syncs in orders.items():
        for view in (False, True):
            model = make()
            wrapped = ddp(model, gradient_as_bucket_view=view)
            optimizer = adam(model, PerSampleSquares(model))
            same(parts(rank, model, optimizer, syncs, wrapped), expected, f"{name}, views {view}")


class Checkpointed(nn.Module):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = Everything()
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = self.inner.embedding(x)
        for layer in (self.inner.norm1, self.inner.norm2, self.inner.twice):
            one = checkpoint(layer, one, use_reentrant=self.reentrant)
        return self.head(self.inner.head(one))


class Reentrant(Checkpointed):
    reentrant = True


def activation_checkpoints(rank: int) -> None:
    """Reentrant ones end backward passes of their own, before gradients are averaged."""
    for kind in (Checkpointed, Reentrant):
        for static in (False, True):
            model = make(kind)
            for unused in (model.inner.attention, model.inner.conv, model.inner.group):
                unused.requires_grad_(False)
            wrapped = ddp(model, static_graph=static)
            found = parts(rank, model, adam(model, PerSampleSquares(model)), [True], wrapped)
            same(found, whole(3, kind=kind), f"{kind.__name__}, static {static}")


def loss_is_a_sum(rank: int) -> None:
    """A loss that is a sum over samples: averages over processes are of their sums."""
    models = [make(), make()]
    wrapped = ddp(models[0])
    x = share_of(ids(0), rank, SIZES[2])
    all_statistics = [PerSampleSquares(model, "sum") for model in models]
    optimizers = [adam(*pair) for pair in zip(models, all_statistics, strict=True)]
    losses(wrapped(x)).sum().backward()
    losses(models[1](ids(0))).sum().backward()
    alone(all_statistics[1])
    found = [findings(*pair) for pair in zip(models, all_statistics, strict=True)]
    assert_same(*found, WITHIN, "sums")
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*map(parameters, models), WITHIN, "after a step")


def means_over_uneven_shares(rank: int) -> None:
    """Each process' mean over its own samples: these weigh as they do in the gradient."""
    models = [make(), make()]
    wrapped = ddp(models[0])
    all_statistics = [PerSampleSquares(model) for model in models]
    losses(wrapped(share_of(ids(0), rank, SIZES[2]))).mean().backward()
    weights = torch.tensor([1 / (2 * n) for n in SIZES[2] for _ in range(n)], dtype=torch.float64)
    (losses(models[1](ids(0))) @ weights).backward()
    alone(all_statistics[1])
    found = [findings(*pair) for pair in zip(models, all_statistics, strict=True)]
    assert_same(*found, WITHIN, "local means")


class Branches(nn.Module):
    """Another branch for each process."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.shared = nn.Linear(2, 2)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.shared(torch.tanh(self.branches[branch](x)))


def parameters_that_some_do_not_use(rank: int) -> None:
    """The third branch has no gradient anywhere: nothing is said of it, and nothing refused."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    models = [make(Branches), make(Branches)]
    wrapped = ddp(models[0], find_unused_parameters=True)
    all_statistics = [PerSampleSquares(model) for model in models]
    optimizers = [adam(*pair) for pair in zip(models, all_statistics, strict=True)]
    for _ in range(2):
        local_loss(wrapped(share_of(x, rank, SIZES[2]), rank), 2, 8).backward()
        for other in range(2):
            local_loss(models[1](share_of(x, other, SIZES[2]), other), 1, 8).backward()
        alone(all_statistics[1])
        found = [findings(*pair) for pair in zip(models, all_statistics, strict=True)]
        assert_same(*found, WITHIN, "branches")
        assert found[0]["samples"] == 8
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*map(parameters, models), WITHIN, "after two steps")


def a_process_without_samples(rank: int) -> None:
    models = [make(), make()]
    wrapped = ddp(models[0])
    all_statistics = [PerSampleSquares(model) for model in models]
    local_loss(wrapped(share_of(ids(0), rank, (8, 0))), 2, 8).backward()
    local_loss(models[1](ids(0)), 1, 8).backward()
    alone(all_statistics[1])
    found = [findings(*pair) for pair in zip(models, all_statistics, strict=True)]
    assert_same(*found, WITHIN, "no sample of one's own")


def a_call_changes_nothing_and_local_squares_are_refused(rank: int) -> None:
    model = make()
    wrapped, statistics = ddp(model), PerSampleSquares(model)
    optimizer = adam(model, statistics)
    x = share_of(ids(0), rank, SIZES[2])
    local_loss(wrapped(x), 2, 8).backward()
    once = [statistics.mean_square(p).clone() for p in model.parameters()]
    statistics.all_reduce()
    assert all_equal(once, map(statistics.mean_square, model.parameters()))
    assert statistics.samples == 8
    # A factor on averages is followed.
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    # Gradients that stay at one process are refused, and nothing changes.
    before = list(parameters(model).values())
    with wrapped.no_sync():
        local_loss(wrapped(x), 2, 8).backward()
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        optimizer.step()
    assert all_equal(before, parameters(model).values())
    # As is a call that went round the wrapper.
    optimizer.zero_grad()
    local_loss(model(x), 2, 8).backward()
    with pytest.raises(RuntimeError, match="all_reduce"):
        optimizer.step()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad.div_(2)
    statistics.all_reduce()
    optimizer.step()


def _sum_hook(group, bucket):
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def hooks_and_join(rank: int) -> None:
    x = share_of(ids(0), rank, SIZES[2])
    model = make()
    wrapped, statistics = ddp(model), PerSampleSquares(model)
    wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
    found = parts(rank, model, adam(model, statistics), [True], wrapped)
    same(found, whole(3), "a hook that averages")
    model = make()
    wrapped, statistics = ddp(model), PerSampleSquares(model)
    wrapped.register_comm_hook(None, _sum_hook)
    local_loss(wrapped(x), 2, 8).backward()
    with pytest.raises(RuntimeError, match="communication hook _sum_hook"):
        adam(model, statistics).step()
    wrapped = ddp(make())
    PerSampleSquares(wrapped.module)
    with wrapped.join(), pytest.raises(RuntimeError, match=r"join\(\).*as many batches"):
        wrapped(x)


def the_group_is_the_wrappers(rank: int) -> None:
    """Two replicas of two models: squares are those of the wrapper's group."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = make()
    wrapped, statistics = ddp(model, process_group=groups[rank // 2]), PerSampleSquares(model)
    other = make()
    unshared = PerSampleSquares(other)
    x = ids(rank // 2)
    local_loss(wrapped(share_of(x, rank % 2, SIZES[2])), 2, 8).backward()
    local_loss(other(x), 1, 8).backward()
    assert_same(findings(model, statistics), findings(other, alone(unshared)), WITHIN, "groups")
    adam(model, statistics).step()


SCENARIOS = {
    2: (
        added_up_without_a_call, accumulation, activation_checkpoints, loss_is_a_sum,
        means_over_uneven_shares, parameters_that_some_do_not_use, a_process_without_samples,
        a_call_changes_nothing_and_local_squares_are_refused, hooks_and_join,
    ),
    3: (added_up_without_a_call,),
    4: (the_group_is_the_wrappers,),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcomes_of(SCENARIOS, tmp_path_factory)


@pytest.mark.parametrize(
    ("world", "name"), [(n, s.__name__) for n, own in SCENARIOS.items() for s in own]
)
def test_processes_with_shares_of_the_batch_are_one_with_all(outcomes, world, name):
    problem = outcomes(world).get(name, "did not run: another scenario failed before")
    assert not problem, problem
