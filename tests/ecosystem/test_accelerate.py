"""Accelerate: prepare, clipping, accumulation, save_state and load_state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import (
    ADAMW,
    Pair,
    assert_same,
    batches,
    decoupled,
    each_pair,
    network,
    values,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

STEPS, BATCH, ACCUMULATED, SAVED = 8, 4, 2, 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


def _fresh(**settings: Any) -> Any:
    from accelerate.state import AcceleratorState, GradientState

    # Settings of a process, which keep those of the test before.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **settings)


def _train(
    make: Make,
    precision: str = "no",
    by: str = "norm",
    save: Path | None = None,
    load: Path | None = None,
) -> list[Tensor]:
    accelerator = _fresh(mixed_precision=precision)
    model = network()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    x, y = (torch.cat(part) for part in zip(*batches(STEPS, BATCH), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    prepared = accelerator.prepare(model, optimizer, loader, schedule)
    model, optimizer, loader, schedule = prepared
    if load is not None:
        accelerator.load_state(str(load))
    for place, (x, y) in enumerate(loader):
        if load is not None and place < SAVED:
            continue
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients and by == "norm":
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            if accelerator.sync_gradients and by == "value":
                accelerator.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if save is not None and place == SAVED - 1:
            accelerator.save_state(str(save))
    return values(accelerator.unwrap_model(model))


FORMS = [("no", "norm"), ("no", "value"), ("bf16", "norm")]


@each_pair
@pytest.mark.parametrize(("precision", "by"), FORMS)
def test_as_with_torchs_optimizer(pair: Pair, precision: str, by: str) -> None:
    theirs = _train(lambda m: pair.theirs(m.parameters(), **pair.options), precision, by)
    ours = _train(lambda m: pair.ours(m.parameters(), **pair.own), precision, by)
    assert_same(ours, theirs, values(network()))


@each_pair
def test_save_state_and_load_state(pair: Pair, tmp_path: Path) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return pair.ours(model.parameters(), **pair.own)

    whole = _train(make, save=tmp_path)
    assert_same(_train(make, load=tmp_path), whole, values(network()))
    theirs = _train(lambda m: pair.theirs(m.parameters(), **pair.options), load=tmp_path)
    assert_same(theirs, whole, values(network()), what="torch's, from ours")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_squares_of_samples(precision: str, tmp_path: Path) -> None:
    def make(size: int) -> Make:
        return lambda model: decoupled(model, virtual_batch_size=size)

    start = values(network())
    theirs = _train(lambda m: torch.optim.AdamW(m.parameters(), **ADAMW.options), precision)
    same = _train(make(BATCH * ACCUMULATED), precision)
    assert_same(same, theirs, start)
    whole = _train(make(1), precision, save=tmp_path)
    assert_same(_train(make(1), precision, load=tmp_path), whole, start)
    assert not torch.allclose(whole[0], theirs[0], atol=1e-4)
