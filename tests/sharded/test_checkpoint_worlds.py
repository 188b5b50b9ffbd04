"""Runs that go from 2 processes to 4, to 1 and back, with a checkpoint between each two.

At every stop the run that is saved goes on for a while, and so does one that was loaded from the
file, in the same layout: bit for bit the same. In the end it is compared with one process' run that
was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from ranks import in_worlds
from saving import load, save
from sharded import build, everything, train, whole
from torch import Tensor, nn

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WORLDS = (2, 4, 1, 2)
STEPS = 2
OPTIONS: Mapping[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "alpha": 0.7, "momentum": 0.5, "centered": True},
    "Adam": {"lr": 0.02, "betas": (0.6, 0.8), "amsgrad": True},
    "AdamW": {"lr": 0.02, "betas": (0.6, 0.8), "weight_decay": 0.3},
    "BatchDecoupledAdam": {"lr": 0.02, "betas": (0.6, 0.8)},
}
# For each run and stop: layout, whose class, and the form of the file that it writes.
OURS, TORCHS = fusedopt, torch.optim
RUNS: Mapping[str, tuple[str, list[tuple[str, Any, str]]]] = {
    "sharded": (
        "AdamW",
        [
            ("fsdp", OURS, "sharded"),
            ("hsdp", OURS, "sharded"),
            ("plain", OURS, "sharded"),
            ("tp", OURS, "sharded"),
        ],
    ),
    "torch between": (
        "AdamW",
        [
            ("fsdp", TORCHS, "sharded"),
            ("fsdp", OURS, "flat"),
            ("plain", TORCHS, "each full"),
            ("fsdp", OURS, "sharded"),
        ],
    ),
    "to torch": (
        "Adam",
        [
            ("tp", OURS, "full"),
            ("fsdp+tp", TORCHS, "flat"),
            ("plain", OURS, "flat"),
            ("hsdp", TORCHS, "sharded"),
        ],
    ),
    "full": (
        "Adam",
        [
            ("fsdp", OURS, "full"),
            ("hsdp", OURS, "flat"),
            ("plain", OURS, "full"),
            ("fsdp", OURS, "each full"),
        ],
    ),
    "momentum": (
        "SGD",
        [
            ("hsdp", OURS, "flat"),
            ("tp", OURS, "full"),
            ("plain", TORCHS, "sharded"),
            ("fsdp", OURS, "sharded"),
        ],
    ),
    "centred": (
        "RMSprop",
        [
            ("fsdp", TORCHS, "flat"),
            ("fsdp+tp", OURS, "sharded"),
            ("plain", OURS, "full"),
            ("tp", OURS, "flat"),
        ],
    ),
    "micro-batches": (
        "BatchDecoupledAdam",
        [
            ("fsdp", OURS, "sharded"),
            ("hsdp", OURS, "flat"),
            ("plain", OURS, "full"),
            ("fsdp", OURS, "sharded"),
        ],
    ),
    "torchtitan": (
        "AdamW",
        [
            ("fsdp", TORCHS, "titan"),
            ("fsdp+tp", OURS, "titan"),
            ("plain", OURS, "titan"),
            ("fsdp", TORCHS, "titan"),
        ],
    ),
    "torchtitan, ours alone": (
        "BatchDecoupledAdam",
        [
            ("hsdp", OURS, "titan"),
            ("fsdp", OURS, "titan"),
            ("plain", OURS, "titan"),
            ("fsdp", OURS, "titan"),
        ],
    ),
}


# Whose gradients come of batches, through torch's forward and backward pass, to rounding.
FROM_DATA = ("sharded", "micro-batches")


def _made(name: str, whose: Any, layout: str, seed: int = 0, **other: Any) -> tuple[nn.Module, Any]:
    model = build(layout, seed)
    options = {**OPTIONS[name], **other}
    if whose is OURS:
        # Kernels would run in Triton's interpreter, for minutes.
        options["backend"] = "reference"
    if name == "BatchDecoupledAdam":
        options["statistics"] = fusedopt.MicroBatchSquares()
    return model, getattr(whose, name)(model.named_parameters(), **options)


def _stop(run: str, stop: int, folder: Path) -> None:
    name, stops = RUNS[run]
    layout, whose, form = stops[stop]
    data = run in FROM_DATA
    first = stop * STEPS
    if stop == 0:
        model, optimizer = _made(name, whose, layout)
    else:
        # Other values and another lr than those of the file; half of them have stepped already.
        model, optimizer = _made(name, whose, layout, seed=stop, lr=7.0)
        if stop % 2:
            train(model, optimizer, range(90, 92), layout, data)
        load(model, optimizer, folder / str(stop - 1), stops[stop - 1][2])
    train(model, optimizer, range(first, first + STEPS), layout, data)
    save(model, optimizer, folder / str(stop), form)
    if stop == 3:
        return
    twin, other = _made(name, whose, layout, seed=9, lr=7.0)
    load(twin, other, folder / str(stop), form)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(50, 53), layout, data)
    assert_same_bits(everything(twin, other), everything(model, optimizer), f"{run}, {stop}")


def _at(stop: int, folder: str) -> None:
    for run in RUNS:
        try:
            _stop(run, stop, Path(folder) / run)
        except Exception as error:
            error.add_note(f"{run}, stop {stop}: {RUNS[run][1][stop]}")
            raise


def _uninterrupted(name: str, data: bool) -> dict[str, Tensor]:
    model, optimizer = _made(name, fusedopt, "plain")
    train(model, optimizer, range(STEPS * len(WORLDS)), "plain", data)
    return {key: whole(p) for key, p in model.named_parameters()}


def test_a_run_goes_on_wherever_it_is_loaded(tmp_path: Path) -> None:
    # Catches parameters, states, counts or options that a file, a layout or a class lost or cut
    # otherwise; and what is kept beside the state and moves by one bit.
    in_worlds(WORLDS, tmp_path, _at, str(tmp_path))
    for run, (name, stops) in RUNS.items():
        model, optimizer = _made(name, stops[-1][1], "plain", seed=5, lr=7.0)
        load(model, optimizer, tmp_path / run / str(len(WORLDS) - 1), stops[-1][2])
        exact = run not in FROM_DATA and all(whose is OURS for _, whose, _ in stops)
        bounds = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 2e-5, "atol": 2e-6}
        for key, expected in _uninterrupted(name, run in FROM_DATA).items():
            found = whole(dict(model.named_parameters())[key])
            torch.testing.assert_close(
                found, expected, **bounds, msg=lambda m, at=(run, key): f"{at}: {m}"
            )
