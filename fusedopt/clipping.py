"""Gradient clipping, as it is asked for; the step makes one factor on the device of it."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor, distributed


class GlobalNorm:
    """Clip the norm of all gradients together, inside the optimizer step.

    ``clip=GlobalNorm(max_norm)`` gives the trajectory of ``torch.nn.utils.clip_grad_norm_``
    followed by the plain step (Pascanu et al., arXiv 1211.5063, algorithm 1): each gradient is
    multiplied by min(1, max_norm / (norm + 1e-6)), where the norm runs over all parameters of all
    groups, devices and types. But gradients are read once more and written never (4 bytes a
    float32 parameter instead of 12), the host does not wait, and the norm's rounding does not
    vary from run to run. Under ``torch.amp.GradScaler`` the norm is that of the unscaled
    gradients, with no call of ``unscale_``.

    Over several processes the norm is that of all gradients, each part counted once, with one
    collective of one scalar a step, and the same to the bit on every process. Where parameters are
    DTensors, the processes are those that the meshes of the optimizer span; a tensor that is not
    cut along a dimension of them, or is no DTensor, is taken for the same on all of it. Plain
    parameters alone are clipped by this process's norm, as data-parallel replicas are. Where they
    are other ones on each process, ``group`` says which processes belong together;
    ``ZeroRedundancyOptimizer`` and ``FullyShardedDataParallel`` are recognised; the latter is taken
    to cut over all processes (for ``HYBRID_SHARD``, name the group of a shard). Every process of
    the group has to step, with gradients or without.

    Args:
        max_norm: the bound, in the unit of the gradients' norm; positive or inf. May be changed
            between steps.
        norm_type: 2 or inf.
        error_if_nonfinite: raise RuntimeError, before anything has changed, where the norm is nan
            or infinite, on every process. This reads the norm on the host, once a step.
        group: the process group over which the norm is summed, as the processes of all stages of a
            pipeline; None for what is said above. Pickles come without it.

    Attributes:
        last: the norm before clipping at the latest step, a float32 tensor of shape () on the
            parameters' device; None before the first step. It is overwritten by the next step.
    """

    def __init__(
        self,
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.error_if_nonfinite = error_if_nonfinite
        self.group = group
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

    @property
    def group(self) -> Any:
        """The process group that was named, or None."""
        return self._group

    @group.setter
    def group(self, value: Any) -> None:
        if value is not None and not _is_group(value):
            raise TypeError(f"group must be a process group of torch.distributed, got {value!r}")
        self._group = value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> GlobalNorm:
        # The group is a connection, of which there is no copy.
        fresh = GlobalNorm(**self.config(), group=self.group)
        fresh.last = copy.deepcopy(self.last, memo)
        return fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        # By name: pickles of before had the public ones.
        self._group = None
        for name, value in state.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return (
            f"GlobalNorm({self.max_norm}, norm_type={self.norm_type},"
            f" error_if_nonfinite={self.error_if_nonfinite})"
        )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for the group, as a checkpoint can hold them."""
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


def _is_group(value: Any) -> bool:
    return distributed.is_available() and isinstance(value, distributed.ProcessGroup)


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large for a float: {value}") from None
