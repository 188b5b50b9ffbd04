"""Clipping over several processes, of which one lacks something, overflows, or is late."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from random_shards import same_everywhere
from ranks import in_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fusedopt
from fusedopt.step import norm as norm_module

KINDS = (fusedopt.SGD, fusedopt.AdamW)


def _sharded(mesh: Any, values: Tensor) -> Tensor:
    return DTensor.from_local(values, mesh, [Shard(0)], run_check=False)


def _make(kind: type, count: int = 2, **options: Any) -> tuple[list[nn.Parameter], Any, Any]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    params = [nn.Parameter(_sharded(mesh, torch.ones(3))) for _ in range(count)]
    clip = fusedopt.GlobalNorm(1.0, **options)
    return params, kind(params, lr=0.5, clip=clip, backend="reference"), mesh


def _values(params: list[nn.Parameter]) -> list[list[float]]:
    return [p.to_local().tolist() for p in params]


def _without_gradients(rank: int) -> None:
    for kind in KINDS:
        params, optimizer, mesh = _make(kind)
        for step in range(3):
            for p in params:
                # In turn one process has nothing to do, in the end none has.
                idle = step == 2 or rank == step
                p.grad = None if idle else _sharded(mesh, torch.full((3,), 2.0))
            optimizer.step()
            assert same_everywhere(optimizer.clip.last)
            torch.testing.assert_close(
                optimizer.clip.last, torch.tensor(0.0 if step == 2 else 24.0**0.5)
            )


def test_a_process_without_gradients_takes_part(tmp_path: Path) -> None:
    """Catches a process that waits for ever for one that had nothing to do."""
    in_ranks(2, tmp_path, _without_gradients)


def _not_finite(rank: int) -> None:
    for bad in (float("nan"), float("inf")):
        for order in (2.0, float("inf")):
            params, optimizer, mesh = _make(
                fusedopt.AdamW, error_if_nonfinite=True, norm_type=order
            )
            for p in params:
                p.grad = _sharded(mesh, torch.ones(3))
            if rank == 1:
                params[1].grad.to_local()[0] = bad
            if rank == 2:
                for p in params:
                    p.grad = None
            before = _values(params)
            with pytest.raises(RuntimeError, match="total norm"):
                optimizer.step()
            assert _values(params) == before and not optimizer.state
            assert str(optimizer.clip.last.item()) == str(bad)


def test_a_norm_that_is_not_finite_is_an_error_on_every_process(tmp_path: Path) -> None:
    """Also where a maximum of floats would lose a nan, and for a process without gradients."""
    in_ranks(3, tmp_path, _not_finite)


def _scale(optimizer: Any, overflow: bool) -> None:
    """Leave what GradScaler does: the scale, and whether this process has overflowed."""
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.found_inf = torch.tensor(float(overflow))


def _overflow(rank: int) -> None:
    for kind in KINDS:
        params, optimizer, mesh = _make(kind)
        for step in range(4):
            # At the first step, when states are yet to be made, and later.
            overflow = step in (0, 2)
            before, held = _values(params), len(optimizer.state)
            counts = [s["step"].item() for s in optimizer.state.values() if "step" in s]
            for p in params:
                p.grad = _sharded(mesh, torch.full((3,), 8.0))
            if overflow and rank == 0:
                params[1].grad.to_local()[2] = float("inf")
            _scale(optimizer, overflow and rank == 0)
            optimizer.step()
            if overflow:
                assert _values(params) == before and len(optimizer.state) == held
                assert counts == [s["step"].item() for s in optimizer.state.values() if "step" in s]
            else:
                assert _values(params) != before
                torch.testing.assert_close(optimizer.clip.last, torch.tensor(48.0**0.5))
        if kind is fusedopt.AdamW:
            assert [s["step"].item() for s in optimizer.state.values()] == [2.0, 2.0]


def test_an_overflow_of_one_process_skips_the_step_of_all(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _overflow)


def _late(rank: int) -> None:
    params, optimizer, mesh = _make(fusedopt.AdamW)
    for step in range(2):
        for p in params:
            p.grad = _sharded(mesh, torch.full((3,), 2.0))
        if rank == step:
            time.sleep(2)
        optimizer.step()
    torch.testing.assert_close(optimizer.clip.last, torch.tensor(48.0**0.5))


def test_a_process_may_be_late(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _late)


def _one_collective(rank: int) -> None:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    meshes = [square, square["a"], square["b"], init_device_mesh("cpu", (4,))]
    params = [nn.Parameter(torch.ones(2))]
    for mesh in meshes * 2:
        shards = [Shard(0)] * mesh.ndim
        local = torch.ones(3)
        params.append(nn.Parameter(DTensor.from_local(local, mesh, shards, run_check=False)))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.AdamW(params, clip=fusedopt.GlobalNorm(1.0), backend="reference")
    sizes: list[int] = []
    whole = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return whole(tensor, *args, **kwargs)

    norm_module.distributed.all_reduce = counted  # type: ignore[assignment]
    for step in range(3):
        optimizer.step()
        assert sizes == [1] * (step + 1)


def test_one_collective_of_one_number_a_step(tmp_path: Path) -> None:
    in_ranks(4, tmp_path, _one_collective)
