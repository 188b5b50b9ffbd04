"""Clipping where a wrapper has cut plain parameters over processes: refused, on every one."""

from __future__ import annotations

import pytest
import torch
from ranks import in_ranks

import fusedopt


def _params():
    return [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]


def _zero(rank: int) -> None:
    # Its import warns; here no filter makes an error of that.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = _params()
    optimizer = ZeroRedundancyOptimizer(
        params, optimizer_class=fusedopt.SGD, lr=1.0, clip=fusedopt.GlobalNorm(1.0)
    )
    # The parameter of the other rank alone has a gradient.
    params[0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"ZeroRedundancyOptimizer.*clip_grad_norm_"):
        optimizer.step()
    assert all(p.tolist() == [0.0, 0.0] for p in params)
    for p in params:
        p.grad = torch.full((2,), 3.0)
    plain = ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.SGD, lr=1.0)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    plain.step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full((2,), -0.5), rtol=1e-5, atol=0)
    # Another's optimizer is none of ours.
    theirs = ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.SGD, lr=1.0)
    theirs.step()
    # Whole parameters, in the same processes.
    own = _params()
    for p in own:
        p.grad = torch.full((2,), 3.0)
    fusedopt.SGD(own, lr=1.0, clip=fusedopt.GlobalNorm(1.0)).step()
    torch.testing.assert_close(own[0].detach(), torch.full((2,), -0.5), rtol=1e-5, atol=0)


def test_zero_redundancy(tmp_path):
    in_ranks(2, tmp_path, _zero)


def _one(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = _params()
    optimizer = ZeroRedundancyOptimizer(
        params, optimizer_class=fusedopt.SGD, lr=1.0, clip=fusedopt.GlobalNorm(1.0)
    )
    for p in params:
        p.grad = torch.full((2,), 3.0)
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.full((2,), -0.5), rtol=1e-5, atol=0)


def test_one_process_has_the_whole_norm(tmp_path):
    in_ranks(1, tmp_path, _one)


def _flat(rank: int) -> None:
    params = _params()
    for p in params:
        # As FullyShardedDataParallel marks its flat parameter, or the originals that it cuts.
        p._fsdp_flattened = True
    optimizer = fusedopt.AdamW(params, lr=1.0, clip=fusedopt.GlobalNorm(1.0))
    if rank == 0:
        params[0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*model\.clip_grad_norm_"):
        optimizer.step()
    assert not optimizer.state and params[0].tolist() == [0.0, 0.0]
    optimizer.clip = None
    optimizer.step()
    assert len(optimizer.state) == (1 if rank == 0 else 0)


def test_flat_parameters(tmp_path):
    in_ranks(2, tmp_path, _flat)


def _really_flat(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    inner = torch.nn.Linear(4, 3)
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    clipped = fusedopt.AdamW(model.parameters(), clip=fusedopt.GlobalNorm(1.0))
    model(torch.ones(2, 4)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*model\.clip_grad_norm_"):
        clipped.step()
    assert not clipped.state
    model.clip_grad_norm_(1.0)
    fusedopt.AdamW(model.parameters()).step()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fully_sharded_flat_parameters_as_torch_makes_them(tmp_path):
    in_ranks(2, tmp_path, _really_flat)
