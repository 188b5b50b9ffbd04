"""Training steps of a GPT-2, end to end: what an optimizer is worth in tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench import clock
from bench.per_sample.gpt import GPT, Size, backward
from bench.step import OURS
from bench.step.contenders import backend_of

MAX_NORM = 1.0
SIZE = Size(tied=True)
TINY = Size(layers=2, heads=2, width=16, vocabulary=64, length=8, tied=True)
# After which losses are compared: updates of another size show in the third.
WARM_UP = 3
# Of bfloat16 products, in losses that have moved by far more.
TOLERANCE = 5e-3
_OPTIONS = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Arm:
    """A model with its optimizer; the same weights for all."""

    def __init__(self, contender: str, size: Size, device: torch.device) -> None:
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            self.model = GPT(size)
        self.params = list(self.model.parameters())
        self.device = device
        self.folds_clipping = contender == OURS
        self.optimizer = _optimizer(contender, self.params, device)

    def backward(self, codes: Tensor) -> Tensor:
        """Form the gradients of codes ``[batch, length + 1]``; return the loss."""
        self.optimizer.zero_grad()
        return backward(self.model, codes)

    def update(self) -> None:
        """Clip and step."""
        if not self.folds_clipping:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()

    def step(self, codes: Tensor) -> Tensor:
        """Train on a batch; return the loss before."""
        loss = self.backward(codes)
        self.update()
        return loss


def _optimizer(
    contender: str, params: list[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    if contender == OURS:
        clip = fusedopt.GlobalNorm(MAX_NORM)
        return fusedopt.AdamW(params, **_OPTIONS, clip=clip, backend=backend_of(device))
    how = {"torch-fused": {"fused": True}, "torch-foreach": {"foreach": True}}[contender]
    return torch.optim.AdamW(params, **_OPTIONS, **how)


ARMS = (OURS, "torch-fused", "torch-foreach")


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
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(size.vocabulary, (batch, size.length + 1), generator=generator)
    codes = codes.to(device)
    watch = clock.Clock(device)
    arms = {name: Arm(name, size, device) for name in ARMS}
    _compare({name: [float(arm.step(codes)) for _ in range(WARM_UP)] for name, arm in arms.items()})
    advance()
    turns = partial(
        clock.in_turn, clock=watch, rounds=settings["rounds"], seconds=settings["seconds"]
    )
    steps = turns({name: partial(arm.step, codes) for name, arm in arms.items()})
    advance()
    for arm in arms.values():
        arm.backward(codes)
    updates = turns({name: arm.update for name, arm in arms.items()})
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
    """Raise where the arms do not train alike, or do not train."""
    ours = losses[OURS]
    for name, theirs in losses.items():
        apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        if not apart <= TOLERANCE * ours[0]:
            raise ValueError(f"losses of {name} are {theirs}, ours {ours}")
    if not ours[-1] < ours[0]:
        raise ValueError(f"losses do not fall: {ours}")
