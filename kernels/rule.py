"""What an update rule is: everything the rest of the library knows about an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

Scalar = Any  # a Python number, or a 0-d float64 tensor on the path that a CUDA graph captures
Group = Mapping[str, Any]


def _no_options(group: Group) -> tuple[bool, ...]:
    return ()


def _no_names(group: Group) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Rule:
    """One optimizer, stated per element and blind to memory, dtypes, launches and groups.

    Attributes:
        name: what tables and messages call it.
        update: the ``@jit`` device function ``update(p, inputs, states, coefficients, OPTIONS)``
            returning ``(p, states)``. All values are blocks of one floating type; ``inputs``,
            ``states`` and ``coefficients`` are tuples, ``OPTIONS`` a compile-time tuple of bools.
        twin: the same update stated in PyTorch, ``twin(p, inputs, states, coefficients, options)``,
            returning ``(p, states)``. It may overwrite ``p`` and ``states``, never ``inputs``.
            Coefficients are numbers or 0-d tensors; see ``fusedopt.kernels.torch_ops``.
        coefficients: ``coefficients(group, step) -> tuple`` of scalars, formed once for each
            (group, step) in double precision. Only arithmetic operators: on the path that a CUDA
            graph captures, ``step`` and the group's values are float64 device tensors.
        states: ``states(group) -> names`` of the state tensors that the group needs, in the order
            in which ``update`` takes them. Every state starts at zero, shaped like the parameter.
        options: ``options(group) -> tuple of bool`` that select code at compile time. Reserve
            them for what changes the shape of the update; a number belongs in ``coefficients``.
        option_names: what tables call the options, in the same order.
        hyper: names of the group entries that ``coefficients`` reads as numbers.
        factors: names of the group entries that the optimizer works out anew for each step from the
            samples of the batch: see ``fusedopt.statistics``.
        degrees: for each input, its degree in the gradient: 1 for the gradient, 2 for squares, 0
            for what is in the unit that the rule computes in already.
            Clipping and loss unscaling multiply an input by ``scale ** degree``.
        counts_steps: whether ``state["step"]`` is kept. Without it, ``coefficients`` sees 1 at
            the step that creates the parameter's state, and 2 afterwards.
        n_coefficients: how many scalars ``coefficients`` returns; of their names by default.
        nonnegative: names of the states that are never below 0: their 8-bit codes have no sign.
        differing: ``differing(group) -> names`` of the states whose difference the update takes,
            the sign of which counts: 8 bits and 16 are too few for them.
        peaking: the same of the states whose largest over time is kept, which would grow by what
            8 bits are rounded by.
        summing: names of the states that sum up steps far smaller than themselves, of which 8 bits
            would lose what a step adds.
        coefficient_names: what they are called, in order, by tables, messages and generated code.
        example_groups: hyper-parameter sets that tests, ``verify`` and ``codegen`` exercise.
    """

    name: str
    update: Any
    twin: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    coefficients: Callable[[Group, Scalar], tuple[Scalar, ...]]
    states: Callable[[Group], tuple[str, ...]]
    hyper: tuple[str, ...]
    n_coefficients: int = 0
    options: Callable[[Group], tuple[bool, ...]] = _no_options
    option_names: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    degrees: tuple[int, ...] = (1,)
    counts_steps: bool = True
    summing: tuple[str, ...] = ()
    coefficient_names: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()
    differing: Callable[[Group], tuple[str, ...]] = _no_names
    peaking: Callable[[Group], tuple[str, ...]] = _no_names
    example_groups: tuple[Group, ...] = field(default=(), hash=False, compare=False)

    def __post_init__(self) -> None:
        # Frozen: what follows from the other is filled in.
        names, count = self.coefficient_names, self.n_coefficients
        if not names:
            names = tuple(f"coefficient {i}" for i in range(count))
            object.__setattr__(self, "coefficient_names", names)
        if not count:
            object.__setattr__(self, "n_coefficients", len(names))
        elif count != len(names):
            raise ValueError(f"{self.name}: {count} coefficients have {len(names)} names")

    def label(self, options: tuple[bool, ...]) -> str:
        """Name the rule with the options that are on."""
        names = self.option_names or tuple(f"option {i}" for i in range(len(options)))
        chosen = [name for name, on in zip(names, options, strict=True) if on]
        return f"{self.name} ({', '.join(chosen)})" if chosen else self.name


@cache
def held(rule: Rule) -> Rule:
    """Return a rule of which the squares are held from step to step, in the unit of the update."""
    degrees = tuple(0 if degree == 2 else degree for degree in rule.degrees)
    return replace(rule, degrees=degrees)
