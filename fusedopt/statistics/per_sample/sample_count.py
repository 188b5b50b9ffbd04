"""The samples of one call of the model, as the parameters' squares see them."""

from __future__ import annotations

from torch import Tensor

from ..ops.samples import Samples


class SampleCount:
    """How many samples a call of the model has, and whether they have been counted.

    Args:
        count: their number; None where the first layer is to tell.
        offsets: bounds of packed samples, or None.

    Attributes:
        base: how many samples the statistics had seen before these; None until these are counted.
        backwards: backward passes in which something behind a layer of the call has arrived.
    """

    def __init__(self, count: int | None, offsets: Tensor | None) -> None:
        self.count = count
        self.offsets = offsets
        self.base: int | None = None
        self.backwards: set[int] = set()
        self._finished: set[int] = set()

    @property
    def samples(self) -> Samples:
        """Which rows belong to which sample."""
        assert self.count is not None, "no layer has been called yet"
        return Samples(self.count, self.offsets)

    def finish(self, key: int, name: str) -> None:
        """Note that a parameter's squares are being made, which happens once in a call.

        Args:
            key: of the parameter.
            name: its name, for the message.
        """
        if key in self._finished:
            raise RuntimeError(
                f"the gradient of {name!r} arrives in several pieces from one call of the"
                " model, so that the pieces of a sample cannot be added before they are squared."
                " Either there are two backward passes through the same graph: add the losses and"
                " call backward once. Or a module is used by several activation checkpoints: pass"
                " use_reentrant=False to them"
            )
        self._finished.add(key)
