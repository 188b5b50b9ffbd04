"""The formula of a rule's coefficients: the operations that they take, recorded once.

A rule states its coefficients as a Python function of numbers. Where these live on the device, the
function is called with stand-ins, and what it does with them is written down; PyTorch
(``fusedopt/coefficients.py``) or one kernel (``live_coefficients.py``) then does the same with the
current values, at every step. So there is one place where the mathematics stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The step that a rule reads, and its number.
_STEPS = 2
# Each takes two float64 numbers; "gt" is 1 or 0.
OPERATIONS = ("add", "sub", "mul", "div", "pow", "gt")


@dataclass(frozen=True)
class Formula:
    """Operations one after the other, each on two values that there are by then.

    Value 0 is the step that the rule reads, value 1 the number of the step, which another rule does
    not read; the inputs follow, the constants, and then what each operation yields.

    Attributes:
        n_inputs: how many numbers it takes besides these two.
        constants: numbers that stand in it.
        operations: names, of ``OPERATIONS``.
        left: for each operation, which value its first operand is.
        right: the same of its second.
        results: which values the coefficients are.
    """

    n_inputs: int
    constants: tuple[float, ...]
    operations: tuple[str, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def shape(self) -> tuple[Any, ...]:
        """All but the constants' values: what a kernel is compiled for."""
        return (
            self.n_inputs, len(self.constants), self.operations, self.left, self.right,
            self.results,
        )  # fmt: skip


def record(
    coefficients: Callable[[Mapping[str, Any], Any, Any], Sequence[Any]],
    group: Mapping[str, Any],
    counts: Mapping[str, int],
) -> Formula:
    """Record what a rule's coefficients are made by.

    Args:
        coefficients: a function of the hyper-parameters, the step and its number.
        group: the hyper-parameters.
        counts: for each entry of the group that is an input, how many numbers it has; the inputs
            are in this order.

    Raises:
        TypeError: where it does anything but arithmetic with an input or the step.
    """
    tape = _Tape()
    stand_ins: dict[str, Any] = {}
    place = _STEPS
    for name, count in counts.items():
        own = tuple(_Value(tape, ("input", place + i)) for i in range(count))
        stand_ins[name] = own[0] if count == 1 else own
        place += count
    steps = (_Value(tape, ("input", i)) for i in range(_STEPS))
    found = coefficients({**group, **stand_ins}, *steps)
    results = [tape.key(value) for value in found]
    first = {"input": 0, "constant": place, "operation": place + len(tape.constants)}

    def number(key: tuple[str, int]) -> int:
        return first[key[0]] + key[1]

    return Formula(
        n_inputs=place - _STEPS,
        constants=tuple(tape.constants),
        operations=tuple(name for name, _, _ in tape.operations),
        left=tuple(number(a) for _, a, _ in tape.operations),
        right=tuple(number(b) for _, _, b in tape.operations),
        results=tuple(map(number, results)),
    )


class _Tape:
    """What has been done so far; a value is named by its kind and its number of that kind."""

    def __init__(self) -> None:
        # One for each time that it stands there: what is equal in one group may not be in another.
        self.constants: list[float] = []
        self.operations: list[tuple[str, tuple[str, int], tuple[str, int]]] = []

    def key(self, value: Any) -> tuple[str, int]:
        if isinstance(value, _Value):
            return value.key
        self.constants.append(float(value))
        return "constant", len(self.constants) - 1

    def do(self, name: str, a: Any, b: Any) -> _Value:
        self.operations.append((name, self.key(a), self.key(b)))
        return _Value(self, ("operation", len(self.operations) - 1))


class _Value:
    """Stands for a number that is known to the device alone."""

    def __init__(self, tape: _Tape, key: tuple[str, int]) -> None:
        self.tape = tape
        self.key = key

    def __add__(self, other: Any) -> _Value:
        return self.tape.do("add", self, other)

    def __radd__(self, other: Any) -> _Value:
        return self.tape.do("add", other, self)

    def __sub__(self, other: Any) -> _Value:
        return self.tape.do("sub", self, other)

    def __rsub__(self, other: Any) -> _Value:
        return self.tape.do("sub", other, self)

    def __mul__(self, other: Any) -> _Value:
        return self.tape.do("mul", self, other)

    def __rmul__(self, other: Any) -> _Value:
        return self.tape.do("mul", other, self)

    def __truediv__(self, other: Any) -> _Value:
        return self.tape.do("div", self, other)

    def __rtruediv__(self, other: Any) -> _Value:
        return self.tape.do("div", other, self)

    def __pow__(self, other: Any) -> _Value:
        return self.tape.do("pow", self, other)

    def __rpow__(self, other: Any) -> _Value:
        return self.tape.do("pow", other, self)

    def __gt__(self, other: Any) -> _Value:
        return self.tape.do("gt", self, other)

    def __neg__(self) -> _Value:
        return self.tape.do("mul", self, -1.0)

    def __bool__(self) -> bool:
        raise TypeError(
            "coefficients() branched on a hyper-parameter that lives on the device: use"
            " arithmetic only, so that the same code serves a CUDA graph"
        )
