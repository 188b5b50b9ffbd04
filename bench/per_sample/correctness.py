"""Whether two results are the same numbers, up to the rounding of their type."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.harness.contenders import Mismatch

from .cases import Arithmetic
from .contenders import Result

# In units of the type. Rows, their squares, and results each are rounded once; sums over thousands
# of rows in another order add what counts in float32 alone.
RMS = {"bf16": 4.0, "tf32": 8.0, "fp32": 128.0}
# A weight has millions of elements, the largest of which are several times the root mean square.
MAXIMUM = 16.0
# And of an element that is larger still, as in an embedding's gradient, the two results' roundings:
# in units of the type at its own size.
ROUNDINGS = 4.0


@dataclass(frozen=True)
class Distance:
    """Of two tensors, over the root mean square of one: in the mean and at most."""

    rms: float
    maximum: float


def distance(found: Tensor, wanted: Tensor) -> Distance:
    """Measure how far a tensor is from another."""
    difference = found.float() - wanted.float()
    scale = wanted.float().square().mean().sqrt()
    values = torch.stack([difference.square().mean().sqrt(), difference.abs().max()]) / scale
    rms, maximum = values.tolist()
    return Distance(rms, maximum)


def size_at_maximum(found: Tensor, wanted: Tensor) -> float:
    """Return how large the element is that differs most, over the root mean square."""
    wanted = wanted.float()
    place = (found.float() - wanted).abs().argmax()
    return float(wanted.flatten()[place].abs() / wanted.square().mean().sqrt())


def check(
    what: str,
    found: Tensor,
    wanted: Tensor,
    kind: str,
    arithmetic: Arithmetic,
    other: str = "ours",
) -> Distance:
    """Return the distance; raise Mismatch where it is more than rounding."""
    if found.shape != wanted.shape:
        raise Mismatch(f"{what} is {tuple(found.shape)}, not {tuple(wanted.shape)}")
    result = distance(found, wanted)
    bound = RMS[kind] * arithmetic.unit
    # Not the other way round, for which nan would pass.
    most = MAXIMUM * bound
    if result.maximum > most:
        most = max(most, ROUNDINGS * arithmetic.unit * size_at_maximum(found, wanted))
    if not (result.rms <= bound and result.maximum <= most):
        raise Mismatch(
            f"{what} differs from {other} by {result.rms:.2g} (at most {bound:.2g}) in the mean and"
            f" {result.maximum:.2g} (at most {most:.2g}) in one element, which is"
            f" {size_at_maximum(found, wanted):.3g}, in units of the root mean square"
        )
    return result


def check_results(
    name: str,
    found: Result,
    wanted: Result,
    kind: str,
    arithmetic: Arithmetic,
    other: str = "ours",
) -> dict[str, dict[str, float]]:
    """Compare gradient and squares, if there are any, with others', by default ours."""
    distances = {}
    for part, x, y in zip(("gradient", "squares"), found, wanted, strict=True):
        if x is not None and y is not None:
            distances[part] = asdict(check(f"{part} of {name}", x, y, kind, arithmetic, other))
    return distances
