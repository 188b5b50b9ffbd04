"""The formats that the update kernel is compiled for ahead of time: parameters and states.

Which go together is said by the options of an optimizer (``fusedopt/formats``); here stands what
the kernel is made of. All of them are compiled with Adam's rule, which has a state of either sign
and one that is never below 0; with others, those that differ most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..codecs.format import (
    CAST,
    CODES,
    FLOAT8,
    FLOAT32,
    KAHAN,
    POSITIVE_CAST,
    POSITIVE_FLOAT8,
    REMAINDER,
    REMAINDER_STOCHASTIC,
    SIGNED,
    STOCHASTIC,
    UNSIGNED,
    Format,
)
from ..rule import Group, Rule

# Of a parameter, by name: its codec, and the type of what is kept beside it (its own for None).
PARAMETERS = {
    "": (CAST, None),
    "stochastic": (STOCHASTIC, None),
    "kahan": (KAHAN, None),
    "remainder": (REMAINDER, "i16"),
    "remainder8": (REMAINDER, "i8"),
    "remainder8 stochastic": (REMAINDER_STOCHASTIC, "i8"),
    "float32 master": (FLOAT32, "fp32"),
}
# Of states, by name: the codec and type of one of either sign, and of one that is >= 0.
STATES = {
    "bf16": ((CAST, "bf16"), (CAST, "bf16")),
    "fp16": ((CAST, "fp16"), (POSITIVE_CAST, "fp16")),
    "fp32": ((CAST, "fp32"), (CAST, "fp32")),
    "int8": ((SIGNED, "i8"), (UNSIGNED, "u8")),
    "fp8": ((FLOAT8, "u8"), (POSITIVE_FLOAT8, "u8")),
    "bf16 and uint8": ((CAST, "bf16"), (UNSIGNED, "u8")),
}


@dataclass(frozen=True)
class Kept:
    """How parameter, gradient and states are kept.

    Attributes:
        types: of parameter and gradient.
        parameter: a key of ``PARAMETERS``.
        states: a key of ``STATES``.
        aligned: whether every address is a multiple of 16 bytes.
        rowwise: whether tensors are walked row by row.
        average: type of the average of the weights; nothing for none.
        measured: whether telemetry measures.
    """

    types: tuple[str, str]
    parameter: str
    states: str
    aligned: bool = True
    rowwise: bool = False
    average: str = ""
    measured: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = ["/".join(dict.fromkeys(self.types)), self.parameter, f"{self.states} states"]
        parts += [f"{self.average} average"] * bool(self.average)
        parts += ["measured"] * self.measured
        parts += ["rowwise"] * self.rowwise + ["unaligned"] * (not self.aligned)
        return " ".join(filter(None, parts))

    def format(self, rule: Rule, group: Group) -> Format:
        """Return the kernel's format with a rule, for hyper-parameters of it."""
        codecs = tuple(codec for codec, _ in self._states(rule, group))
        own = Format(PARAMETERS[self.parameter][0], codecs, bool(self.average))
        return Format(average=own.average) if own.is_cast else own

    def kept_types(self, rule: Rule, group: Group) -> tuple[str, ...]:
        """Return the types of what is kept beside a parameter, and then of the states."""
        found = []
        codec, companion = PARAMETERS[self.parameter]
        if Format(codec).has_companion:
            found.append(companion or self.types[0])
        for codec, name in self._states(rule, group):
            found += [name, "fp32"] if codec in CODES else [name]
        return tuple(found)

    def _states(self, rule: Rule, group: Group) -> list[tuple[str, str]]:
        kinds = STATES[self.states]
        found = [kinds[name in rule.nonnegative] for name in rule.states(group)]
        if self.average:
            found.append((CAST if self.average == "fp32" else STOCHASTIC, self.average))
        return found


def every() -> Iterator[Kept]:
    """Every format that Adam's rule is compiled for."""
    half = "bf16", "bf16"
    for parameter in PARAMETERS:
        for states in ("bf16", "fp32", "int8", "fp8", "bf16 and uint8"):
            if (parameter, states) != ("", "bf16"):  # as torch keeps it
                yield Kept(half, parameter, states)
    for parameter in ("stochastic", "kahan", "float32 master"):
        yield Kept(("fp16", "fp16"), parameter, "fp16")
    yield Kept(("fp16", "fp16"), "stochastic", "int8")
    for states in ("bf16", "fp16", "int8", "fp8", "bf16 and uint8"):
        yield Kept(("fp32", "fp32"), "", states)
    for parameter in ("", "stochastic", "remainder8"):
        yield Kept(("bf16", "fp32"), parameter, "int8")
    for parameter, states in (
        ("stochastic", "bf16"),
        ("remainder8", "bf16"),
        ("", "int8"),
        ("", "fp8"),
        ("stochastic", "int8"),
        ("remainder8", "int8"),
    ):
        yield Kept(half, parameter, states, aligned=False)
    yield Kept(half, "stochastic", "bf16", rowwise=True)
    for parameter, states in (
        ("", "int8"),
        ("", "fp8"),
        ("", "bf16 and uint8"),
        ("stochastic", "int8"),
        ("stochastic", "fp8"),
        ("remainder8", "int8"),
        ("remainder8 stochastic", "int8"),
        ("float32 master", "int8"),
    ):
        yield Kept(half, parameter, states, rowwise=True)
    yield Kept(("fp32", "fp32"), "", "int8", rowwise=True)
    yield Kept(half, "remainder8", "int8", aligned=False, rowwise=True)


def averaged() -> Iterator[Kept]:
    """Those with an average of the weights."""
    half, single = ("bf16", "bf16"), ("fp32", "fp32")
    for average in ("fp32", "bf16"):
        yield Kept(single, "", "fp32", average=average)
        yield Kept(single, "", "fp32", aligned=False, average=average)
        for parameter, states in (
            ("", "bf16"),
            ("stochastic", "bf16"),
            ("remainder", "fp32"),
            ("remainder8", "int8"),
        ):
            yield Kept(half, parameter, states, average=average)
        yield Kept(half, "remainder8", "int8", rowwise=True, average=average)


def measured() -> Iterator[Kept]:
    """Those with telemetry besides."""
    half, single = ("bf16", "bf16"), ("fp32", "fp32")
    for types, parameter, states in (
        (half, "", "fp32"),
        (half, "stochastic", "bf16"),
        (half, "remainder", "fp32"),
        (half, "", "int8"),
        (half, "remainder8", "int8"),
        (half, "remainder8", "fp8"),
        (half, "float32 master", "fp32"),
        (single, "", "int8"),
    ):
        yield Kept(types, parameter, states, measured=True)
    yield Kept(half, "remainder8", "int8", aligned=False, measured=True)
    yield Kept(half, "remainder8", "int8", rowwise=True, measured=True)
    yield Kept(half, "remainder8", "int8", average="fp32", measured=True)


def some() -> Iterator[Kept]:
    """The formats that other rules are compiled for."""
    half = "bf16", "bf16"
    for parameter, states in (
        ("stochastic", "bf16"),
        ("kahan", "bf16"),
        ("remainder", "bf16"),
        ("float32 master", "fp32"),
        ("", "int8"),
        ("stochastic", "fp8"),
        ("remainder8", "int8"),
    ):
        yield Kept(half, parameter, states)
    yield Kept(half, "remainder8", "int8", rowwise=True)
