"""What trainers and libraries are tried with: a small model, its data, and pairs of optimizers.

The reference backend gives torch's bits on a CPU in float32, so that under the same trainer the two
trajectories are to be equal, not close.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusedopt

WIDTH, OUT = 5, 2


class Pair(NamedTuple):
    """An optimizer of ours, torch's, and hyper-parameters of both."""

    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer]
    options: Mapping[str, Any]

    @property
    def own(self) -> dict[str, Any]:
        """Keywords of ours."""
        return {**self.options, "backend": "reference"}


ADAMW = Pair(fusedopt.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1})
SGD = Pair(fusedopt.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1})
PAIRS = {"AdamW": ADAMW, "SGD": SGD}

each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def network(seed: int = 0) -> nn.Sequential:
    """Layers of three kinds, the same for a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, OUT))


def batches(steps: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs ``[size, WIDTH]`` and targets ``[size, OUT]`` for every step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, size, WIDTH, generator=generator)
    y = torch.randn(steps, size, OUT, generator=generator)
    return list(zip(x, y, strict=True))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def values(model: nn.Module) -> list[Tensor]:
    """Copies of a model's trained parameters."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def decoupled(
    model: nn.Module, parameters: Iterable[Tensor] | None = None, **options: Any
) -> fusedopt.BatchDecoupledAdam:
    """Batch-decoupled Adam with ``ADAMW``'s hyper-parameters, fed by the model's samples."""
    return fusedopt.BatchDecoupledAdam(
        model.parameters() if parameters is None else parameters,
        **ADAMW.own,
        statistics=fusedopt.PerSampleSquares(model, backend="reference"),
        **options,
    )


def assert_same(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    start: Sequence[Tensor],
    atol: float = 0.0,
    what: str = "",
) -> None:
    """Assert equal parameters that have moved: by a hundred times the tolerance, each."""
    assert len(actual) == len(expected) == len(start) > 0
    for place, (a, e, s) in enumerate(zip(actual, expected, start, strict=True)):
        apart, moved = float((a - e).abs().max()), float((e - s).abs().max())
        assert moved > 100 * atol, f"{what}: parameter {place} moved by {moved} only"
        assert apart <= atol, f"{what}: parameter {place} is {apart} apart, moved by {moved}"
