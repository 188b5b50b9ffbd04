"""What the library offers: entry points, the options and types that each is compiled for.

This is the one list. Mathematics is not in it: an entry point names a rule of ``kernels/rules`` and
which of the rule's hyper-parameters the C caller sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fusedopt.kernels.aot import Variant
from fusedopt.kernels.aot.norms import clip_factor, partial_norms
from fusedopt.kernels.aot.update import update_tensors
from fusedopt.kernels.codecs import format
from fusedopt.kernels.rule import Group, Rule
from fusedopt.kernels.rules import ADAM, RMSPROP, SGD

from . import control
from .trace import Symbol, leaf

# Element types of parameter, gradient and states.
TYPES = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("bf16", "bf16", "fp32"),
    ("fp32", "bf16", "fp32"),
    ("fp64", "fp64", "fp64"),
)

# How parameters and states are kept: of the kernels' codecs, those that the library has.
PARAMETERS = (format.CAST,)
STATES = (format.CAST,)

# The enumerator of ``fusedopt.h``, by Triton's name of the type; "" where there is no operand.
C_TYPES = {
    "fp32": "FUSEDOPT_FLOAT32",
    "bf16": "FUSEDOPT_BFLOAT16",
    "fp16": "FUSEDOPT_FLOAT16",
    "fp64": "FUSEDOPT_FLOAT64",
    "": "FUSEDOPT_NO_TYPE",
}

# Ranges of hyper-parameters, as torch.optim checks them; every number must be finite besides.
NOT_NEGATIVE, BELOW_ONE, FINITE = "NOT_NEGATIVE", "BELOW_ONE", "FINITE"


@dataclass(frozen=True)
class Requirement:
    """What must hold for a group in which a flag is set.

    Attributes:
        flag: the flag.
        conditions: the conditions that ``group`` must meet, as comparisons.
        text: the same for the caller.
    """

    flag: str
    conditions: Callable[[Group], tuple[Any, ...]]
    text: str


@dataclass(frozen=True)
class EntryPoint:
    """One function of the library, ``fusedopt_<name>_step``, and its struct ``fusedopt_<name>``.

    Attributes:
        name: what C calls it.
        rule: the update.
        fields: fields of type double of the struct, with the range of each.
        hyper: for each number of the rule's group the fields that it is made of.
        flags: fields of type int of the struct, which are bools of the group.
        fixed: entries of the group that C cannot choose.
        states: names of all states that some option needs, in the order of
            ``fusedopt_tensors.state``.
        groups: for each selection of code that is compiled, the entries that lead to it.
        requirements: conditions besides ranges.
        counts_steps: whether the struct has a field ``step``.
    """

    name: str
    rule: Rule
    fields: Mapping[str, str]
    hyper: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...]
    fixed: Group
    states: tuple[str, ...]
    groups: tuple[Group, ...]
    requirements: tuple[Requirement, ...] = ()
    counts_steps: bool = True

    def group(self, flags: Mapping[str, bool], prefix: str = "group->") -> dict[str, Any]:
        """The rule's group with a symbol for each number of the struct."""
        numbers: dict[str, Any] = {}
        for name, fields in self.hyper.items():
            symbols: tuple[Symbol, ...] = tuple(leaf(prefix + each) for each in fields)
            numbers[name] = symbols[0] if len(symbols) == 1 else symbols
        return {**self.fixed, **numbers, **flags}

    def layouts(self) -> dict[tuple[bool, ...], tuple[int, ...]]:
        """For each compiled selection of code, the indices of the states that it takes."""
        result = {}
        for entries in self.groups:
            group = {**self.fixed, **dict.fromkeys(self.flags, False), **entries}
            names = self.rule.states(group)
            result[self.rule.options(group)] = tuple(self.states.index(name) for name in names)
        return result


_ADAM: dict[str, Any] = {
    "rule": ADAM,
    "fields": {
        "lr": NOT_NEGATIVE,
        "beta1": BELOW_ONE,
        "beta2": BELOW_ONE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    },
    "hyper": {
        "lr": ("lr",),
        "betas": ("beta1", "beta2"),
        "eps": ("eps",),
        "weight_decay": ("weight_decay",),
    },
    "flags": ("amsgrad", "maximize"),
    "states": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "groups": ({"amsgrad": False}, {"amsgrad": True}),
}

