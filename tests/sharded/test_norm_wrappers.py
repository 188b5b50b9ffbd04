"""Clipping where wrappers, or pipelines, give each process other plain parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from torch import Tensor, distributed, nn

import fusedopt


def _params(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def _near(params: list[nn.Parameter], values: list[float]) -> None:
    for p, value in zip(params, values, strict=True):
        torch.testing.assert_close(p.detach(), torch.full((2,), value), rtol=1e-5, atol=1e-7)


def _zero(rank: int) -> None:
    # Its import warns; here no filter makes an error of that.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = _params()
    clip = fusedopt.GlobalNorm(1.0)
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.SGD, lr=1.0, clip=clip)
    # The parameter of one process alone has a gradient: the other takes part all the same.
    params[0].grad = torch.full((2,), 3.0)
    optimizer.step()
    _near(params, [-(0.5**0.5), 0.0])
    for p in params:
        p.grad = torch.full((2,), 3.0)
    optimizer.step()
    _near(params, [-(0.5**0.5) - 0.5, -0.5])
    # Another's optimizer is none of ours, and whole parameters have a norm of their own.
    ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.SGD, lr=0.0).step()
    if rank == 0:
        own = _params()
        for p in own:
            p.grad = torch.full((2,), 3.0)
        fusedopt.SGD(own, lr=1.0, clip=fusedopt.GlobalNorm(1.0)).step()
        _near(own, [-0.5, -0.5])


def test_zero_redundancy(tmp_path: Path) -> None:
    """Catches each process clipping by what it was dealt."""
    in_ranks(2, tmp_path, _zero)


def test_zero_redundancy_of_one_process(tmp_path: Path) -> None:
    in_ranks(1, tmp_path, _zero)


def _flat(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        torch.manual_seed(0)
        inner = nn.Linear(5, 3)
        plain = copy.deepcopy(inner)
        model = FullyShardedDataParallel(
            inner, device_id=torch.device("cpu"), use_orig_params=original
        )
        clip = fusedopt.GlobalNorm(0.1)
        ours = fusedopt.AdamW(model.parameters(), lr=0.1, clip=clip)
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.1)
        for seed in range(3):
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
            for each in (model, plain):
                each.zero_grad()
                each(x).square().sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            ours.step()
            theirs.step()
            assert clip.last is not None
            torch.testing.assert_close(clip.last, norm)
        with FullyShardedDataParallel.summon_full_params(model):
            whole = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        expected = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
        torch.testing.assert_close(whole[: len(expected)], expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fully_sharded_flat_parameters(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _flat)


def _stages(rank: int) -> None:
    world = distributed.group.WORLD
    for named in (world, None):
        (p,) = _params(1)
        p.grad = torch.full((2,), 3.0 if rank == 0 else 4.0)
        clip = fusedopt.GlobalNorm(1.0, group=named)
        # Copies know the group, pickles come without.
        assert copy.deepcopy(clip).group is named and pickle.loads(pickle.dumps(clip)).group is None
        assert "group" not in clip.config()
        optimizer = fusedopt.SGD([p], lr=1.0, clip=clip)
        copy.deepcopy(optimizer)
        optimizer.step()
        own = float(p.grad[0])
        whole = 50.0**0.5 if named else 2**0.5 * own
        _near([p], [-own / whole])
        assert optimizer.state_dict() is not None
    alone = [distributed.new_group([r]) for r in range(2)][rank]
    (p,) = _params(1)
    p.grad = torch.full((2,), 3.0)
    fusedopt.SGD([p], lr=1.0, clip=fusedopt.GlobalNorm(1.0, group=alone)).step()
    _near([p], [-(0.5**0.5)])


def test_stages_of_a_pipeline_are_named(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _stages)


def _wrong_groups(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    groups = [distributed.new_group(ranks) for ranks in ([0, 1], [1, 2], [0, 2])]
    first = DeviceMesh.from_group(groups[0 if rank < 2 else 1], "cpu")
    second = DeviceMesh.from_group(groups[1 if rank == 1 else 2], "cpu")

    def sharded(mesh: DeviceMesh) -> nn.Parameter:
        p = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)], run_check=False))
        p.grad = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
        return p

    def refused(params: list[Tensor], error: type[Exception], match: str, **named: object) -> None:
        clip = fusedopt.GlobalNorm(1.0, **named)
        optimizer = fusedopt.AdamW(params, clip=clip)
        with pytest.raises(error, match=match):
            optimizer.step()
        assert not optimizer.state

    refused([sharded(first), sharded(second)], RuntimeError, "none has all.*group=")
    alone = [distributed.new_group([r]) for r in range(3)][rank]
    refused([sharded(first)], ValueError, r"lacks ranks \[\d\]", group=alone)


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    in_ranks(3, tmp_path, _wrong_groups)


@pytest.mark.parametrize("make", [lambda: 3, lambda: "world", object], ids=["int", "str", "object"])
def test_a_group_is_a_process_group(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="group must be a process group"):
        fusedopt.GlobalNorm(1.0, group=make())
