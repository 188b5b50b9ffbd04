"""ZeroRedundancyOptimizer: each rank's optimizer has a part of the parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from clients import ADAMW, PAIRS, Pair, assert_same, batches, loss_of, network, values
from ranks import in_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt

STEPS = 6


def _steps(model: nn.Module, optimizer: Any, rank: int, which: slice) -> None:
    for x, y in batches(STEPS, 4, seed=rank)[which]:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def _zero(model: nn.Module, kind: type, options: Any, **keywords: Any) -> Any:
    # Its import warns; here no filter makes an error of that.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **keywords, **options)


def _trajectory(rank: int, pair: Pair, **keywords: Any) -> None:
    ends = []
    for kind, options in ((pair.theirs, pair.options), (pair.ours, pair.own)):
        model = DistributedDataParallel(network())
        optimizer = _zero(model, kind, options, **keywords)
        _steps(model, optimizer, rank, slice(None))
        ends.append(values(model))
    theirs, ours = ends
    assert_same(ours, theirs, values(network()), what=str(keywords))


def _resumed(rank: int, pair: Pair) -> None:
    """A state that rank 0 has gathered goes on in a plain optimizer, of ours and of torch's."""
    whole = DistributedDataParallel(network())
    _steps(whole, pair.theirs(whole.parameters(), **pair.options), rank, slice(None))
    saved: list[Any] = [None]
    first = DistributedDataParallel(network())
    optimizer = _zero(first, pair.ours, pair.own)
    _steps(first, optimizer, rank, slice(3))
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        saved = [optimizer.state_dict()]
    torch.distributed.broadcast_object_list(saved)
    for kind, options in ((pair.theirs, pair.options), (pair.ours, pair.own)):
        model = DistributedDataParallel(network())
        model.load_state_dict(first.state_dict())
        plain = kind(model.parameters(), **options)
        plain.load_state_dict(copy.deepcopy(saved[0]))
        _steps(model, plain, rank, slice(3, None))
        assert_same(values(model), values(whole), values(network()), what=kind.__module__)
    again = DistributedDataParallel(network())
    again.load_state_dict(first.state_dict())
    zero = _zero(again, pair.ours, pair.own)
    zero.load_state_dict(copy.deepcopy(saved[0]))
    _steps(again, zero, rank, slice(3, None))
    assert_same(values(again), values(whole), values(network()), what="ZeRO again")


def _all(rank: int) -> None:
    for pair in PAIRS.values():
        _trajectory(rank, pair)
        _trajectory(rank, pair, parameters_as_bucket_view=True)
        _resumed(rank, pair)


def test_as_with_torchs_optimizer(tmp_path):
    # Catches a class that ZeRO's way to make it, hand it gradients or gather its state breaks.
    in_ranks(2, tmp_path, _all)


def _groups(rank: int) -> None:
    """Options that differ by group, and one that a scheduler changes, reach the rank's part."""
    ends = []
    for kind in (torch.optim.AdamW, fusedopt.AdamW):
        model = DistributedDataParallel(network())
        options = ADAMW.own if kind is fusedopt.AdamW else ADAMW.options
        optimizer = _zero(model, kind, options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.param_groups[0]["weight_decay"] = 0.3
        for x, y in batches(STEPS, 4, seed=rank):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            scheduler.step()
        ends.append(values(model))
    assert_same(ends[1], ends[0], values(network()))


def test_hyper_parameters_that_change(tmp_path):
    in_ranks(2, tmp_path, _groups)
