"""Gradient clipping and loss scaling, folded into the step as one factor on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .coefficients import is_capturing

if TYPE_CHECKING:
    from .backends import Inputs
    from .step.device_group import Lane


class Control:
    """What a launch reads besides coefficients: the gradient's factor, and whether to skip."""

    def __init__(self, device: torch.device) -> None:
        # float64, so that float64 parameters see the factor in full.
        self.values = torch.zeros(2, dtype=torch.float64, device=device)
        self.values[:1].fill_(1.0)
        self.inverse_scale = torch.ones(1, dtype=torch.float64, device=device)
        self.max_norm = torch.ones(1, dtype=torch.float64, device=device)
        self._max_norm = 1.0
        self._neutral = True

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read and write."""
        yield self.values
        yield self.inverse_scale
        yield self.max_norm

    def load(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clipping: bool,
        factor: float = 1.0,
    ) -> None:
        """Take the loss scale and the overflow flag of ``torch.amp.GradScaler``, if any.

        Args:
            grad_scale: what the gradients are to be divided by.
            found_inf: whether to skip the step.
            clipping: whether the factor on the gradient is to be changed by a norm.
            factor: what the gradients are to be multiplied by besides.
        """
        # A captured step must set what an eager one may leave behind.
        unchanged = self._neutral and not is_capturing(self.values.device)
        plain = grad_scale is None and found_inf is None and factor == 1.0
        if plain and unchanged:
            self._neutral = not clipping
            return
        if grad_scale is None:
            self.inverse_scale.fill_(factor)
        else:
            self.inverse_scale.copy_(grad_scale.reshape(1)).reciprocal_().mul_(factor)
        self.values[:1].copy_(self.inverse_scale)
        if found_inf is None:
            self.values[1:].zero_()
        else:
            self.values[1:].copy_(found_inf.reshape(1))
        self._neutral = plain and not clipping

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


class GlobalNorm:
    """Clip the norm of all gradients together, inside the optimizer step.

    ``clip=GlobalNorm(max_norm)`` gives the trajectory of ``torch.nn.utils.clip_grad_norm_``
    followed by the plain step (Pascanu et al., arXiv 1211.5063, algorithm 1): each gradient is
    multiplied by min(1, max_norm / (norm + 1e-6)), where the norm runs over all parameters of all
    groups, devices and types. But gradients are read once more and written never (4 bytes a
    float32 parameter instead of 12), the host does not wait, and the norm's rounding does not
    vary from run to run. Under ``torch.amp.GradScaler`` the norm is that of the unscaled
    gradients, with no call of ``unscale_``.

    The norm is that of this process's parameters. Where ``ZeroRedundancyOptimizer`` or FSDP have
    cut them over processes, clipping is an error, with the way out; other wrappers that cut plain
    parameters cannot be recognised: clip by their own means.

    Args:
        max_norm: the bound, in the unit of the gradients' norm; positive or inf. May be changed
            between steps.
        norm_type: 2 or inf.
        error_if_nonfinite: raise RuntimeError, before anything has changed, where the norm is nan
            or infinite. This reads the norm on the host, once a step.

    Attributes:
        last: the norm before clipping at the latest step, a float32 tensor of shape () on the
            parameters' device; None before the first step. It is overwritten by the next step.
    """

    def __init__(
        self, max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> None:
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.error_if_nonfinite = error_if_nonfinite
        self.last: Tensor | None = None

    # Checked at every assignment: the sign of the bound would become that of the step.

    @property
    def max_norm(self) -> float:
        """The bound."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        if isinstance(value, Tensor):
            raise TypeError("max_norm is a number, got a tensor: use max_norm=float(...)")
        if isinstance(value, (bool, str, bytes)):
            raise TypeError(f"max_norm must be a number, got {value!r}")
        number = _float("max_norm", value)
        if not number > 0:
            raise ValueError(f"max_norm must be positive, got {value}")
        self._max_norm = number

    @property
    def norm_type(self) -> float:
        """The order of the norm."""
        return self._norm_type

    @norm_type.setter
    def norm_type(self, value: float) -> None:
        number = _float("norm_type", value)
        if number not in (2.0, math.inf):
            raise ValueError(f"norm_type must be 2 or inf, got {value}")
        self._norm_type = number

    @property
    def error_if_nonfinite(self) -> bool:
        """Whether a norm that is nan or infinite is an error."""
        return self._error_if_nonfinite

    @error_if_nonfinite.setter
    def error_if_nonfinite(self, value: bool) -> None:
        self._error_if_nonfinite = bool(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # By name: pickles of before had the public ones.
        for name, value in state.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return (
            f"GlobalNorm({self.max_norm}, norm_type={self.norm_type},"
            f" error_if_nonfinite={self.error_if_nonfinite})"
        )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as plain values that a checkpoint can hold."""
        return {
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "error_if_nonfinite": self.error_if_nonfinite,
        }

    def configure(self, config: dict[str, Any]) -> None:
        """Take the constructor's arguments from a checkpoint."""
        fresh = GlobalNorm(**config)
        self.max_norm, self.norm_type = fresh.max_norm, fresh.norm_type
        self.error_if_nonfinite = fresh.error_if_nonfinite

    def apply(self, lanes: Sequence[Lane], inputs: Sequence[Inputs]) -> None:
        """Compute the norm over all lanes and write the factor into each lane's control."""
        infinity = self.norm_type == math.inf
        first = lanes[0]
        partials = [
            lane.part.partial_norms(own, lane.control.inverse_scale, infinity)
            for lane, own in zip(lanes, inputs, strict=True)
        ]
        if len(partials) > 1:
            partials = [torch.cat([x.to(first.device) for x in partials])]
        control = first.control
        control.set_max_norm(self.max_norm)
        if self.last is None or self.last.device != first.device:
            self.last = torch.zeros((), dtype=torch.float32, device=first.device)
        first.part.clip_factor(
            partials[0],
            control.inverse_scale,
            control.max_norm,
            control.values,
            self.last,
            infinity,
        )
        for lane in lanes[1:]:
            lane.control.values[:1].copy_(control.values[:1])
        if self.error_if_nonfinite and not math.isfinite(self.last.item()):
            raise RuntimeError(
                f"the total norm of order {self.norm_type} of the gradients is"
                f" {self.last.item()}: nothing was updated. Pass error_if_nonfinite=False to"
                " clip by it anyway"
            )


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large for a float: {value}") from None
