"""One call of one layer: the samples of its tensors, and the taps of its parameters."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import ops
from .autograd import Mode, ParamTap
from .model_call import ModelCall
from .placement import Placement
from .provenance import Independent, Rows, rows_of


class LayerCall:
    """One call of one module: what a layer needs besides its arguments.

    Args:
        call: the call of the model.
        name: the module's name, for messages.
        replayed: whether an activation checkpoint runs a part of the model again.
        unplaced: whether it is not known which call of the model that is a part of.
        batch_first: whether the batch is the first dimension of sequences; the model's by default.
    """

    def __init__(
        self,
        call: ModelCall,
        name: str,
        replayed: bool = False,
        unplaced: bool = False,
        batch_first: bool | None = None,
    ) -> None:
        self.call = call
        self.name = name
        self.replayed = replayed
        self.unplaced = unplaced
        self.batch_first = call.options.batch_first if batch_first is None else batch_first

    def in_order(self, batch_first: bool) -> LayerCall:
        """Return the same with the batch in another place."""
        return LayerCall(self.call, self.name, self.replayed, self.unplaced, batch_first)

    def ops(self, *tensors: Tensor) -> ModuleType:
        """Choose where the squares are made."""
        return ops.choose(self.call.options.backend_of(tensors[0]), {t.dtype for t in tensors})

    def tap(self, parameter: Tensor | None, chosen: ModuleType) -> ParamTap | None:
        """Return the parameter's tap; None for one that is absent or frozen."""
        if parameter is None or not parameter.requires_grad:
            return None
        mode = Mode.AUTOGRAD if chosen is ops.reference else Mode.FUSED
        return self.call.tap(parameter, mode, self.unplaced)

    def tap_beside(self, parameter: Tensor) -> ParamTap:
        """Return the tap of a parameter that a module of unknown kind reads by itself."""
        return self.call.tap(parameter, Mode.BESIDE, self.unplaced)

    def rows(self, x: Tensor) -> Tensor:
        """Bring ``[..., width]`` into canonical form."""
        return self.call.rows(x, self.name, self.batch_first)

    def place(self, x: Tensor, shape: torch.Size | None = None) -> Placement:
        """Find out where an input ``[..., width]`` keeps its samples.

        Args:
            x: the input.
            shape: of what the layer was called with, where that is another.

        Raises:
            RuntimeError: where its samples are not the model's.
        """
        batch_dim = 0 if self.batch_first or x.dim() < 3 else 1
        rows = self._rows_elsewhere(x, batch_dim)
        if rows is None and not self.replayed:
            self.call.rows(x, self.name, self.batch_first, shape)
        count = None if self.call.is_packed else self.call.count
        return Placement(self.rows, batch_dim, rows, count, x)

    def samples_of_rows(self, x: Tensor) -> Tensor:
        """Return the sample of each row of an input ``[rows, width]``, int64."""
        self.place(x)
        if self.call.offsets is not None:
            return self.call.samples.of_rows(len(x))
        rows = self._rows_elsewhere(x, 0) or Rows(0)
        return torch.arange(len(x), device=x.device) // rows.each if rows.of is None else rows.of

    def place_rows(self, of: Tensor) -> Placement:
        """Return the placement of rows ``[rows, width]`` whose samples are known."""
        return Placement(self.rows, 0, Rows(0, of=of), self.call.count, of)

    def _rows_elsewhere(self, x: Tensor, batch_dim: int) -> Rows | None:
        """Return the rows of an input whose batch is not where it should be."""
        call = self.call
        if call.is_packed or call.count is None or x.dim() < 2:
            return None
        try:
            rows = rows_of(x, call.count, 0 if call.options.batch_first else 1)
        except Independent:
            raise RuntimeError(
                f"{self.name} was called with an input of shape {tuple(x.shape)} that is computed"
                " from parameters alone, and has nothing to do with the samples of the batch."
                " Repeat it for each of them before (x.expand(batch, -1, -1)), freeze the layer, or"
                " use MicroBatchSquares"
            ) from None
        usual = rows is None or (rows.dim == batch_dim and rows.each == 1 and rows.of is None)
        return None if usual else rows

    def check_images(self, x: Tensor) -> None:
        """Raise where the samples of ``[batch, channels, ...]`` are not the model's."""
        if not self.replayed:
            self.call.images(x, self.name)
