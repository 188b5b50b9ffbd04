"""What an optimizer asks of the norm of all gradients: a bound on it, a guard against spikes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .clipping import GlobalNorm
from .guard import SpikeGuard
from .step.wrappers import check_in_backward


class TakesNorm:
    """The part of an optimizer that holds ``clip`` and ``guard``.

    Attributes:
        param_groups: torch's.
        scaler_on_device: whether a loss scaler keeps its overflow flag on the device.
    """

    param_groups: list[dict[str, Any]]
    scaler_on_device: bool

    @property
    def clip(self) -> GlobalNorm | None:
        """How gradients are clipped; None for not at all. May be set between steps."""
        return self._clip

    @clip.setter
    def clip(self, clip: GlobalNorm | None) -> None:
        if clip is not None and not isinstance(clip, GlobalNorm):
            raise TypeError(f"clip must be a fusedopt.GlobalNorm or None, got {clip!r}")
        self._clip = clip

    @property
    def guard(self) -> SpikeGuard | None:
        """What leaves out steps by their norm; None for nothing. May be set between steps."""
        return self._guard

    @guard.setter
    def guard(self, guard: SpikeGuard | None) -> None:
        check_guard(self, guard)
        if guard is not None:
            guard.attach(self)
        self._guard = guard

    @property
    def step_norm(self) -> GlobalNorm | None:
        """How the norm of all gradients is taken; None where nobody asks for it."""
        if self._clip is not None or self._guard is None:
            return self._clip
        return self._guard.unclipped

    @property
    def decided_on_device(self) -> bool:
        """Whether the device alone knows of a step that it is skipped: counts are there, then."""
        if self.scaler_on_device or self._guard is None:
            return self.scaler_on_device
        first = next((p for group in self.param_groups for p in group["params"]), None)
        return first is not None and first.device.type != "cpu"

    def take_norm(self, saved: Mapping[str, Any]) -> None:
        """Take what a checkpoint says of clip and guard.

        Args:
            saved: ``"clip"``, the arguments of one or None for none, and ``"guard"``; what is not
                there stays as it is.
        """
        clip, guard = saved.get("clip", ...), saved.get("guard")
        if clip is None or (clip is not ... and self.clip is None):
            self.clip = None if clip is None else GlobalNorm(**clip)
        elif clip is not ... and self.clip is not None:
            self.clip.configure(clip)
        if guard is None:
            return
        if self.guard is None:
            self.guard = guard
        else:
            self.guard.take(guard)


def check_guard(optimizer: Any, guard: Any) -> None:
    """Raise for what cannot be an optimizer's guard.

    Raises:
        TypeError: for what is no ``SpikeGuard``, nor None.
        ValueError: for another optimizer's, which would mix their norms.
        RuntimeError: for that of optimizers which backward steps.
    """
    if guard is None:
        return
    if not isinstance(guard, SpikeGuard):
        raise TypeError(f"guard must be a fusedopt.SpikeGuard or None, got {guard!r}")
    owner = guard.other_owner(optimizer)
    if owner is not None:
        check_in_backward(owner)
    guard.check_free(optimizer)
