"""Steps of a GPT with per-sample statistics against steps without, in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench.harness import clock, gpt
from bench.harness.contenders import Mismatch, backend_of
from bench.harness.gpt import Size

from .cases import ARITHMETIC
from .correctness import check

# Before times are taken or memory is counted: states are made in the first step.
WARM_UP = 3
# Steps that a time is taken of: the host runs ahead of the device, as it does in a training.
STEPS = 4


class Training(gpt.Training):
    """A training with statistics, or one without."""

    def __init__(self, size: Size, device: torch.device, observed: bool) -> None:
        super().__init__(size, device)
        self.statistics: fusedopt.PerSampleSquares | None = None
        backend = backend_of(device)
        options: dict[str, Any] = {"lr": 6e-4, "weight_decay": 0.1, "backend": backend}
        if observed:
            self.statistics = fusedopt.PerSampleSquares(self.model, backend=backend)
            self.optimizer = fusedopt.BatchDecoupledAdam(
                self.params, statistics=self.statistics, **options
            )
        else:
            self.optimizer = fusedopt.AdamW(self.params, **options)


def measure(size: Size, settings: dict[str, Any], advance: Callable[[], None]) -> dict[str, Any]:
    """Return times and memory, at the largest batch up to the one asked for that fits.

    Raises:
        Mismatch: where the gradients of the two differ by more than rounding.
        torch.OutOfMemoryError: where not even one sequence fits.
    """
    device, batch = torch.device(settings["device"]), settings["batch"]
    while True:
        found = _try(size, batch, device, settings, advance)
        if found is not None:
            return {"size": vars(size), "batch": batch, **found}
        clock.release()
        if batch == 1:
            raise torch.OutOfMemoryError("a batch of one sequence does not fit")
        batch //= 2


def _try(
    size: Size,
    batch: int,
    device: torch.device,
    settings: dict[str, Any],
    advance: Callable[[], None],
) -> dict[str, Any] | None:
    try:
        return _measure(size, batch, device, settings, advance)
    except torch.OutOfMemoryError:
        # Nothing more here: the error holds on to all that did fit.
        return None


def _measure(
    size: Size,
    batch: int,
    device: torch.device,
    settings: dict[str, Any],
    advance: Callable[[], None],
) -> dict[str, Any]:
    codes = gpt.draw_codes(size, batch, device)
    watch = clock.Clock(device)
    peaks = {}
    for name, observed in (("without", False), ("with", True)):
        # Alone, with its weights and states counted.
        peaks[name] = clock.peak_bytes(partial(_train, size, device, observed, codes), device)
        advance()
    clock.release()
    trainings = {"without": Training(size, device, False), "with": Training(size, device, True)}
    distances = _compare(trainings["without"], trainings["with"], codes, device)
    runs = {name: partial(_steps, training, codes) for name, training in trainings.items()}
    advance()
    times = clock.in_turn(runs, watch, settings["repetitions"], settings["seconds"])
    result: dict[str, Any] = {}
    for name, measured in times.items():
        a_step = [(on_device / STEPS, on_host / STEPS) for on_device, on_host in measured]
        result[name] = clock.summary(a_step) | {"peak_bytes": peaks[name]}
    result |= clock.ratio(result["with"], result["without"])
    advance()
    observed = trainings["with"]
    return {
        "parameters": sum(p.numel() for p in observed.model.parameters()),
        "samples": observed.statistics.samples,
        "gradient_distance": distances,
        **result,
    }


def _steps(training: Training, codes: Tensor) -> None:
    for _ in range(STEPS):
        training.step(codes)


def _train(size: Size, device: torch.device, observed: bool, codes: Tensor) -> Training:
    training = Training(size, device, observed)
    for _ in range(WARM_UP):
        training.step(codes)
    return training


def _compare(
    plain: Training, observed: Training, codes: Tensor, device: torch.device
) -> dict[str, float]:
    """Check that both have the same gradients, and that the squares are those of samples."""
    kind = "fp32" if device.type == "cpu" else "bf16"
    losses = [training.backward(codes).item() for training in (plain, observed)]
    if abs(losses[1] - losses[0]) > 1e-3 * losses[0]:
        raise Mismatch(f"losses are {losses[0]:g} without statistics and {losses[1]:g} with them")
    worst = {"rms": 0.0, "maximum": 0.0}
    named = plain.model.named_parameters()
    for (name, p), q in zip(named, observed.model.parameters(), strict=True):
        found = check(f"gradient of {name}", q.grad, p.grad, kind, ARITHMETIC[kind])
        worst = {key: max(value, getattr(found, key)) for key, value in worst.items()}
        _check_squares(name, q, observed)
    return worst


def _check_squares(name: str, parameter: Tensor, training: Training) -> None:
    """Check that the mean of squares is at least the square of the mean, as it is of anything."""
    mean_square = training.statistics.mean_square(parameter).sum().item()
    squared_mean = parameter.grad.square().sum().item()
    if not 0.99 * squared_mean <= mean_square < float("inf"):
        raise Mismatch(
            f"{name}: mean square {mean_square:g}, but squared mean {squared_mean:g}: no samples"
            " have these"
        )
