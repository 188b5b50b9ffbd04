"""DistributedDataParallel in its forms: buckets as gradients, static graphs, hooks and Join."""

from __future__ import annotations

from typing import Any

import torch
from clients import ADAMW, PAIRS, Pair, assert_same, batches, loss_of, network, values
from ranks import in_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import fusedopt

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "small buckets": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "static graph": {"static_graph": True},
    "float16 hook": {},
    "bfloat16 hook": {},
    "join": {},
}
STEPS = 5


def _wrapped(form: str) -> DistributedDataParallel:
    model = DistributedDataParallel(network(), **FORMS[form])
    if form == "float16 hook":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if form == "bfloat16 hook":
        model.register_comm_hook(None, _bfloat16)
    return model


def _bfloat16(state, bucket):
    """Torch's hook under a name that it does not keep for NCCL."""
    return default_hooks.bf16_compress_hook(state, bucket)


def _train(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    rank: int,
    steps: int,
    set_to_none: bool,
    clip: float | None,
) -> None:
    # Other samples on every rank, of another number.
    for x, y in batches(steps, 3 + rank, seed=rank):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, x, y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def _ends(
    form: str, rank: int, make: Any, set_to_none: bool, clip: float | None = None
) -> list[torch.Tensor]:
    model = _wrapped(form)
    optimizer = make(model.parameters())
    if form == "join":
        # The first rank is done early, and takes part in the others' reductions until they are.
        with Join([model]):
            _train(model, optimizer, rank, STEPS + 2 * rank, set_to_none, clip)
    else:
        _train(model, optimizer, rank, STEPS, set_to_none, clip)
    return values(model)


def _compare(rank: int, form: str, pair: Pair) -> None:
    start = values(network())
    for set_to_none in (True, False):
        theirs = _ends(form, rank, lambda p: pair.theirs(p, **pair.options), set_to_none)
        ours = _ends(form, rank, lambda p: pair.ours(p, **pair.own), set_to_none)
        assert_same(ours, theirs, start, what=f"{form}, {set_to_none}")
        others = [[torch.empty_like(p) for _ in range(2)] for p in ours]
        for p, copies in zip(ours, others, strict=True):
            dist.all_gather(copies, p)
            assert torch.equal(*copies), form


def _all_forms(rank: int) -> None:
    for pair in PAIRS.values():
        for form in FORMS:
            _compare(rank, form, pair)


def test_every_form_as_under_torchs_optimizer(tmp_path):
    # Catches a gradient that lies in a bucket and is read or replaced as a tensor of its own.
    in_ranks(2, tmp_path, _all_forms)


def _clipped(rank: int) -> None:
    """Every rank has the whole gradient: its own norm is the run's."""
    for form in ("bucket views", "bfloat16 hook"):
        theirs = _ends(form, rank, lambda p: torch.optim.AdamW(p, **ADAMW.options), True, clip=0.05)
        bound = fusedopt.GlobalNorm(0.05)
        ours = _ends(form, rank, lambda p, c=bound: fusedopt.AdamW(p, **ADAMW.own, clip=c), True)
        # The norm is summed in another order.
        assert_same(ours, theirs, values(network()), 1e-7, form)
        assert bound.last is not None and bound.last > 0.05


def test_clipping_in_the_step(tmp_path):
    in_ranks(2, tmp_path, _clipped)
