"""Python arithmetic stated in C: a rule's coefficients, traced once with symbols for numbers.

``coefficients`` and ``options`` of a rule use operators only, so that numbers, device tensors and
the symbols here can pass through them alike. What they do to a symbol is recorded and written out
as C; the update's formulas so stay in ``kernels/rules`` for every language.

Arithmetic on double in C rounds as Python's does, and ``pow`` is the same function, as long as the
compiler neither contracts nor reassociates: the build says ``-ffp-contract=off``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


class Symbol:
    """A value that is known when the C code runs.

    Attributes:
        operation: a C operator, a function's name followed by ``()``, ``?:``, or "" for a leaf.
        operands: symbols and numbers; of a leaf, its text in C.
    """

    def __init__(self, operation: str, *operands: Any) -> None:
        self.operation = operation
        self.operands = operands

    def key(self) -> tuple[Any, ...]:
        """What is equal for equal expressions."""
        return (self.operation, *(_key(operand) for operand in self.operands))

    def __add__(self, other: Any) -> Symbol:
        return Symbol("+", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return Symbol("+", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return Symbol("-", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return Symbol("-", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return Symbol("*", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return Symbol("*", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return Symbol("/", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return Symbol("/", other, self)

    def __pow__(self, other: Any) -> Symbol:
        return Symbol("pow()", self, other)

    def __rpow__(self, other: Any) -> Symbol:
        return Symbol("pow()", other, self)

    def __neg__(self) -> Symbol:
        return Symbol("-", self)

    def __lt__(self, other: Any) -> Symbol:
        return Symbol("<", self, other)

    def __le__(self, other: Any) -> Symbol:
        return Symbol("<=", self, other)

    def __gt__(self, other: Any) -> Symbol:
        return Symbol(">", self, other)

    def __ge__(self, other: Any) -> Symbol:
        return Symbol(">=", self, other)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return Symbol("==", self, other)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        return Symbol("!=", self, other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError(
            "a rule branched on a number that is known when the library runs, not when it is"
            " built: use arithmetic only, or list the branch as a flag of the entry point"
        )


def leaf(text: str) -> Symbol:
    """A variable of the C code."""
    return Symbol("", text)


def literal(value: Any, real: str = "double") -> str:
    """Write a number so that C reads the same double, or the float nearest to it.

    Raises:
        ValueError: for nan and infinities, which no formula has as a constant.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} cannot be a constant of the C code")
    return repr(number) + ("f" if real == "float" else "")


def statements(
    results: Sequence[Any],
    targets: Sequence[str],
    real: str = "double",
) -> list[str]:
    """Write assignments of expressions to C lvalues.

    Args:
        results: symbols or numbers.
        targets: for each of them, what it is assigned to.
        real: the C type that everything is computed in, ``double`` or ``float``.

    Returns:
        Lines of C, without indentation. What is used more than once is computed once.
    """
    writer = _Writer(real, Counter(_uses(results)))
    assignments = [
        f"{target} = {writer.text(result)};"
        for result, target in zip(results, targets, strict=True)
    ]
    return writer.lines + assignments


def _uses(results: Iterable[Any]) -> Iterable[Any]:
    """Keys of the operands of all distinct expressions, once for each use."""
    seen = set()
    pending = [result for result in results if isinstance(result, Symbol)]
    yield from (_key(result) for result in pending)
    while pending:
        symbol = pending.pop()
        if symbol.operation == "" or symbol.key() in seen:
            continue
        seen.add(symbol.key())
        inner = [operand for operand in symbol.operands if isinstance(operand, Symbol)]
        yield from (operand.key() for operand in inner)
        pending += inner


def _key(value: Any) -> Any:
    return value.key() if isinstance(value, Symbol) else value


class _Writer:
    def __init__(self, real: str, uses: Counter[Any]) -> None:
        self.real = real
        self.uses = uses
        self.lines: list[str] = []
        self.names: dict[Any, str] = {}

    def text(self, value: Any) -> str:
        """Return the C text of an expression, with a variable where it is used again."""
        if not isinstance(value, Symbol):
            return literal(value, self.real)
        if value.operation == "":
            return str(value.operands[0])
        key = value.key()
        if key in self.names:
            return self.names[key]
        text = self._expression(value)
        if self.uses[key] < 2:
            return text
        name = f"t{len(self.names)}"
        self.names[key] = name
        self.lines.append(f"const {self.real} {name} = {text};")
        return name

    def _expression(self, value: Symbol) -> str:
        operands = [self.text(operand) for operand in value.operands]
        if value.operation.endswith("()"):
            name = value.operation[:-2] + ("f" if self.real == "float" else "")
            return f"{name}({', '.join(operands)})"
        if value.operation == "?:":
            return f"({operands[0]} ? {operands[1]} : {operands[2]})"
        if len(operands) == 1:
            return f"({value.operation}{operands[0]})"
        return f"({operands[0]} {value.operation} {operands[1]})"
