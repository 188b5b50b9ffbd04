"""Opacus: its gradients of samples feed the optimizer; its privacy engine takes plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients import ADAMW, Pair, assert_same, batches, each_pair, loss_of, network, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

opacus = pytest.importorskip("opacus")

STEPS, BATCH = 6, 8


def _fed(options: dict[str, Any]) -> tuple[Any, fusedopt.BatchDecoupledAdam]:
    model = opacus.GradSampleModule(network(), loss_reduction="mean")
    optimizer = fusedopt.BatchDecoupledAdam(
        model.parameters(), **ADAMW.own, statistics=fusedopt.GradSampleSquares(), **options
    )
    return model, optimizer


@pytest.mark.parametrize("virtual", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_samples(virtual: int, parts: int) -> None:
    """As our own, one sample at a time; parts of a batch are lists that Opacus makes."""
    model, optimizer = _fed({"virtual_batch_size": virtual})
    plain = network()
    own = fusedopt.BatchDecoupledAdam(
        plain.parameters(),
        **ADAMW.own,
        statistics=fusedopt.GradSampleSquares(),
        virtual_batch_size=virtual,
    )
    for x, y in batches(STEPS, BATCH):
        optimizer.zero_grad()
        for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss_of(model, part, target).backward()
        optimizer.step()
        rows = [
            torch.autograd.grad(loss_of(plain, x[i : i + 1], y[i : i + 1]), plain.parameters())
            for i in range(BATCH)
        ]
        for p, samples in zip(plain.parameters(), zip(*rows, strict=True), strict=True):
            p.grad_sample = torch.stack(samples)
        own.step()
        own.zero_grad()
    # One sum over the batch, in another order.
    assert_same(values(model), values(plain), values(network()), atol=1e-6)


def test_the_real_batch_as_the_virtual_one() -> None:
    model, optimizer = _fed({"virtual_batch_size": BATCH})
    plain = network()
    theirs = torch.optim.AdamW(plain.parameters(), **ADAMW.options)
    for x, y in batches(STEPS, BATCH):
        for each, by in ((model, optimizer), (plain, theirs)):
            by.zero_grad()
            loss_of(each, x, y).backward()
            by.step()
    assert_same(values(model), values(plain), values(network()), atol=1e-6)


def _private(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    model = network()
    optimizer = make(model)
    x, y = (torch.cat(part) for part in zip(*batches(STEPS, BATCH), strict=True))
    private, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=BATCH),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(3),
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss_of(private, x, y).backward()
        optimizer.step()
    return values(model)


@each_pair
def test_the_privacy_engine(pair: Pair) -> None:
    """It clips samples and adds noise; the optimizer reads the noised gradient alone."""
    torch.manual_seed(0)
    theirs = _private(lambda m: pair.theirs(m.parameters(), **pair.options))
    ours = _private(lambda m: pair.ours(m.parameters(), **pair.own))
    assert_same(ours, theirs, values(network()))


SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "GradSampleSquares": lambda model: fusedopt.GradSampleSquares(),
    "PerSampleSquares": fusedopt.PerSampleSquares,
    "MicroBatchSquares": lambda model: fusedopt.MicroBatchSquares(),
    "BackpackSquares": lambda model: fusedopt.BackpackSquares(batch_size=BATCH),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_privacy_engine_is_refused_for_squares(name: str) -> None:
    """They are not what it releases."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return fusedopt.BatchDecoupledAdam(
            model.parameters(), **ADAMW.own, statistics=SOURCES[name](model)
        )

    with pytest.raises(RuntimeError, match=f"Opacus' privacy engine.*{name}"):
        _private(make)
