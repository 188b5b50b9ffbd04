"""Where a layer's tensors keep their samples, and the form in which squares are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..ops.samples import Samples, segments
from .provenance import Rows, note

Canonical = Callable[[Tensor], Tensor]


class Placement:
    """How ``[..., width]`` is brought into canonical form.

    Args:
        canonical: does it where the batch is a dimension of its own, in the usual place.
        batch_dim: that place.
        rows: which rows belong to which sample, where they are elsewhere; or None.
        count: the number of samples; None where rows are not looked for.
        like: the input, or the samples of its rows.
    """

    def __init__(
        self,
        canonical: Canonical,
        batch_dim: int,
        rows: Rows | None,
        count: int | None,
        like: Tensor,
    ) -> None:
        self._canonical = canonical
        self._batch_dim = batch_dim
        self._rows = rows
        self._count = count
        self._order: Tensor | None = None
        # Which rows of canonical tensors belong to which sample; None for those of the call.
        self.samples: Samples | None = None
        if rows is not None and rows.of is not None:
            assert count is not None
            # All that an index of the dimension holds belongs to its sample.
            others = math.prod(like.shape[:-1]) // max(1, len(rows.of)) if like.dim() > 1 else 1
            self._order, self.samples = segments(rows.of.repeat_interleave(others), count)

    def rows(self, x: Tensor) -> Tensor:
        """Bring ``[..., width]`` into canonical form."""
        rows, order = self._rows, self._order
        if rows is None:
            return self._canonical(x)
        x = x.movedim(rows.dim, 0)
        if order is None:
            assert self._count is not None
            return x.reshape(self._count, -1, x.shape[-1])
        return x.reshape(-1, x.shape[-1])[order]

    def note(self, output: Tensor) -> None:
        """Note the rows of the layer's output, which are those of its input."""
        if self._rows is not None:
            note(output, self._rows)
        elif self._count is not None:
            note(output, Rows(0 if output.dim() < 3 else self._batch_dim))
