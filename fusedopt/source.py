"""What an optimizer asks of whatever feeds its rule with more than ``p.grad``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class MissingInput(RuntimeError):
    """A parameter lacks something that the rule reads, or has that of another gradient."""

    def __init__(self, parameter: Tensor, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class RuleInputs(NamedTuple):
    """What a rule reads of the parameters of one step.

    Attributes:
        tensors: for each input, the tensors of all parameters.
        per_sample: whether these are gradients of samples, ``[batch, *param.shape]``, that are
            still to be reduced to what the rule takes.
        measured: where squares are held from step to step, the positions of those of this one,
            which are yet to be multiplied by the square of the factor on its gradients.
    """

    tensors: list[list[Tensor]]
    per_sample: bool = False
    measured: list[int] | None = None


class Source:
    """Base of per-sample statistics, and of SVAG's pairs of gradients."""

    # What messages call the inputs of the rule.
    names: tuple[str, ...] = ("gradient",)
    # What to do that unscaled gradients are wanted for.
    instead_of_unscaling = ""
    # How many steps there are from one whose rule reads all of this to the next.
    every = 1

    def __init__(self) -> None:
        self._optimizers: list[weakref.ref[Any]] = []

    def attach(self, optimizer: Any) -> None:
        """Note an optimizer that this feeds."""
        self.detach(optimizer)
        self._optimizers.append(weakref.ref(optimizer))

    def detach(self, optimizer: Any) -> None:
        """Forget an optimizer that something else feeds from now on."""
        self._optimizers = [r for r in self._optimizers if r() not in (None, optimizer)]

    def count(self, parameters: Sequence[Tensor]) -> int:
        """Return how many samples a step with these parameters has."""
        return 1

    def find(self, parameter: Tensor) -> Tensor | None:
        """Return what says that a parameter takes part in the step: a gradient, or None."""
        return parameter.grad

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where what the rule reads of these parameters cannot be used.

        Raises:
            MissingInput: for what is wrong with one parameter.
            RuntimeError: for anything else.
        """

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Follow one factor that all gradients of a step were multiplied by, if this can.

        Returns:
            False where it cannot, or where they were not.
        """
        return False

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return what the rule takes.

        Args:
            parameters: to be updated.
            gradients: what ``find`` returned for them.
            plain: whether nothing has to be known of any input before the update.
        """
        raise NotImplementedError

    def gradient_factor(self, count: int) -> float:
        """Return what the inputs of degree 1 are multiplied by, those of degree 2 twice."""
        return 1.0

    def factors(self, virtual_batch_size: float, count: int) -> dict[str, float]:
        """Return the rule's ``factors`` for a step of ``count`` samples."""
        raise NotImplementedError

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Keep what ``inputs`` returned for the steps that follow, which this one is about to be.

        Args:
            parameters: of the step.
        """

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` does, too.

        Args:
            parameters: for which to forget it; all of them by default.
        """

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Forget what was gathered for parameters whose gradients are None or zero now."""
        self.reset(parameters)

    def _fed(self) -> list[Any]:
        """List the optimizers that this feeds."""
        return [o for ref in self._optimizers if (o := ref()) is not None]

    def _all_parameters(self) -> Sequence[Tensor]:
        """List the parameters of all optimizers that this feeds."""
        groups = [group for o in self._fed() for group in o.param_groups]
        return list({id(p): p for group in groups for p in group["params"]}.values())
