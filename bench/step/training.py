"""Training steps of a GPT-2, end to end: what an optimizer is worth in tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import fusedopt
from bench.harness import clock, gpt
from bench.harness.contenders import backend_of
from bench.harness.gpt import Size

from . import OURS

MAX_NORM = 1.0
SIZE = Size(tied=True)
TINY = replace(gpt.TINY, tied=True)
# After which losses are compared: updates of another size show in the third.
WARM_UP = 3
# Of bfloat16 products, in losses that have moved by far more.
TOLERANCE = 5e-3
_OPTIONS = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Training(gpt.Training):
    """A training whose gradients are clipped, by the step or in front of it."""

    def __init__(self, contender: str, size: Size, device: torch.device) -> None:
        super().__init__(size, device)
        self.folds_clipping = contender == OURS
        self.optimizer = _optimizer(contender, self.params, device)

    def update(self) -> None:
        """Clip and step."""
        if not self.folds_clipping:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()


def _optimizer(
    contender: str, params: list[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    if contender == OURS:
        clip = fusedopt.GlobalNorm(MAX_NORM)
        return fusedopt.AdamW(params, **_OPTIONS, clip=clip, backend=backend_of(device))
    how = {"torch-fused": {"fused": True}, "torch-foreach": {"foreach": True}}[contender]
    return torch.optim.AdamW(params, **_OPTIONS, **how)


CONTENDERS = (OURS, "torch-fused", "torch-foreach")


def measure(
    size: Size, batch: int, settings: dict[str, Any], advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return a row for each optimizer.

    Args:
        size: of the model.
        batch: sequences in a step.
        settings: "device", "rounds" and "seconds".
        advance: called three times.

    Raises:
        ValueError: where losses differ after a few steps.
        torch.OutOfMemoryError: where the batch does not fit.
    """
    device = torch.device(settings["device"])
    codes = gpt.draw_codes(size, batch, device)
    watch = clock.Clock(device)
    trainings = {name: Training(name, size, device) for name in CONTENDERS}
    _compare(
        {name: [float(x.step(codes)) for _ in range(WARM_UP)] for name, x in trainings.items()}
    )
    advance()
    turns = partial(
        clock.in_turn, clock=watch, rounds=settings["rounds"], seconds=settings["seconds"]
    )
    steps = turns({name: partial(x.step, codes) for name, x in trainings.items()})
    advance()
    for training in trainings.values():
        training.backward(codes)
    updates = turns({name: x.update for name, x in trainings.items()})
    advance()
    summaries = {name: clock.summary(times) for name, times in steps.items()}
    return [
        _row(name, summary, summaries[OURS], clock.summary(updates[name]), codes[:, 1:].numel())
        for name, summary in summaries.items()
    ]


def _row(
    name: str, step: dict[str, Any], ours: dict[str, Any], update: dict[str, Any], tokens: int
) -> dict[str, Any]:
    return {
        "contender": name,
        "tokens_per_second": 1e3 * tokens / step["median"],
        "step_ms": step["median"],
        "optimizer_ms": update["median"],
        "share": update["median"] / step["median"],
        **clock.ratio(step, ours),
    }


def _compare(losses: dict[str, list[float]]) -> None:
    """Raise where the models do not train alike, or do not train."""
    ours = losses[OURS]
    for name, theirs in losses.items():
        apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        if not apart <= TOLERANCE * ours[0]:
            raise ValueError(f"losses of {name} are {theirs}, ours {ours}")
    if not ours[-1] < ours[0]:
        raise ValueError(f"losses do not fall: {ours}")
