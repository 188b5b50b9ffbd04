"""Codes of Adam's states, ours and those of others, as what they make of a state.

A code is a function of a state and of the number of the step that returns the state as it is after
encoding and decoding. States are float32, of one dimension, of a multiple of 256 elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.memory import codes
from fusedopt.memory.rounding import spread

from .minifloat import Minifloat

GROUP = 128
# 2^32 times the golden ratio's fraction.
STRIDE = 0x9E3779B9
Code = Callable[[Tensor, int], Tensor]


@dataclass
class Pair:
    """Codes of both states.

    Attributes:
        title: for tables.
        m: of the first moment.
        v: of the second.
        bytes: of both a parameter, scales included.
        joint: whether m is coded in units of sqrt(v).
    """

    title: str
    m: Code
    v: Code
    bytes: float
    joint: bool = False

    def __call__(self, m: Tensor, v: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return what is left of both states."""
        kept = self.v(v, step)
        if not self.joint:
            return self.m(m, step), kept
        root = v.sqrt()
        return self.m(torch.where(root > 0, m / root, 0.0), step) * kept.sqrt(), kept


def nothing(x: Tensor, step: int) -> Tensor:
    """Keep float32."""
    return x


def bfloat16(x: Tensor, step: int) -> Tensor:
    """Round to bfloat16."""
    return x.bfloat16().float()


class Remainders:
    """What is added before bits are cut off: half a code, random bits, or the dither.

    Args:
        kind: ``"nearest"``, ``"random"`` or ``"dither"``.
        stream: which state it is for.
    """

    def __init__(self, kind: str, stream: int) -> None:
        if kind not in ("nearest", "random", "dither"):
            raise ValueError(f"no rounding {kind!r}")
        self.kind, self.stream = kind, stream
        self._generator = torch.Generator().manual_seed(stream)
        self._index = torch.empty(0, dtype=torch.int64)

    def __call__(self, count: int, step: int) -> Tensor:
        """Return 32 bits for each element."""
        if self.kind == "random":
            return torch.randint(2**32, (count,), generator=self._generator)
        if len(self._index) != count:
            self._index = torch.arange(count)
        return spread(self._index, step * STRIDE & 0xFFFFFFFF).long() & 0xFFFFFFFF


