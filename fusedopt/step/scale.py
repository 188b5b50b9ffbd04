"""What a launch reads on the device besides coefficients: loss scale, clipping, overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..memory.device import is_capturing


class GradScale:
    """What a launch reads besides coefficients.

    Attributes:
        values: float64 ``[3]``: the gradient's factor, whether to skip, and the factor without
            clipping, which norms are taken with.
        inverse_scale: the last of them.
        max_norm: the bound that gradients are clipped to.
    """

    def __init__(self, device: torch.device) -> None:
        # float64, so that float64 parameters see the factor in full.
        self.values = torch.ones(3, dtype=torch.float64, device=device)
        self._factor, self._skip, self.inverse_scale = self.values.split(1)
        self._skip.zero_()
        self.max_norm = torch.ones(1, dtype=torch.float64, device=device)
        self._one = torch.ones(1, dtype=torch.float64, device=device)
        self._max_norm = 1.0
        # What was written last, where the host knows it: work for what is there already would cost
        # a launch each.
        self._held: dict[str, float | None] = {"factor": 1.0, "inverse": 1.0, "skip": 0.0}
        self._captured = False

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read and write."""
        yield self.values
        yield self.max_norm
        yield self._one

    def release(self) -> None:
        """Take it that no replay writes here any more."""
        self._captured = False
        self._held = dict.fromkeys(self._held)

    def load(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clipping: bool,
        factor: float = 1.0,
        guarded: bool = False,
        measured: bool = False,
    ) -> None:
        """Take the loss scale and the overflow flag of ``torch.amp.GradScaler``, if any.

        Args:
            grad_scale: what the gradients are to be divided by.
            found_inf: whether to skip the step.
            clipping: whether the factor on the gradient is made of the inverse scale and a norm.
            factor: what the gradients are to be multiplied by besides.
            guarded: whether what skips the step is written with the factor.
            measured: whether the inverse scale is read without clipping, too.
        """
        # A captured step must set what an eager one may leave behind, and from then on a replay may
        # have set it, too.
        self._captured = self._captured or is_capturing(self.values.device)
        if self._captured:
            self._held = dict.fromkeys(self._held)
        if not clipping and (grad_scale is not None or self._held["factor"] != factor):
            self._take_scale("factor", self._factor, grad_scale, factor)
        if (clipping or measured) and (grad_scale is not None or self._held["inverse"] != factor):
            self._take_scale("inverse", self.inverse_scale, grad_scale, factor)
        if clipping:
            self._held["factor"] = None
        if found_inf is not None:
            self._skip.copy_(found_inf.reshape(1))
            self._held["skip"] = None
        elif self._held["skip"] != 0.0 and not guarded:
            self._skip.zero_()
            self._held["skip"] = 0.0

    def _take_scale(
        self, name: str, target: Tensor, grad_scale: Tensor | None, factor: float
    ) -> None:
        self._held[name] = None if grad_scale is not None else factor
        if grad_scale is None:
            target.fill_(factor)
        else:
            torch.div(self._one, grad_scale.to(target.device).reshape(1), out=target)
            if factor != 1.0:
                target.mul_(factor)

    def square_into(self, squares: Sequence[Tensor]) -> None:
        """Multiply squares by the square of the factor on the gradient."""
        if self._held["factor"] == 1.0:
            return
        for dtype in {x.dtype for x in squares}:
            factor = self.values[0].square().to(dtype)
            torch._foreach_mul_([x for x in squares if x.dtype == dtype], factor)

    def skip_is_decided(self) -> None:
        """Take it that a kernel has written whether to skip."""
        self._held["skip"] = None

    def skip_unless_finite(self, total: Tensor) -> None:
        """Skip the step where the sum over all processes shows an overflow of another."""
        finite = total.reshape(1).isfinite()
        self._skip.copy_(torch.where(finite, self._skip, 1.0))
        self._held["skip"] = None

    def set_max_norm(self, value: float) -> None:
        """Take a new bound on the norm."""
        if value != self._max_norm:
            if is_capturing(self.max_norm.device):
                raise RuntimeError(
                    f"max_norm changed from {self._max_norm} to {value} since the last step, and a"
                    " CUDA graph is being captured: call optimizer.push_hyperparameters() before"
                )
            self.max_norm.fill_(value)
            self._max_norm = value
