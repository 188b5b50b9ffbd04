"""Tensors of any layout inside memory that is watched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tolerances import assert_untouched
from torch import Tensor

# Elements in front of and behind every tensor: more than the largest block of a kernel, so that
# a missing mask shows here and not in another tensor.
MARGIN = 2048


class Guarded:
    """A view into a larger buffer; every element of the buffer outside the view is watched.

    Args:
        values: what the view holds at first; it takes their shape, type and device.
        strides: of the view, in elements; contiguous by default.
        shift: elements by which the view starts off a 16-byte boundary.
    """

    def __init__(
        self, values: Tensor, strides: Sequence[int] | None = None, shift: int = 0
    ) -> None:
        strides = values.contiguous().stride() if strides is None else tuple(strides)
        extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n)
        total = MARGIN + shift + extent + MARGIN
        self.memory = torch.zeros(total, dtype=values.dtype, device=values.device)
        # A value that no update produces from ordinary ones, and that no arithmetic preserves.
        self.memory.fill_(-123.0)
        self.view = self.memory.as_strided(values.shape, strides, MARGIN + shift)
        inside = torch.zeros(total, dtype=torch.bool, device=values.device)
        inside.as_strided(values.shape, strides, MARGIN + shift).fill_(True)
        self.outside = ~inside
        self.view.copy_(values)
        self._before = self.memory[self.outside].clone()

    def check(self, name: str) -> None:
        """Assert that nothing outside the view has changed."""
        assert_untouched(self.memory[self.outside], self._before, f"memory around {name}")


def transposed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in the opposite order."""
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step *= size
    return tuple(strides)


def channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense batch of images with the channel innermost."""
    _, channels, height, width = shape
    return (channels * height * width, 1, channels * width, channels)


def with_holes(shape: Sequence[int], gap: int = 2) -> tuple[int, ...]:
    """Strides of every ``gap``-th element of a contiguous tensor."""
    strides, step = [], gap
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def padded_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of the left part of a wider tensor: dense rows with holes between them."""
    strides, step = [1], shape[-1] + 3
    for size in reversed(shape[:-1]):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
