"""One call of the model: how many samples it has, and where a layer's tensors keep them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..ops.samples import Samples
from .autograd import Mode, ParamTap
from .record import Record
from .sample_count import SampleCount


@dataclass(frozen=True)
class CallOptions:
    """What a call of the model takes from the statistics that observe it.

    Attributes:
        sample: ``"sequence"`` or ``"token"``.
        batch_first: whether the batch is the first dimension of sequences.
        record_of: where a parameter's squares are gathered; raises for one that is unknown.
        backend_of: where squares are made of what a tensor's device holds.
        paused: a context in which nothing is observed.
        see: told of a call once a backward pass may reach it.
        told_apart: names of layers that were seen with a batch that no other dimension is equal to.
    """

    sample: str
    batch_first: bool
    record_of: Callable[[Tensor], Record]
    backend_of: Callable[[Tensor], str]
    paused: Callable[[], AbstractContextManager[None]]
    see: Callable[[ModelCall], None]
    told_apart: set[str]


class ModelCall:
    """One call of the model.

    Args:
        options: of the statistics.
        arguments: what the model was called with.
        offsets: bounds of packed samples, or None.
    """

    def __init__(self, options: CallOptions, arguments: Any, offsets: Tensor | None) -> None:
        self.options = options
        self.offsets = offsets
        self._tokens: int | None = None
        self._length: int | None = None
        self._inputs: list[Tensor] = []
        count = None if offsets is None else len(offsets) - 1
        if offsets is None and options.sample == "sequence":
            count, self._length = _batch_size(arguments, options.batch_first)
            self._inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self.counted = SampleCount(count, offsets)
        self._taps: dict[int, ParamTap] = {}
        # For each module of unknown kind, what gathers its calls.
        self.fallbacks: dict[int, Any] = {}

    @property
    def samples(self) -> Samples:
        """Which rows belong to which sample."""
        return self.counted.samples

    @property
    def count(self) -> int | None:
        """How many samples there are; None where the first layer is to tell."""
        return self.counted.count

    @property
    def is_packed(self) -> bool:
        """Whether rows are what belongs to samples: packed, or each token one."""
        return self.offsets is not None or self.options.sample == "token"

    @property
    def is_tapped(self) -> bool:
        """Whether any layer has been seen."""
        return bool(self._taps)

    def tap(self, parameter: Tensor, mode: Mode, unplaced: bool) -> ParamTap:
        """Return the tap of a parameter, one for all its uses in this call."""
        record = self.options.record_of(parameter)
        tap = self._taps.get(id(record))
        if tap is None:
            tap = self._taps[id(record)] = ParamTap(record, self.counted, mode, unplaced)
            self.options.see(self)
        elif tap.mode is not mode and Mode.BESIDE not in (tap.mode, mode):
            # Through a tap that a module goes past, known layers go by autograd.
            raise RuntimeError(
                f"parameter {record.name!r} is shared by modules whose squares are made in"
                " different ways (by a kernel, in PyTorch): they cannot be"
                " combined. Pass backend='reference', or do not share it"
            )
        return tap

    def release(self) -> None:
        """Let go of the graph, which holds what it needs of this; a cycle would outlive it."""
        for tap in self._taps.values():
            tap.close()
        self._taps = {}
        self._inputs = []
        self.fallbacks = {}

    def expand_ids(self, ids: Tensor, name: str) -> Tensor:
        """Repeat ids that are the same for every sample (positions) over the batch.

        Raises:
            RuntimeError: for ids that could be one a sample or one a position.
        """
        if self.is_packed or ids.dim() == 0:
            return ids
        if ids.dim() == 1:
            given = any(ids is x for x in self._inputs)
            if len(ids) == self.counted.count == self._length and not given:
                raise RuntimeError(
                    f"{name} was called with {len(ids)} ids, which is both the batch size and the"
                    " length of the sequence: give positions a batch dimension, [1, length], and"
                    " ids of samples a length, [batch, 1]"
                )
            return ids
        dim = 0 if self.options.batch_first else 1
        if ids.shape[dim] != 1 or self.counted.count in (None, 1):
            self._tell_apart(ids, dim, name)
            return ids
        shape = list(ids.shape)
        shape[dim] = self.counted.count  # type: ignore[call-overload]
        return ids.expand(shape)

    def _tell_apart(self, ids: Tensor, dim: int, name: str) -> None:
        """Raise for ids whose batch may be another dimension of the same size.

        A bias of relative positions looks up ``[length, length]``.
        """
        count = self.counted.count
        if count in (None, 1) or ids.shape[dim] != count:
            return
        others = [*ids.shape[:dim], *ids.shape[dim + 1 :], self._length]
        if count not in others:
            self.options.told_apart.add(name)
            return
        # Views of what the model was called with, and what was repeated over the batch.
        stored = ids.untyped_storage()._cdata
        known = ids.stride(dim) == 0 or any(
            stored == x.untyped_storage()._cdata for x in self._inputs
        )
        if not known and name not in self.options.told_apart:
            raise RuntimeError(
                f"{name} was called with ids of shape {tuple(ids.shape)}, which the model was not"
                f" given, and {count} is both the batch size and a length: whether each sample has"
                " ids of its own, or all share these (relative positions), cannot be told. Call"
                " the model once with a batch of another size before, give it the ids as an"
                " argument, freeze the layer, or use MicroBatchSquares"
            )

    def rows(
        self, x: Tensor, name: str, batch_first: bool, shape: torch.Size | None = None
    ) -> Tensor:
        """Bring ``[..., width]`` into canonical form.

        Args:
            x: an input, or an error.
            name: of the layer, for messages.
            batch_first: whether the batch is the first dimension of sequences.
            shape: of what the layer was called with, for messages; that of x by default.

        Returns:
            ``[batch, length, width]``, or ``[tokens, width]`` where samples are packed. A view
            wherever there is one.
        """
        if self.is_packed:
            flat = x.reshape(-1, x.shape[-1])
            self._check_tokens(len(flat), name)
            return flat if self.offsets is not None else flat.unsqueeze(1)
        if x.dim() < 2:
            raise RuntimeError(f"{name} was called with one sample that has no batch dimension")
        x = x if batch_first or x.dim() == 2 else x.transpose(0, 1)
        self._check_count(len(x), x.shape if shape is None else shape, name)
        return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)

    def images(self, x: Tensor, name: str) -> Tensor:
        """Check ``[batch, channels, ...]``, the form that convolutions take."""
        if self.is_packed:
            raise RuntimeError(f"{name} works on images, which are not made of tokens")
        self._check_count(len(x), x.shape, name)
        return x

    def _check_tokens(self, tokens: int, name: str) -> None:
        if self._tokens is None:
            self._tokens = tokens
            self._check_end(tokens, name)
            if self.offsets is None:
                self.counted.count = tokens
        if tokens != self._tokens:
            raise RuntimeError(
                f"{name} was called with {tokens} tokens, the layers before it with {self._tokens}."
                " Per-token and packed samples need the same tokens in every layer"
            )

    def _check_end(self, tokens: int, name: str) -> None:
        # On a GPU this would wait for the device.
        if self.offsets is not None and self.offsets.device.type == "cpu":
            end = int(self.offsets[-1])
            if end != tokens:
                raise RuntimeError(
                    f"{name} was called with {tokens} tokens, but cu_seqlens ends at {end}"
                )

    def _check_count(self, count: int, shape: torch.Size, name: str) -> None:
        if self.counted.count is None:
            self.counted.count = count
        if count != self.counted.count:
            raise RuntimeError(
                f"{name} was called with an input of shape {tuple(shape)}, in which {count} is not"
                f" the model's batch size {self.counted.count}. Keep the batch dimension first in"
                " every layer (PerSampleSquares(batch_first=False) for second), give positions and"
                " other inputs that samples share a batch dimension of their own, pack sequences by"
                " PerSampleSquares.segments(cu_seqlens), or use MicroBatchSquares, which knows"
                " nothing of layers"
            )


def _batch_size(arguments: Any, batch_first: bool) -> tuple[int | None, int | None]:
    """Batch size and length of the first tensor that the model was called with."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.dim() == 1:
            return leaf.shape[0], None
        if isinstance(leaf, Tensor) and leaf.dim() > 1:
            first, second = leaf.shape[:2]
            return (first, second) if batch_first else (second, first)
    return None, None
