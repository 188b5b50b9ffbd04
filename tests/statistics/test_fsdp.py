"""PerSampleSquares under FSDP2 (fully_shard), against one process with the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    full,
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt import PerSampleSquares

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="processes on the CPU, over gloo"
)
WITHIN = 1e-10
# Samples of each process, by the number of processes.
SIZES = {2: (3, 5), 3: (4, 1, 3), 4: (1, 4, 1, 2)}


def make(kind: Callable[[], nn.Module] = Everything) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def meshes() -> dict[str, Any]:
    """Meshes over all processes: of one dimension, and replicas of shards."""
    world = dist.get_world_size()
    found = {"shards": init_device_mesh("cpu", (world,))}
    if world == 4:
        found["replicas of shards"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    return found


def sharded(model: nn.Module, mesh: Any, **options: Any) -> Any:
    """Shard modules of some size each by itself, and what is left with the root."""
    apart = (nn.MultiheadAttention, nn.Linear, nn.Conv1d, nn.LayerNorm)
    for name, module in list(model.named_modules()):
        if isinstance(module, apart) and "head" not in name and "out_proj" not in name:
            fully_shard(module, mesh=mesh, **options)
    # Not its output for the root itself, as it is by default.
    return fully_shard(model, mesh=mesh, **options)


def whole(
    steps: int, micro: int = 1, kind: Callable[[], nn.Module] = Everything, reduction: str = "mean"
) -> list[Any]:
    """Findings of each step, and the parameters in the end, of one process with all samples."""
    model = make(kind)
    statistics = PerSampleSquares(model, reduction)
    optimizer = adam(model, statistics)
    found = []
    for step in range(steps):
        for part in range(micro):
            loss = losses(model(ids(10 * step + part)))
            (loss.mean() / micro if reduction == "mean" else loss.sum()).backward()
        found.append(findings(model, alone(statistics)))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, parameters(model)]


def parts(
    rank: int,
    model: Any,
    optimizer: Any,
    syncs: Sequence[str] = ("all",),
    set_to_none: bool = True,
    reduction: str = "mean",
    steps: int = 3,
) -> list[Any]:
    """Steps of as many micro-batches as there are ways to reduce their gradients."""
    world, statistics = dist.get_world_size(), optimizer.statistics
    found = []
    for step in range(steps):
        for part, sync in enumerate(syncs):
            model.set_requires_gradient_sync(sync != "none")
            model.set_requires_all_reduce(sync == "all")
            out = model(share_of(ids(10 * step + part), rank, SIZES[world]))
            if reduction == "sum":
                losses(out).sum().backward()
            else:
                (local_loss(out, world, 8) / len(syncs)).backward()
        found.append(findings(model, statistics))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return [*found, parameters(model)]


def same(found: list[Any], expected: list[Any], what: str, within: float = WITHIN) -> None:
    for index, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(own, other, within, f"{what}, step {index}")


def are_sharded_as_parameters(model: nn.Module, statistics: Any) -> bool:
    found = [(p, statistics.sum_of_squares(p)) for p in model.parameters()]
    return all(
        isinstance(s, DTensor)
        and s.placements == p.placements
        and s.to_local().shape == p.to_local().shape
        for p, s in found
    )


def reduced_without_a_call(rank: int) -> None:
    """Catches whole squares on shards, a missing 1/F^2, a mean of counts, and replicas twice."""
    expected = whole(3)
    for name, mesh in meshes().items():
        for reshard in (True, False):
            model = sharded(make(), mesh, reshard_after_forward=reshard)
            statistics = PerSampleSquares(model)
            optimizer = adam(model, statistics)
            found = parts(rank, model, optimizer)
            same(found, expected, f"{name}, reshard {reshard}")
            model(share_of(ids(0), rank, SIZES[dist.get_world_size()])).square().sum().backward()
            assert are_sharded_as_parameters(model, statistics)


def accumulation(rank: int) -> None:
    """Catches squares added up twice, or of the last micro-batch alone."""
    expected = whole(3, micro=3)
    orders = [("none", "none", "all"), ("all", "all", "all"), ("all", "none", "all")]
    if dist.get_world_size() == 4:
        orders += [("shards", "none", "all"), ("none", "shards", "all")]
    for name, mesh in meshes().items():
        for order in orders:
            if (len(meshes()) == 2) == (name == "shards"):
                continue
            for set_to_none in (True, False) if order == orders[0] else (True,):
                model = sharded(make(), mesh)
                optimizer = adam(model, PerSampleSquares(model))
                found = parts(rank, model, optimizer, order, set_to_none)
                same(found, expected, f"{name}, {order}, set to none {set_to_none}")


def gradients_divided_otherwise(rank: int) -> None:
    """A sum over samples and processes, which is what a factor of 1 is for; and other factors."""
    world = dist.get_world_size()
    for reduction in ("mean", "sum"):
        expected = whole(2, reduction=reduction)
        for factor in (None, 1.0, 3.0):
            if reduction == "mean" and factor is not None:
                continue
            for name, mesh in meshes().items():
                model = sharded(make(), mesh)
                if factor is not None:
                    for module in model.modules():
                        if hasattr(module, "set_gradient_divide_factor"):
                            module.set_gradient_divide_factor(factor)
                optimizer = adam(model, PerSampleSquares(model, reduction))
                found = parts(rank, model, optimizer, reduction=reduction, steps=2)
                same(found, expected, f"{reduction}, {factor}, {name}, {world}")


class Gain(nn.Module):
    """A layer of unknown kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.exp()


