"""What one optimizer has at a time: its guard, its telemetry, the average of its weights."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar


class Owned:
    """A part of an optimizer that another may have once that has it no more, or is gone."""

    # What it is called: as an argument, and with an underscore where an optimizer holds it.
    role: ClassVar[str]

    # Pickles of before have none, and copies are nobody's.
    _optimizer: weakref.ref[Any] | None = None

    def attach(self, optimizer: Any) -> None:
        """Take an optimizer as the one that has it.

        Raises:
            ValueError: where that is another one's.
        """
        self.check_free(optimizer)
        self._optimizer = weakref.ref(optimizer)

    def check_free(self, optimizer: Any) -> None:
        """Raise ValueError where another optimizer has it."""
        if self.other_owner(optimizer) is not None:
            kind = type(self).__name__
            raise ValueError(f"{self.role} is one optimizer's: make a {kind} for each")

    def other_owner(self, optimizer: Any) -> Any:
        """Return the optimizer that has it; None for none but the one that asks."""
        owner = self.owner()
        if owner is None or owner is optimizer or vars(owner).get(f"_{self.role}") is not self:
            return None
        return owner

    def owner(self) -> Any:
        """Return the optimizer that it was given to last, if that is there."""
        return None if self._optimizer is None else self._optimizer()
