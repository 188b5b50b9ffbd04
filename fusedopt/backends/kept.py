"""What is kept of one parameter, as the reference backend reads and writes it, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.codecs.format import CAST, CODES, POSITIVE_CAST, STOCHASTIC
from ..memory import codes, parameter
from ..memory.dtypes import compute_dtype, decode, encode, encode_positive
from ..memory.layout import is_dense, real_view, same_order
from ..memory.rounding import keys, random_bits, spread, stochastic, turned
from .entry import Entries

# Elements that each thread takes of a piece: what a step touches of them fits a second-level cache.
PIECE_OF_THREAD = 1 << 17


class Piece(NamedTuple):
    """A part of what is kept.

    Attributes:
        tensors: parameter and what else is kept, in the order of the address table.
        start: which element is the first.
        stop: which is the first behind it.
        inner: elements of a row, which groups do not leave.
    """

    tensors: Sequence[Tensor]
    start: int
    stop: int
    inner: int


class Kept:
    """What of one parameter's entry is read and written in place: itself, and what is beside it.

    Args:
        entries: that have it.
        row: its row there.
        dtypes: of its operands.
    """

    def __init__(self, entries: Entries, row: int, dtypes: Sequence[torch.dtype]) -> None:
        self.position = entries.positions[row]
        self.options = entries.options
        self.per_sample_inputs = entries.per_sample_inputs
        self.averages = entries.format.average
        self.compute = compute_dtype(dtypes)
        self.tensors = [real_view(column[row]) for column in (entries.params, *entries.states)]
        self._format = entries.format
        self._draw = entries.draws[row] if entries.draws else None
        count = len(self.tensors) - 1 - self._format.has_companion
        self._codecs = self._format.states or (CAST,) * count
        # Where the first tensor of each state is.
        self._rows = self._format.rows(0, len(self._codecs))
        self._scales = set(self._format.scales(0))
        self._keys: tuple[tuple[Any, Any], Any] | None = None
        param = self.tensors[0]
        elementwise = [t for i, t in enumerate(self.tensors) if i not in self._scales]
        in_one_order = is_dense(param) and all(same_order(param, t) for t in elementwise)
        if self._draw is None:
            self._cuttable = in_one_order
        else:
            # Groups and numbers are those of elements in row-major order.
            rowwise = self._draw.walk.is_rowwise(param.numel())
            self._cuttable = in_one_order and param.is_contiguous() and not rowwise
        self._cuttable = self._cuttable and param.numel() > PIECE_OF_THREAD

    def begin(self, step: Any) -> None:
        """Take the number of the step, where codecs draw."""
        if self._draw is not None:
            number = step.to(torch.int64) if isinstance(step, Tensor) else int(step)
            seed, parameter_number, _ = self._draw
            self._keys = keys(seed, parameter_number, number), number

    def pieces(self, inputs: Sequence[Tensor]) -> Iterator[tuple[Piece, Sequence[Tensor]]]:
        """Yield memory and inputs, whole or cut into pieces where all lie in the same order."""
        param = self.tensors[0]
        numel = param.numel()
        if not self._cuttable or not all(same_order(param, x) for x in inputs):
            inner = numel if self._draw is None else self._draw.walk.inner
            yield Piece(self.tensors, 0, numel, inner), inputs
            return
        memory = [t.as_strided((t.numel(),), (1,)) for t in self.tensors]
        flat = [x.as_strided((x.numel(),), (1,)) for x in inputs]
        size = PIECE_OF_THREAD * torch.get_num_threads()
        for start in range(0, numel, size):
            stop = min(start + size, numel)
            tensors = []
            for i, t in enumerate(memory):
                by = codes.GROUP if i in self._scales else 1
                tensors.append(t[start // by : -(-stop // by)])
            yield Piece(tensors, start, stop, stop - start), [x[start:stop] for x in flat]

    def load(self, piece: Piece) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return parameter and states as the rule takes them."""
        own, *rest = piece.tensors
        if self._format.parameter == CAST:
            p = decode(own, self.compute)
        else:
            companion = rest[0] if self._format.has_companion else None
            p = parameter.load(own, companion, self._format.parameter).to(self.compute)
        states = []
        for codec, row in zip(self._codecs, self._rows, strict=True):
            value = piece.tensors[row]
            if codec in CODES:
                value = codes.decode(value, piece.tensors[row + 1], codec, piece.inner)
            states.append(decode(value, self.compute))
        return p, tuple(states)

    def store(self, piece: Piece, p: Tensor, states: Sequence[Tensor]) -> None:
        """Write what the rule returned."""
        bits, thresholds = self._drawn(piece)
        own, *rest = piece.tensors
        if self._format.parameter == CAST:
            encode(own, p)
        else:
            companion = rest[0] if self._format.has_companion else None
            parameter.store(own, companion, p, self._format.parameter, bits)
        for i, (codec, row) in enumerate(zip(self._codecs, self._rows, strict=True)):
            if codec not in CODES:
                self._store_float(piece.tensors[row], states[i], codec, bits)
                continue
            assert thresholds is not None
            found, scale = codes.encode(states[i].float(), codec, piece.inner, thresholds)
            piece.tensors[row].copy_(found)
            piece.tensors[row + 1].copy_(scale.view_as(piece.tensors[row + 1]))

    @staticmethod
    def _store_float(memory: Tensor, value: Tensor, codec: str, bits: Tensor | None) -> None:
        if codec == STOCHASTIC:
            assert bits is not None
            # By the other half of the bits than the parameter.
            memory.copy_(stochastic(value, turned(bits), memory.dtype))
        else:
            (encode_positive if codec == POSITIVE_CAST else encode)(memory, value)

    def _drawn(self, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """Return random bits and thresholds, as ``kernels/codecs/place.py`` draws them."""
        if self._draw is None or self._keys is None:
            return None, None
        (key0, key1), number = self._keys
        own = piece.tensors[0]
        index = self._draw.walk.index(piece.start, piece.stop, own.device)
        bits = thresholds = None
        if self._format.draws_anew:
            bits = random_bits(index, key0, key1).view(own.shape)
        if self._format.has_codes:
            seed, parameter_number, _ = self._draw
            # Cut before it is added: the step may be a tensor, and a seed has 64 bits.
            begin = (seed * 0x85EBCA6B + parameter_number * 0xC2B2AE35) & 0xFFFFFFFF
            turns = (number * 0x9E3779B9 + begin) & 0xFFFFFFFF
            thresholds = spread(index, turns).view(own.shape)
        return bits, thresholds