class Checkpointed(nn.Module):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.gain, self.last = Gain(), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in (self.first, self.norm, self.gain, self.last):
            x = checkpoint(layer, torch.tanh(x), use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    reentrant = True


def activation_checkpoints(rank: int) -> None:
    """Layers run again in backward, and one of unknown kind with them."""
    for kind in (Checkpointed, Reentrant):
        expected = whole(2, kind=kind)
        model = sharded(make(kind), meshes()["shards"])
        found = parts(rank, model, adam(model, PerSampleSquares(model)), steps=2)
        same(found, expected, kind.__name__)


def other_placements(rank: int) -> None:
    """Shards of columns, which FSDP2 takes where they are even."""

    def columns(p: Tensor) -> Any:
        return Shard(1) if p.dim() > 1 and p.shape[1] % dist.get_world_size() == 0 else None

    expected = whole(2)
    for name, mesh in meshes().items():
        model = sharded(make(), mesh, shard_placement_fn=columns)
        statistics = PerSampleSquares(model)
        same(parts(rank, model, adam(model, statistics), steps=2), expected, name)


def narrow_parameters(rank: int) -> None:
    """Layers in bfloat16, gradients reduced in float32: squares are float32, as of one process."""
    torch.manual_seed(0)
    plain = Everything()
    narrow = Everything()
    narrow.load_state_dict(plain.state_dict())
    narrow = narrow.to(torch.bfloat16)
    statistics = PerSampleSquares(narrow)
    local_loss(narrow(ids(0)).float(), 1, 8).backward()
    alone(statistics)
    expected = {n: statistics.mean_square(p) for n, p in narrow.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(plain, meshes()["shards"], mp_policy=policy)
    model.set_force_sum_reduction_for_comms(True)
    own = PerSampleSquares(model)
    optimizer = adam(model, own)
    world = dist.get_world_size()
    local_loss(model(share_of(ids(0), rank, SIZES[world])).float(), world, 8).backward()
    for name, p in model.named_parameters():
        squares = own.mean_square(p)
        assert squares.dtype == torch.float32, name
        error = (full(squares) - expected[name]).norm() / expected[name].norm()
        # A few roundings of bfloat16: batches of other sizes are multiplied in another order.
        assert error < 2e-2 or "in_proj_bias" in name, f"{name} {error}"
    before = parameters(model)
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in parameters(model).items())


def clipping_by_torch_is_followed(rank: int) -> None:
    """One factor on shards, also where a process' shard is empty."""
    models = [make(), sharded(make(), meshes()["shards"])]
    statistics = [PerSampleSquares(model) for model in models]
    world = dist.get_world_size()
    local_loss(models[0](ids(0)), 1, 8).backward()
    local_loss(models[1](share_of(ids(0), rank, SIZES[world])), world, 8).backward()
    alone(statistics[0])
    for model in models:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    found = [findings(m, s) for m, s in zip(models, statistics, strict=True)]
    assert_same(*reversed(found), WITHIN, "clipped")
    for model, own in zip(models, statistics, strict=True):
        adam(model, own).step()
    assert_same(*map(parameters, reversed(models)), WITHIN, "after a step")


def numbers_that_are_none(rank: int) -> None:
    """Gradients of nan are as they were made: the norm says what they are, and no factor."""
    world = dist.get_world_size()
    clip = fusedopt.GlobalNorm(1.0, error_if_nonfinite=True)
    for options, raises in (({"clip": clip}, True), ({}, False)):
        model = sharded(make(), meshes()["shards"])
        optimizer = adam(model, PerSampleSquares(model), **options)
        loss = local_loss(model(share_of(ids(0), rank, SIZES[world])), world, 8)
        (loss * (float("nan") if rank == 1 else 1.0)).backward()
        if raises:
            with pytest.raises(RuntimeError, match="total norm"):
                optimizer.step()
        else:
            optimizer.step()
        found = parameters(model).values()
        assert any(bool(x.isnan().any()) for x in found) is not raises


class Branches(nn.Module):
    """Another branch for each process."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.shared = nn.Linear(2, 2)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.shared(torch.tanh(self.branches[branch](x)))


def parameters_that_some_do_not_use(rank: int) -> None:
    """Processes that have no gradient take part with zeros, in gradients as in squares."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    models = [fully_shard(make(Branches), mesh=meshes()["shards"]), make(Branches)]
    models[0].set_reduce_scatter_unused_params(True)
    statistics = [PerSampleSquares(model) for model in models]
    optimizers = [adam(*pair) for pair in zip(models, statistics, strict=True)]
    for _ in range(2):
        local_loss(models[0](share_of(x, rank, SIZES[2]), rank), 2, 8).backward()
        for other in range(2):
            local_loss(models[1](share_of(x, other, SIZES[2]), other), 1, 8).backward()
        # Zeros are gradients, too: those of the third branch are everywhere.
        for p in models[1].branches[2].parameters():
            p.grad = None
        alone(statistics[1])
        found = [findings(*pair) for pair in zip(models, statistics, strict=True)]
        zeros = {n: v for n, v in found[0].items() if "branches.2" in n}
        assert all(not v.any() for n, v in zeros.items() if "squares" in n)
        assert_same({n: v for n, v in found[0].items() if n not in zeros}, found[1], WITHIN, "")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*map(parameters, models), WITHIN, "after two steps")


