"""The guard against spikes, as it is asked for, and what it remembers of the norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .clipping import GlobalNorm
from .kernels.guard import ACCEPTED, BOUND, HEADER, SKIPPED, ZSCORE
from .memory.device import is_capturing
from .owned import Owned

# Of a saved state: the constructor's arguments, and the tensors with their types.
_ARGUMENTS = ("zscore", "window", "min_steps")
_SCALARS = {"accepted": ACCEPTED, "skipped": SKIPPED, "last_zscore": ZSCORE}


class SpikeGuard(Owned):
    """Leave out steps whose gradients are not finite, or larger than the last ones by far.

    ``guard=SpikeGuard()`` compares the global norm of a step, that of ``clip`` before clipping,
    with those of the last ``window`` steps that were taken: its z-score is (norm - mean) / standard
    deviation (of n - 1), as in the skipped steps of OLMo 2 (arXiv 2501.00656). A step above the
    bound, or with a norm that is nan or infinite, changes nothing: no parameter, state or step
    count, on no process. Small norms are no spikes. Nothing is decided but that norms are finite
    before ``min_steps`` were taken, nor while all norms of the window are equal.

    The decision falls in the kernel that forms clip's factor, so that it costs no launch and no
    read of a gradient beside clipping, and the host does not learn of it: on a GPU step counts are
    kept there. (It is asked at steps that create states, of which a skipped one leaves none, and
    where counts are on the host because parameters are.) Without ``clip`` the norm is taken all the
    same; for the maximum, or another process group, pass ``clip=GlobalNorm(math.inf, ...)``.

    An overflow that ``torch.amp.GradScaler`` finds is skipped as ever, and not counted: the scale
    was at fault. Neither is a norm of exactly 0, as of the step in which distributed checkpoint has
    states created: such a step is taken, and its norm not taken in. Under
    ``GlobalNorm(error_if_nonfinite=True)`` a norm that is not finite is counted, and raises.

    Where norms have grown for good, as after a change of the data, all steps are skipped, since
    only norms of steps that were taken count: watch ``skipped``, and call ``restart()``.
    ``fusedopt.scaling.rescale_`` does.

    A guard is one optimizer's: another may have it once that has none, or is gone.

    Args:
        zscore: the bound; positive and finite.
        window: how many norms are remembered, at least 2.
        min_steps: how many there must be for a decision, from 2 to ``window``.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for others without meaning.
    """

    role = "guard"

    def __init__(self, zscore: float = 6.0, window: int = 128, min_steps: int = 64) -> None:
        self._zscore = _bound(zscore)
        self._window = _whole("window", window)
        self._min_steps = _whole("min_steps", min_steps)
        if self._window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        if not 2 <= self._min_steps <= self._window:
            raise ValueError(
                f"min_steps must be from 2 to window, which is {window}, got {min_steps}: the"
                " deviation of fewer than 2 norms is none, and more than window are not kept"
            )
        # Where the norm is taken for this alone: it has no bound.
        self.unclipped = GlobalNorm(math.inf)
        self._record = torch.zeros(HEADER + self._window, dtype=torch.float64, device="cpu")
        self._record[ZSCORE] = math.nan
        self._record[BOUND] = self._zscore

    @property
    def zscore(self) -> float:
        """The bound. As the other arguments, of a guard for good: give the optimizer another."""
        return self._zscore

    @property
    def window(self) -> int:
        """How many norms are remembered."""
        return self._window

    @property
    def min_steps(self) -> int:
        """How many there must be for a decision."""
        return self._min_steps

    @property
    def skipped(self) -> Tensor:
        """How many steps were left out: int64 of shape (), a copy on the parameters' device."""
        return self._record[SKIPPED].to(torch.int64)

    @property
    def last_zscore(self) -> Tensor:
        """The z-score of the latest step: float64 of shape (), a copy on the parameters' device.

        nan where there was none: before ``min_steps``, for equal norms, and for a norm of nan.
        """
        return self._record[ZSCORE].clone()

    def restart(self) -> None:
        """Forget the norms, as for another batch size: nothing is decided for ``min_steps``."""
        self._record[ACCEPTED].zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None}

    def record_on(self, device: torch.device) -> Tensor:
        """Return what kernels read and write: see ``fusedopt/kernels/guard.py``.

        Raises:
            RuntimeError: where it would have to be brought there while a CUDA graph is captured.
        """
        if self._record.device != device:
            if is_capturing(device):
                raise RuntimeError(
                    "a CUDA graph is being captured, and this SpikeGuard has not been used on"
                    f" {device}: take one step with it before the capture"
                )
            self._record = self._record.to(device)
        return self._record

    def state(self) -> dict[str, Any]:
        """Return arguments, counts, latest z-score and norms, as a checkpoint can hold them."""
        copied = self._record.clone()
        return {
            **{name: getattr(self, name) for name in _ARGUMENTS},
            **{name: copied[index] for name, index in _SCALARS.items()},
            "norms": copied[HEADER:],
        }

    @classmethod
    def from_state(cls, state: Any) -> SpikeGuard:
        """Return the guard that ``state()`` is of.

        Raises:
            ValueError: for what is no such state.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the guard of the checkpoint is no dictionary, but {state!r}")
        for name in (*_ARGUMENTS, *_SCALARS, "norms"):
            if name not in state:
                raise ValueError(f"the guard of the checkpoint has no {name!r}")
        guard = cls(**{name: state[name] for name in _ARGUMENTS})
        shapes = {**dict.fromkeys(_SCALARS, ()), "norms": (guard.window,)}
        for name, shape in shapes.items():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(
                    f"{name!r} of the guard of the checkpoint must be a tensor of shape"
                    f" {shape}, got {value!r}"
                )
        guard._record = guard._record.to(state["norms"].device)
        for name, index in _SCALARS.items():
            guard._record[index].copy_(state[name])
        guard._record[HEADER:].copy_(state["norms"])
        return guard

    def take(self, other: SpikeGuard) -> None:
        """Become what another guard is; where the window is as long, in the same memory."""
        self._zscore, self._min_steps = other.zscore, other.min_steps
        if self._window == other.window:
            self._record.copy_(other._record)
        else:
            self._window, self._record = other.window, other._record.to(self._record.device)

    def __repr__(self) -> str:
        return f"SpikeGuard({self.zscore}, window={self.window}, min_steps={self.min_steps})"


def _bound(value: Any) -> float:
    if isinstance(value, (bool, str, bytes, Tensor)):
        raise TypeError(f"zscore must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"zscore must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"zscore is too large for a float: {value}") from None
    if not 0 < number < math.inf:
        raise ValueError(f"zscore must be positive and finite, got {value}")
    return number


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value
