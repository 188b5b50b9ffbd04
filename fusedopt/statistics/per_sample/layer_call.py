"""One call of one layer: the samples of its tensors, and the taps of its parameters."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import ops
from .autograd import Mode, ParamTap
from .model_call import ModelCall


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

    def check_rows(self, x: Tensor, shape: torch.Size | None = None) -> None:
        """Raise where the samples of ``[..., width]`` are not the model's.

        Args:
            x: an input.
            shape: of what the layer was called with, where that is another.
        """
        if not self.replayed:
            self.call.rows(x, self.name, self.batch_first, shape)

    def check_images(self, x: Tensor) -> None:
        """Raise where the samples of ``[batch, channels, ...]`` are not the model's."""
        if not self.replayed:
            self.call.images(x, self.name)