def a_process_without_samples(rank: int) -> None:
    models = [sharded(make(), meshes()["shards"]), make()]
    statistics = [PerSampleSquares(model) for model in models]
    local_loss(models[0](share_of(ids(0), rank, (8, 0))), 2, 8).backward()
    local_loss(models[1](ids(0)), 1, 8).backward()
    alone(statistics[1])
    assert_same(*(findings(*pair) for pair in zip(models, statistics, strict=True)), WITHIN, "")


def offloaded_shards(rank: int) -> None:
    policy = CPUOffloadPolicy(pin_memory=False)
    model = sharded(make(), meshes()["shards"], offload_policy=policy)
    found = parts(rank, model, adam(model, PerSampleSquares(model)), steps=2)
    same(found, whole(2), "offloaded")


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    with pytest.raises(RuntimeError, match=pattern):
        yield


def what_is_refused(rank: int) -> None:
    """By name, with the way out, in all processes, and before anything changes."""
    mesh, world = meshes()["shards"], dist.get_world_size()
    x = share_of(ids(0), rank, SIZES[world])
    # Gradients that were not reduced after those that were.
    model = sharded(make(), mesh)
    statistics = PerSampleSquares(model)
    optimizer = adam(model, statistics)
    local_loss(model(x), world, 8).backward()
    model.set_requires_gradient_sync(False)
    local_loss(model(x), world, 8).backward()
    before = parameters(model)
    with refused(r"set_requires_gradient_sync\(False\)"):
        optimizer.step()
    assert all_equal(before.values(), parameters(model).values())
    # zero_grad() does not clear what FSDP2 has yet to reduce: both go on with it.
    optimizer.zero_grad()
    model.set_requires_gradient_sync(True)
    local_loss(model(x), world, 8).backward()
    plain = make()
    expected = PerSampleSquares(plain)
    for _ in range(2):
        local_loss(plain(ids(0)), 1, 8).backward()
    alone(expected)
    assert_same(findings(model, statistics), findings(plain, expected), WITHIN, "left over")
    # A call that was not observed.
    optimizer.zero_grad()
    with statistics.paused():
        local_loss(model(x), world, 8).backward()
    with refused("paused"):
        optimizer.step()
    # Sharded after it was observed.
    model = make()
    statistics = PerSampleSquares(model)
    sharded(model, mesh)
    with refused("put in the place of another|make it anew|DTensor|sharded"):
        local_loss(model(x), world, 8).backward()
        adam(model, statistics).step()
    # A hook on reduced gradients; shards that fully_shard has not made; a part of a module.
    model = sharded(make(), mesh)
    model.set_all_reduce_hook(lambda gradient: None)
    with refused(r"set_all_reduce_hook\(\)"):
        PerSampleSquares(model)
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()]))
    with refused(r"'0\.weight' is sharded.*MicroBatchSquares"):
        PerSampleSquares(model)
    model = fully_shard(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), mesh=mesh)
    with refused("observe the module that fully_shard was called with"):
        PerSampleSquares(model[0])
    # Modules that would have to be run again for each sample; other kinds of sharding.
    model = Gain()
    model.layer = fully_shard(nn.Linear(4, 4), mesh=mesh)
    with refused(r"run again.*\(gain\) into a module of their own"):
        PerSampleSquares(fully_shard(model, mesh=mesh))
    two = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(model[0], two["tensor"], ColwiseParallel())
    with refused(r"'0\.weight'.*for tensor or expert parallelism"):
        PerSampleSquares(fully_shard(model, mesh=two["data"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with refused("flattened into one.*fully_shard"):
        PerSampleSquares(model)


SCENARIOS = {
    2: (
        reduced_without_a_call, accumulation, gradients_divided_otherwise, activation_checkpoints,
        other_placements, narrow_parameters, clipping_by_torch_is_followed, what_is_refused,
        parameters_that_some_do_not_use, a_process_without_samples, offloaded_shards,
        numbers_that_are_none,
    ),
    3: (reduced_without_a_call, clipping_by_torch_is_followed),
    4: (reduced_without_a_call, accumulation, gradients_divided_otherwise, other_placements),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcomes_of(SCENARIOS, tmp_path_factory)


@pytest.mark.parametrize(
    ("world", "name"), [(n, s.__name__) for n, own in SCENARIOS.items() for s in own]
)
def test_processes_with_shards_are_one_with_all(outcomes, world, name):
    problem = outcomes(world).get(name, "did not run: another scenario failed before")
    assert not problem, problem