@dataclass(frozen=True)
class Shipped:
    """One of fusedopt's own codecs, as the optimizers use it.

    Attributes:
        codec: its name in ``kernels/codecs/codes.py``.
        signed: whether it is for m.
        largest: the code of 1.
    """

    codec: str
    signed: bool
    largest: int

    def threshold(self, random: Tensor) -> Tensor:
        """Return thresholds of 32 bits that are evenly spread, as patterns."""
        return random.to(torch.int32)

    def encode(self, x: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return codes, int64 [groups, elements], with their sign, and scales, float32 [groups, 1].

        Args:
            x: float32 [groups, elements of a group].
            threshold: int32, elementwise; None: to nearest.
        """
        given = codes.NEAREST if threshold is None else threshold.reshape(x.shape)
        found, scale = codes.encode(x, self.codec, x.shape[-1], given)
        wide = found.view(torch.int8 if found.dtype == torch.int8 else torch.uint8).long()
        if found.dtype == torch.float8_e4m3fn:
            wide = torch.where(wide >= 0x80, 0x80 - wide, wide)
        return wide, scale[:, None]

    def decode(self, found: Tensor, a: Tensor) -> Tensor:
        """Return float32 values of codes [groups, elements] and scales [groups, 1]."""
        dtype = codes.CODES[self.codec].dtype
        if dtype == torch.float8_e4m3fn:
            found = torch.where(found < 0, 0x80 - found, found)
        own = found.to(torch.int8 if dtype == torch.int8 else torch.uint8).view(dtype)
        return codes.decode(own, a, self.codec, found.shape[-1])


class Exact:
    """A code in the form that a kernel computes."""

    def __init__(self, code: Minifloat | Shipped, rounding: str = "nearest") -> None:
        self.code = code
        self._remainders = Remainders(rounding, 0 if code.signed else 1)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        threshold = None
        if self._remainders.kind != "nearest":
            threshold = self.code.threshold(self._remainders(len(x), step)).view(-1, GROUP)
        return self.code.decode(*self.code.encode(x.view(-1, GROUP), threshold)).view(-1)


class Table:
    """Levels between 0 and 1, relative to the largest magnitude of a group.

    Args:
        levels: float64, ascending from 0 to 1.
        signed: whether it is for m.
        rounding: as in ``Remainders``; the latter two are unbiased in the value.
        root: to nearest, thresholds are midpoints of the levels' root of this order.
        group: elements that share a scale.
        zero: whether v > 0 may become 0.
        scale: what the scale is kept as.
        form: the order of the root of the state that is scaled and coded.
    """

    def __init__(
        self,
        levels: Tensor,
        signed: bool,
        rounding: str = "nearest",
        root: float = 1.0,
        group: int = GROUP,
        zero: bool = False,
        scale: torch.dtype = torch.float32,
        form: int = 1,
    ) -> None:
        self.signed, self.group, self.zero = signed, group, zero or signed
        self.scale, self.form = scale, form
        middles = ((levels[1:] ** (1 / root) + levels[:-1] ** (1 / root)) / 2) ** root
        self._levels, self._middles = levels.float(), middles.float()
        self._gaps = levels.diff().float()
        self._remainders = Remainders(rounding, 0 if signed else 1)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        groups = x.view(-1, self.group).abs() ** (1 / self.form)
        a = groups.amax(1, keepdim=True).to(self.scale).float()
        y = torch.where(a > 0, groups / a, 0.0)
        q = self._round(y, step)
        if not self.zero:
            q = torch.where(y > 0, q.clamp(min=1), q)
        kept = ((self._levels[q] * a) ** self.form).view(-1)
        return kept * x.sign() if self.signed else kept

    def _round(self, y: Tensor, step: int) -> Tensor:
        if self._remainders.kind == "nearest":
            return torch.bucketize(y, self._middles)
        low = (torch.bucketize(y, self._levels, right=True) - 1).clamp(max=len(self._gaps) - 1)
        share = (y - self._levels[low]) / self._gaps[low]
        return low + (self._remainders(y.numel(), step).view_as(y) * 2.0**-32 < share)


class Expanded:
    """e4m3 of a power of the state that spreads each group over the range of e4m3 (COAT)."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def __call__(self, x: Tensor, step: int) -> Tensor:
        y = x.view(-1, GROUP).abs()
        a = y.amax(1, keepdim=True)
        least = torch.where(y > 0, y, torch.inf).amin(1, keepdim=True)
        power = (math.log(448 * 512) / (a / least).log()).clamp(max=16.0)
        z = torch.where(a > 0, (y / a) ** power * 448, 0.0)
        q = z.to(torch.float8_e4m3fn).float()
        if not self.signed:
            q = torch.where((y > 0) & (q == 0), 2.0**-9, q)
        kept = torch.where(a > 0, (q / 448) ** (1 / power) * a, 0.0).view(-1)
        return kept * x.sign()


def power(largest: int, exponent: float) -> Tensor:
    """Return the levels (q / largest)^exponent."""
    return (torch.arange(largest + 1, dtype=torch.float64) / largest) ** exponent


def logarithmic(largest: int, octaves: float) -> Tensor:
    """Return 0 and levels of equal ratio."""
    steps = torch.arange(largest, dtype=torch.float64) / (largest - 1)
    return torch.cat([steps.new_zeros(1), 2.0 ** (octaves * (steps - 1))])


def softsign(largest: int) -> Tensor:
    """Return the levels of 2 x / (1 + x)."""
    y = power(largest, 1)
    return y / (2 - y)


def dynamic(signed: bool) -> Tensor:
    """Return the levels of the dynamic map (Dettmers, arXiv 1511.04561): 7 decades below 1.

    The i-th decade from below is cut into 2^i cells, twice as many without sign, and a level is the
    middle of a cell.
    """
    parts = [torch.zeros(1, dtype=torch.float64)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        parts.append(10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2)
    return torch.cat([*parts, parts[0] + 1])


def float8(dtype: torch.dtype) -> Tensor:
    """Return the finite numbers of a type of eight bits that are not negative, over the largest."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()]
    return values / values[-1]