LIBRARY = (
    EntryPoint(
        name="adam",
        fixed={"decoupled_weight_decay": False, "bias_correction": "adam"},
        **_ADAM,
    ),
    EntryPoint(
        name="adamw",
        fixed={"decoupled_weight_decay": True, "bias_correction": "adam"},
        **_ADAM,
    ),
    EntryPoint(
        name="sgd",
        rule=SGD,
        fields={
            "lr": NOT_NEGATIVE,
            "momentum": NOT_NEGATIVE,
            "dampening": FINITE,
            "weight_decay": NOT_NEGATIVE,
        },
        hyper={name: (name,) for name in ("lr", "momentum", "dampening", "weight_decay")},
        flags=("nesterov", "maximize"),
        fixed={"momentum_form": "torch"},
        states=("momentum_buffer",),
        groups=({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
        requirements=(
            Requirement(
                "nesterov",
                lambda group: (group["momentum"] > 0, group["dampening"] == 0),
                "nesterov needs momentum > 0 and dampening = 0",
            ),
        ),
    ),
    EntryPoint(
        name="rmsprop",
        rule=RMSPROP,
        fields={
            "lr": NOT_NEGATIVE,
            "alpha": NOT_NEGATIVE,
            "eps": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "momentum": NOT_NEGATIVE,
        },
        hyper={name: (name,) for name in ("lr", "alpha", "eps", "weight_decay", "momentum")},
        flags=("centered", "maximize"),
        fixed={"bias_correction": False, "denominator": "std"},
        states=("square_avg", "grad_avg", "momentum_buffer"),
        groups=tuple(
            {"centered": centered, "momentum": momentum}
            for centered, momentum in product((False, True), (0.0, 0.9))
        ),
        counts_steps=False,
    ),
)


def codecs() -> dict[str, dict[str, list[str]]]:
    """Name the codecs of parameters and of states that the library has, and those it has not."""
    return {
        kind: {"offered": list(own), "not_offered": [name for name in known if name not in own]}
        for kind, own, known in (
            ("parameters", PARAMETERS, format.PARAMETERS),
            ("states", STATES, format.STATES),
        )
    }


@dataclass(frozen=True, eq=False)
class Row:
    """One compiled kernel of the library.

    Attributes:
        variant: what to compile.
        rule: name of the rule, or "".
        options: the compile-time options of the rule; of a norm, whether it is the largest value.
        option_names: names of the options that are on.
        types: of parameter, gradient and states, "" where there is no such operand.
        aligned: whether every address must be a multiple of 16 bytes.
    """

    variant: Variant
    rule: str
    options: tuple[bool, ...]
    option_names: str
    types: tuple[str, str, str]
    aligned: bool


def rows(architecture: str) -> Iterator[Row]:
    """Everything that is compiled for a target, in a fixed order.

    Args:
        architecture: the target's name, ``cuda:90``.
    """
    done = set()
    for entry, types, aligned in product(LIBRARY, TYPES, (True, False)):
        for options, states in entry.layouts().items():
            own = (*types[:2], types[2] if states else "")
            key = entry.rule.name, options, own, aligned
            if key in done:
                continue
            done.add(key)
            names = [n for n, on in zip(entry.rule.option_names, options, strict=True) if on]
            variant = update_tensors(
                entry.rule, options, (*types[:2], *[types[2]] * len(states)), aligned, architecture
            )
            yield Row(variant, entry.rule.name, options, ", ".join(names), own, aligned)
    gradients = dict.fromkeys(gradient for _, gradient, _ in TYPES)
    for gradient, aligned, infinity in product(gradients, (True, False), (False, True)):
        variant = partial_norms(gradient, infinity, aligned)
        yield Row(variant, "", (infinity,), _order(infinity), ("", gradient, ""), aligned)
    for infinity in (False, True):
        variant = clip_factor(infinity)
        yield Row(variant, "", (infinity,), _order(infinity), ("", "", ""), True)
    yield Row(control.variant(), "", (), "", ("", "", ""), True)


def _order(infinity: bool) -> str:
    return "inf" if infinity else "2"
