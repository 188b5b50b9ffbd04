"""The average of sharded weights: in two processes, nothing is gathered for it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt
from fusedopt import WeightAverage

STEPS, ROWS = 3, 4


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    # An uneven number of rows, and a root with parameters of its own.
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _batch(step: int) -> Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def _optimizer(model: nn.Module, dtype: torch.dtype) -> Any:
    return fusedopt.AdamW(
        model.parameters(), lr=0.05, average=WeightAverage(0.5, dtype), backend="reference"
    )


def _step(model: nn.Module, optimizer: Any, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _sharded(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = _model()
        model = copy.deepcopy(whole)
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        alone, optimizer = _optimizer(whole, dtype), _optimizer(model, dtype)
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        for step in range(STEPS):
            _step(whole, alone, _batch(step))
            _step(model, optimizer, _batch(step)[mine])
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            found = optimizer.state[p]["ema"]
            assert found.placements == p.placements and found.dtype == dtype
            near = 1e-5 if dtype == torch.float32 else 0.01
            expected = alone.state[q]["ema"]
            torch.testing.assert_close(found.full_tensor(), expected, rtol=near, atol=near)
        _apply(model, optimizer)
        with alone.average.applied():
            wanted = whole(_batch(9))
        # Caught: weights that the outermost module has kept from the forward pass before.
        with torch.no_grad():
            trained = model(_batch(9))
            with optimizer.average.applied():
                averaged = model(_batch(9))
            again = model(_batch(9))
        assert torch.equal(trained, again) and not torch.equal(trained, averaged)
        torch.testing.assert_close(averaged, wanted, rtol=0.02, atol=0.02)


def _apply(model: nn.Module, optimizer: Any) -> None:
    before = [p.to_local().clone() for p in model.parameters()]
    with CommDebugMode() as collectives:
        optimizer.zero_grad()
        with optimizer.average.applied():
            for p in model.parameters():
                average = optimizer.state[p]["ema"].to_local()
                assert torch.equal(p.to_local(), average.to(p.dtype))
        restored = [p.to_local() for p in model.parameters()]
    assert collectives.get_total_counts() == 0
    assert all(map(torch.equal, restored, before))


def _steps_need_no_collective(rank: int) -> None:
    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = _optimizer(model, torch.float32)
    model(_batch(rank)).square().mean().backward()
    with CommDebugMode() as collectives:
        optimizer.step()
    assert collectives.get_total_counts() == 0


def _dealt_out(rank: int) -> None:
    # Its package compiles functions with what torch is about to give up.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = _model()
    zero = ZeroRedundancyOptimizer(
        model.parameters(), fusedopt.AdamW, average=WeightAverage(0.5), lr=0.1
    )
    model(_batch(0)).square().mean().backward()
    zero.step()
    inner: Any = zero.optim
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer has dealt out the parameters"):
        with inner.average.applied():
            raise AssertionError
    assert all("ema" in inner.state[p] for g in inner.param_groups for p in g["params"])


def _all(rank: int) -> None:
    _sharded(rank)
    _steps_need_no_collective(rank)
    _dealt_out(rank)
    assert distributed.get_world_size() == 2


def test_in_two_processes(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _all)
