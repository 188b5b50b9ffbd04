"""Lightning: automatic clipping, mixed precision, accumulation, resuming."""

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

import fusedopt

lightning = pytest.importorskip("lightning")

BATCHES, BATCH = 4, 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


class _Module(lightning.LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make, self.layers = make, network()

    def training_step(self, batch: Any, place: int) -> Tensor:
        x, y = batch
        return (self.layers(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.layers)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _train(
    make: Make,
    epochs: int = 2,
    save: Path | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> list[Tensor]:
    module = _Module(make)
    x, y = (torch.cat(part) for part in zip(*batches(BATCHES, BATCH), strict=True))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    if save is not None:
        trainer.save_checkpoint(save)
    return values(module)


FORMS: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"gradient_clip_val": 0.3, "precision": "bf16-mixed"},
    "accumulated": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _makers(pair: Pair) -> tuple[Make, Make]:
    return (
        lambda model: pair.theirs(model.parameters(), **pair.options),
        lambda model: pair.ours(model.parameters(), **pair.own),
    )


@each_pair
@each_form
def test_as_with_torchs_optimizer(pair: Pair, form: dict[str, Any]) -> None:
    theirs, ours = _makers(pair)
    assert_same(_train(ours, **form), _train(theirs, **form), values(network()))


@each_pair
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume(pair: Pair, precision: str, tmp_path: Path) -> None:
    """From a checkpoint of ours and of torch's, in the middle: as without the interruption."""
    theirs, ours = _makers(pair)
    settings = {"gradient_clip_val": 0.3, "precision": precision}
    whole = _train(ours, **settings)
    for name, first, second in (
        ("ours", ours, ours),
        ("torch's to ours", theirs, ours),
        ("ours to torch's", ours, theirs),
    ):
        file = tmp_path / f"{name}.ckpt"
        _train(first, epochs=1, save=file, **settings)
        assert_same(_train(second, resume=file, **settings), whole, values(network()), what=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_in_the_step(precision: str) -> None:
    theirs = _train(_makers(ADAMW)[0], gradient_clip_val=0.3, precision=precision)
    bound = fusedopt.GlobalNorm(0.3)
    ours = _train(
        lambda model: fusedopt.AdamW(model.parameters(), **ADAMW.own, clip=bound),
        precision=precision,
    )
    # The norm is summed in another order.
    assert_same(ours, theirs, values(network()), atol=1e-6)
    assert bound.last is not None and bound.last > 0.3


def test_squares_of_samples(tmp_path: Path) -> None:
    for form, size in (("norm", BATCH), ("accumulated", 2 * BATCH)):
        theirs = _train(_makers(ADAMW)[0], **FORMS[form])
        ours = _train(lambda m, n=size: decoupled(m, virtual_batch_size=n), **FORMS[form])
        assert_same(ours, theirs, values(network()), what=form)
    file = tmp_path / "saved.ckpt"
    whole = _train(decoupled)
    _train(decoupled, epochs=1, save=file)
    assert_same(_train(decoupled, resume=file), whole, values(network()))


def test_squares_of_samples_in_mixed_precision() -> None:
    """Clipping is the optimizer's there: Lightning takes its own for wrong, and says so."""
    with pytest.raises(RuntimeError, match="BatchDecoupledAdam.*does not allow for gradient clip"):
        _train(decoupled, **FORMS["bf16-mixed"])
    theirs = _train(_makers(ADAMW)[0], **FORMS["bf16-mixed"])
    ours = _train(
        lambda m: decoupled(m, virtual_batch_size=BATCH, clip=fusedopt.GlobalNorm(0.3)),
        precision="bf16-mixed",
    )
    assert_same(ours, theirs, values(network()), atol=1e-6)


def test_squares_cannot_follow_clipping_by_value() -> None:
    with pytest.raises(RuntimeError, match="was changed between backward and step"):
        _train(decoupled, **FORMS["value"])
