"""Whether gradients were multiplied by one factor since they arrived, as by ``clip_grad_norm_``.

Of each gradient two numbers are kept, made at the end of a backward pass: its norm, and its sum
under fixed random signs, which sees elements that change places or signs, and is moved by a change
in proportion to it, where the norm is by its square. One factor multiplies both by itself; a change
within rounding of that is not seen. Nothing is read on the host until a gradient has been written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...memory.layout import is_dense, real_view

# How far apart norms may be, relatively. Wide types: sums in another order, a few hundred roundings
# of float32. Narrow ones: every element of a gradient was rounded anew, by half an eps at most.
TOLERANCE = 2.0**-16
# Of the signed sum, in norms: errors of elements and of partial sums add up as random steps do, to
# at most about half of this times the type's tolerance.
SIGNED = 4.0
# Elements that one vector of signs is for; a larger gradient is a matrix of such rows.
WIDTH = 2**14


@torch.no_grad()
def norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return for each gradient its norm and its sum under signs, ``[2]``.

    Costs two reads of the gradients; the norms take a few launches for all of them, the signed sums
    one each, or two for more than ``WIDTH`` elements.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    gradients = [_elements(gradient) for gradient in gradients]
    for i, gradient in enumerate(gradients):
        kinds.setdefault((gradient.device, gradient.dtype), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(gradients)
    for (device, dtype), places in kinds.items():
        own = [gradients[i] for i in places]
        # On a CPU torch's sums of many float32 are off by more than the tolerance.
        wide = torch.float64 if device.type == "cpu" or dtype == torch.float64 else torch.float32
        whole = torch.stack(torch._foreach_norm(own, 2, dtype=wide))
        signed = torch.stack([_signed_sum(gradient) for gradient in own]).to(wide)
        for i, pair in zip(places, torch.stack([whole, signed], 1).unbind(), strict=True):
            found[i] = pair
    return found


def _elements(gradient: Tensor) -> Tensor:
    """Return all elements as a vector, in any order that is the same for the same layout."""
    gradient = real_view(gradient.detach())
    if is_dense(gradient):
        return gradient.as_strided((gradient.numel(),), (1,))
    return gradient.reshape(-1)


def _signed_sum(vector: Tensor) -> Tensor:
    """Sum the elements under fixed random signs, as a number in float32 or wider."""
    # Partial sums of float16 are out of its range.
    vector = vector.float() if vector.dtype == torch.float16 else vector
    rows, rest = divmod(vector.numel(), WIDTH)
    total = vector[rows * WIDTH :].dot(_signs(vector.device, vector.dtype, rest)[:rest])
    wide = torch.promote_types(vector.dtype, torch.float32)
    if rows:
        partial = vector[: rows * WIDTH].view(rows, WIDTH)
        partial = partial.mv(_signs(vector.device, vector.dtype, WIDTH)).to(wide)
        total = total + partial.dot(_signs(vector.device, wide, rows)[:rows])
    return total.to(wide)


def _signs(device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
    """Return at least as many signs; a longer vector begins as a shorter one."""
    return _drawn(device, dtype, 1 << max(count - 1, 0).bit_length())


@lru_cache(maxsize=64)
def _drawn(device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
    # By the CPU, and by a generator of its own, which nobody seeds.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2, (count,), generator=generator, device="cpu")
    return (2 * drawn - 1).to(device, dtype)


def common_factor(
    before: Sequence[Tensor], after: Sequence[Tensor], gradients: Sequence[Tensor]
) -> float | None:
    """Return the factor that all gradients were multiplied by, or None where it is not one.

    Args:
        before: ``norms`` of each gradient as it arrived.
        after: those now.
        gradients: whose they are, for types and sizes.

    Returns:
        A positive number; exactly 1 where no norm has changed. Waits for the device.
    """
    old, new = _on_host(before), _on_host(after)
    squares = [sum(norm**2 for norm, _ in pairs) for pairs in (old, new)]
    if not (all(map(math.isfinite, squares)) and squares[1] > 0.0):
        # All zero, before as after, is any factor at all; zero after is no multiple. What is not
        # finite, and otherwise as it was, was not multiplied: one that is finite would show it.
        return 1.0 if squares == [0.0, 0.0] or _are_same(old, new) else None
    if squares[0] == 0.0:
        return None
    factor = 1.0 if old == new else math.sqrt(squares[1] / squares[0])
    for (norm, signed), (new_norm, new_signed), g in zip(old, new, gradients, strict=True):
        allowed = _rounding(g.dtype) * factor * norm + _smallest(g.dtype) * math.sqrt(g.numel())
        if not abs(new_norm - factor * norm) <= allowed:
            return None
        if not abs(new_signed - factor * signed) <= SIGNED * allowed:
            return None
    return factor


def _are_same(old: list[list[float]], new: list[list[float]]) -> bool:
    """Whether all numbers are as they were, nan for nan."""
    pairs = zip(old, new, strict=True)
    return all(a == b or (a != a and b != b) for x, y in pairs for a, b in zip(x, y, strict=True))


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else TOLERANCE


def _smallest(dtype: torch.dtype) -> float:
    """Return the step between the smallest numbers, by which each element may be off."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _on_host(pairs: Sequence[Tensor]) -> list[list[float]]:
    if len({pair.device for pair in pairs}) == 1:
        return torch.stack([pair.double() for pair in pairs]).tolist()  # type: ignore[no-any-return]
    return [pair.tolist() for pair in pairs]
