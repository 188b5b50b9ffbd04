"""Norms of gradient, parameter and update, in float64, and steps that they are measured of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from guarded import channels_last, transposed
from torch import Tensor, nn

from fusedopt.memory import parameter as codec

# More than one program's 2,048 elements, more than two's, each with a ragged end.
LARGE = ((2051,), (4099,))


def norm(x: Tensor) -> float:
    """The norm of real and imaginary parts."""
    x = x.detach()
    parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    # A loop of its own: sums of squares, no norm of torch's.
    return parts.double().square().sum().item() ** 0.5


def rows(
    gradients: Sequence[Tensor | None], before: Sequence[Tensor], after: Sequence[Tensor]
) -> Tensor:
    """What ``norms`` has to be: nan for parameters without a gradient."""
    found = []
    for g, p, q in zip(gradients, before, after, strict=True):
        wide = torch.complex128 if p.is_complex() else torch.float64
        update = q.detach().to(wide) - p.detach().to(wide)
        found.append([float("nan")] * 3 if g is None else [norm(g), norm(q), norm(update)])
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 3)


def check(found: Tensor, wanted: Tensor, near: float = 2e-6, unit: float = 2.0**-23) -> None:
    """Assert that norms are right, the update's but for the last digit of the parameter.

    Args:
        found: ``[parameters, 3]``.
        wanted: as much, by hand.
        near: relative tolerance.
        unit: of rounding of what the update was added to.
    """
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan()), f"{found} instead of {wanted}"
    allowed = near * wanted
    allowed[:, 2] += unit * wanted[:, 1]
    wrong = (found.double() - wanted).abs() > allowed
    assert not wrong.any(), f"{found} instead of {wanted}"


def every_layout(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of every size and way to lie in memory."""
    drawn = torch.Generator().manual_seed(3)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).to(dtype)

    def laid(value: Tensor, strides: tuple[int, ...]) -> Tensor:
        return torch.empty_strided(value.shape, strides, dtype=dtype).copy_(value)

    image = values(2, 3, 4, 5)
    table = values(7, 5)
    tensors = [
        *(values(*shape) for shape in LARGE),
        values(),
        values(0),
        values(3, 0, 2),
        values(2060)[1:],  # off any boundary
        laid(image, channels_last(image.shape)),
        laid(table, transposed(table.shape)),
        values(1),
    ]
    return [nn.Parameter(t) for t in tensors]


def give(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Give each parameter its gradient of a step."""
    drawn = torch.Generator().manual_seed(100 + step)
    for p in params:
        kind = torch.complex64 if p.is_complex() else torch.float32
        values = torch.randn(p.shape, generator=drawn, dtype=kind) * scale
        p.grad = torch.empty_like(p).copy_(values)


def whole(optimizer: Any, p: Tensor, master: str | None) -> Tensor:
    """A copy of the parameter, with what a master has of it."""
    kept = optimizer.state[p].get("master") if master else None
    if kept is None:
        return p.detach().clone()
    kind = "float32" if master == "float32" else master
    assert kind is not None
    return codec.load(p.detach(), kept, kind).clone()


def bits(optimizer: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Parameters and states, as copies."""
    found = [p.detach().clone() for p in params]
    for p in params:
        found += [
            v.clone() if isinstance(v, Tensor) else torch.tensor(v)
            for _, v in sorted(optimizer.state.get(p, {}).items())
        ]
    return found


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether tensors are equal to the bit."""
    return len(ours) == len(theirs) and all(
        x.dtype == y.dtype
        and torch.equal(
            x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
        )
        for x, y in zip(ours, theirs, strict=True)
    )
