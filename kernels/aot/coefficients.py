"""The variants of the kernel that forms coefficients on the device."""

from __future__ import annotations

from collections.abc import Iterator

from .. import formula, live_coefficients
from ..lang import tl
from ..rule import Group, Rule
from ..rules import ADAM, REGISTRY
from .variant import Variant


def variants() -> Iterator[Variant]:
    """A formula of every rule, and those of Adam's bias corrections."""
    for rule in REGISTRY.values():
        yield coefficients(rule, rule.example_groups[0], rule.name)
    for correction in (None, "running_mean"):
        group = {**ADAM.example_groups[0], "bias_correction": correction}
        yield coefficients(ADAM, group, f"{ADAM.name}, bias correction {correction}")


def coefficients(rule: Rule, group: Group, name: str) -> Variant:
    """Coefficients of one group of hyper-parameters, or of several that differ in numbers alone."""
    entries = {key: group[key] for key in (*rule.hyper, *rule.factors)}
    counts = {k: len(v) if isinstance(v, tuple) else 1 for k, v in entries.items()}
    found = formula.record(lambda own, step, _: rule.coefficients(own, step), group, counts)
    count_type = tl.float32 if rule.counts_steps else None
    pointers = {"table": "*i64", "inputs": "*fp64", "stages": "*fp64", "control": "*fp64"}
    return Variant(
        name=f"live_coefficients {name}",
        kernel=live_coefficients.live_coefficients,
        arguments={**pointers, "values": "*fp64", "count": "i32", "width": "i32"},
        constants=live_coefficients.live_coefficients_constants(
            found, rule.n_coefficients, count_type, rule.counts_steps, False
        ),
        threads=live_coefficients.THREADS,
        exact=True,
    )
