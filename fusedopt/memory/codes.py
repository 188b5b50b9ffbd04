"""The PyTorch twin of ``kernels/codecs/codes.py``: states in 8 bits.

The codecs, and why they are what they are, are described there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that share a scale.
GROUP = 128


@dataclass(frozen=True)
class Power:
    """A power code.

    Attributes:
        dtype: of the codes.
        signed: whether there are codes below 0.
        power: K.
        largest: N.
    """

    dtype: torch.dtype
    signed: bool
    power: int
    largest: int

    @property
    def _top(self) -> int:
        """The pattern of N."""
        pattern: int = _pattern(torch.tensor(float(self.largest), device="cpu")).item()  # type: ignore[assignment]
        return pattern

    def level(self, code: Tensor) -> Tensor:
        """Return what codes from 0 to N stand for, relative to the scale."""
        pattern = (_pattern(code.float()) - self._top) * self.power + ONE
        return torch.where(code > 0, pattern, 0).view(torch.float32)

    def encode(self, pattern: Tensor, thresholds: Tensor | int) -> Tensor:
        """Round shares of the largest, patterns up to that of 1, to codes, int32."""
        top = self._top
        first = (ONE - top) * self.power + ONE
        found = ONE + (pattern - first).clamp(min=0) // self.power
        behind = 150 - (found >> 23)
        unit = torch.ones_like(found) << behind
        code = ((found & 0x7FFFFF) | 0x800000) >> behind
        low = ((found & -unit) - top) * self.power + ONE
        high = low + unit * self.power
        if self.signed:
            below = pattern < first
            high, low = torch.where(below, low, high), torch.where(below, 0, low)
            code = torch.where(below, 0, code)
        low, high = low.view(torch.float32), high.view(torch.float32)
        gap, share = high - low, pattern.view(torch.float32)
        noise = (thresholds >> 9) & 0x7FFFFF
        threshold = noise.float() * 2.0**-23 if isinstance(noise, Tensor) else noise * 2.0**-23
        up = share - low > threshold * gap if self.signed else high - share < threshold * gap
        return code + up


@dataclass(frozen=True)
class Float8:
    """A float code: attributes as of ``Power``."""

    dtype: torch.dtype
    signed: bool

    def level(self, code: Tensor) -> Tensor:
        """Return what codes from 0 to 126 stand for, relative to the scale."""
        # In integers, since a processor may be told to take subnormal numbers for zero.
        small = code.float() * 2.0**-17
        normal = ((code << 20) + (112 << 23)).view(torch.float32)
        return torch.where(code < 8, small, normal) * _INVERSE_TOP

    def encode(self, pattern: Tensor, thresholds: Tensor | int) -> Tensor:
        """Round shares of the largest, patterns up to that of 1, to codes, int32."""
        share = pattern.view(torch.float32) * 1.75
        pattern = _pattern(share)
        units = (share.clamp(max=2.0**-14) * 2.0**37).round().to(torch.int32)
        wide = torch.where(pattern < 113 << 23, units, pattern - (112 << 23))
        return ((wide + ((thresholds >> 12) & 0xFFFFF)) >> 20).clamp(max=126)


def _pattern(x: Tensor) -> Tensor:
    return x.view(torch.int32)


# The pattern of 1.0.
ONE = 0x3F800000
# As a float32, as which the kernel has it.
_INVERSE_TOP = torch.tensor(1 / 1.75, device="cpu").item()

CODES: dict[str, Power | Float8] = {
    "signed": Power(torch.int8, True, 3, 127),
    "unsigned": Power(torch.uint8, False, 6, 255),
    "float8": Float8(torch.float8_e4m3fn, True),
    "positive float8": Float8(torch.float8_e4m3fn, False),
}
# Thresholds that round to nearest.
NEAREST = 1 << 31


def grouped(values: Tensor, inner: int) -> Tensor:
    """Arrange values in groups, ``[groups, GROUP]``; where a group is short, zeros follow.

    Args:
        values: of any shape.
        inner: elements of a row: groups end where rows do.
    """
    if not values.numel():
        return values.new_empty(0, GROUP)
    rows = values.reshape(-1, inner)
    short = -rows.shape[1] % GROUP
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    return rows.reshape(-1, GROUP)


def ungrouped(groups: Tensor, like: Tensor, inner: int) -> Tensor:
    """Undo ``grouped``, for values of the shape of ``like``."""
    if not like.numel():
        return groups.new_empty(like.shape)
    rows = like.numel() // inner
    return groups.reshape(rows, -1)[:, :inner].reshape(like.shape)


def encode(
    value: Tensor, codec: str, inner: int, thresholds: Tensor | int = NEAREST
) -> tuple[Tensor, Tensor]:
    """Encode values.

    Args:
        value: float32, of any shape.
        codec: a key of ``CODES``.
        inner: elements of a row.
        thresholds: int32 of that shape, as of the kernel; to nearest by default. The unsigned code
            takes what they leave of 1.

    Returns:
        Codes of that shape, and the scales, float32 ``[groups]``.
    """
    code = CODES[codec]
    groups = grouped(value, inner)
    scale = _scales(groups)
    raised = torch.where(scale < 2.0**-62, 2.0**64, 1.0)
    inverse = torch.where(scale == 0, 1.0, scale * raised).reciprocal()
    share = groups.abs() * raised[:, None] * inverse[:, None]
    noise = grouped(thresholds, inner) if isinstance(thresholds, Tensor) else thresholds
    found = code.encode((_pattern(share) + 2).clamp(max=ONE), noise)
    if not code.signed:
        found = torch.where(groups > 0, found.clamp(min=1), 0)
    elif code.dtype == torch.int8:
        found = torch.where(groups < 0, -found, found)
    else:
        found = torch.where(groups < 0, found | 0x80, found)
    codes = found.to(torch.int8 if code.dtype == torch.int8 else torch.uint8)
    return ungrouped(codes, value, inner).view(code.dtype), scale


def _scales(groups: Tensor) -> Tensor:
    """Return the largest magnitude of each group, or nan where one is not finite."""
    if not len(groups):
        return groups.new_empty(0)
    pattern = (_pattern(groups) & 0x7FFFFFFF).amax(1)
    return torch.where(pattern < 0x7F800000, pattern, 0x7FC00000).view(torch.float32)


def decode(codes: Tensor, scale: Tensor, codec: str, inner: int) -> Tensor:
    """Decode, to float32 of the shape of the codes.

    Args:
        codes: as of ``encode``.
        scale: float32, one a group, in any shape.
        codec: a key of ``CODES``.
        inner: elements of a row.
    """
    groups = grouped(_patterns(codes), inner)
    return ungrouped(_decoded(groups, scale.reshape(-1, 1), codec), codes, inner)


def _patterns(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


def _decoded(patterns: Tensor, scales: Tensor, codec: str) -> Tensor:
    code = CODES[codec]
    wide = patterns.to(torch.int32)
    magnitude, below = wide, wide < 0
    if code.dtype == torch.int8:
        magnitude = wide.abs()
    elif code.dtype == torch.float8_e4m3fn:
        magnitude, below = wide & 0x7F, wide >= 0x80
    found = code.level(magnitude) * scales
    if code.signed:
        return torch.where(below, -found, found)
    # A product above 0 must not become 0.
    pattern = _pattern(found)
    return torch.where((magnitude > 0) & (pattern == 0), 1, pattern).view(torch.float32)


def regroup(codes: Tensor, scales: Tensor, codec: str, inner: int) -> tuple[Tensor, Tensor]:
    """Bring codes whose scales are known one by one into groups.

    A group of one scale stays as it is. Another is rounded to nearest, by a scale of its own.

    Args:
        codes: as of ``encode``.
        scales: float32, of the same shape: that of each.
        codec: a key of ``CODES``.
        inner: elements of a row.

    Returns:
        As ``encode``.
    """
    found, scale = encode(_decoded(_patterns(codes), scales, codec), codec, inner)
    patterns = grouped(_pattern(scales), inner)
    # Where a group is short, zeros follow.
    present = grouped(torch.ones_like(scales, dtype=torch.bool), inner)
    alike = ((patterns == patterns[:, :1]) | ~present).all(1)
    each = ungrouped(alike[:, None].expand(-1, GROUP), codes, inner)
    kept = torch.where(each, _patterns(codes), _patterns(found)).view(found.dtype)
    return kept, torch.where(alike, patterns[:, 0].view(torch.float32), scale)
