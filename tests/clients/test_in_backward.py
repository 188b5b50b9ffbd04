"""``torch.distributed.optim._apply_optimizer_in_backward``: an optimizer a parameter."""

from __future__ import annotations

import pytest
import torch
from clients import (
    ADAMW,
    Pair,
    assert_same,
    batches,
    decoupled,
    each_pair,
    loss_of,
    network,
    values,
)
from torch import nn

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def _apply(kind: type, model: nn.Module, options: dict, **keywords) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(kind, model.parameters(), options, **keywords)


def _train(model: nn.Module) -> list[torch.Tensor]:
    for x, y in batches(6, 4):
        loss_of(model, x, y).backward()
        assert all(p.grad is None for p in model.parameters())
    return values(model)


@each_pair
def test_as_with_torchs_optimizer(pair: Pair) -> None:
    # Catches a step that cannot run within backward.
    theirs, ours = network(), network()
    _apply(pair.theirs, theirs, dict(pair.options))
    _apply(pair.ours, ours, pair.own)
    assert_same(_train(ours), _train(theirs), values(network()))


@pytest.mark.parametrize("virtual", [1, 4])
def test_with_squares_of_samples(virtual: int) -> None:
    """A step in the hook of a gradient, whose squares have just arrived."""
    released, plain = network(), network()
    statistics = fusedopt.PerSampleSquares(released, backend="reference")
    options = {**ADAMW.own, "statistics": statistics, "virtual_batch_size": virtual}
    _apply(fusedopt.BatchDecoupledAdam, released, options)
    optimizer = decoupled(plain, virtual_batch_size=virtual)
    for x, y in batches(6, 4):
        optimizer.zero_grad()
        loss_of(plain, x, y).backward()
        optimizer.step()
    assert_same(_train(released), values(plain), values(network()))


@pytest.mark.parametrize("option", ["clip", "guard"])
def test_the_norm_of_one_parameter_is_refused(option: str) -> None:
    """Each optimizer has one parameter: their gradients are never there at the same time."""
    model = network()
    value = fusedopt.GlobalNorm(0.1) if option == "clip" else fusedopt.SpikeGuard()
    with pytest.raises(RuntimeError, match=rf"_apply_optimizer_in_backward.*{option}=None"):
        # A guard cannot be shared, either.
        _apply(fusedopt.AdamW, model, {**ADAMW.own, option: value})
        loss_of(model, *batches(1, 4)[0]).backward()
    assert all(torch.equal(*p) for p in zip(values(model), values(network()), strict=True))
