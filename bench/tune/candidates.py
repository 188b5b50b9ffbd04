"""What is tried: configurations, the variants that each would be for, and what rules one out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from fusedopt.kernels import aot, launch_config
from fusedopt.kernels.aot.update import update_tensors
from fusedopt.kernels.launch_config import LaunchConfig
from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import REGISTRY

BLOCKS = (512, 1024, 2048, 4096, 8192)
THREADS = (64, 128, 256, 512)

# Types of parameter, gradient and states.
TYPES = {
    **{name: (name, name, name) for name in launch_config.SIZES},
    "fp32+bf16-gradients": ("fp32", "bf16", "fp32"),
    "bf16+fp32-states": ("bf16", "bf16", "fp32"),
}


@dataclass(frozen=True)
class Work:
    """One entry of the table: a rule in one mix of types.

    Attributes:
        rule: the update.
        key: the types, as ``launch_config.types_key`` writes them.
        dtypes: those of parameter, inputs and states, of the group.
        group: hyper-parameters with the most states of all that the entry is for: it is timed.
        options: compile-time options of everything that the entry is for, with their types.
    """

    rule: Rule
    key: str
    dtypes: tuple[str, ...]
    group: Mapping[str, Any]
    options: tuple[tuple[tuple[bool, ...], tuple[str, ...]], ...]


def work(rule: Rule, types: str) -> list[Work]:
    """Return the entries of a rule in types by their name in ``TYPES``.

    Where not all types are the same, option sets with more states have an entry of their own.
    """
    found: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    for group in rule.example_groups:
        dtypes = _dtypes(rule, group, types)
        variants = found.setdefault(launch_config.types_key(dtypes), {})
        variants.setdefault((rule.options(group), dtypes), group)
    entries = []
    for key, variants in found.items():
        chosen = max(variants, key=lambda variant: len(variant[1]))
        entries.append(Work(rule, key, chosen[1], variants[chosen], tuple(variants)))
    return entries


def _dtypes(rule: Rule, group: Mapping[str, Any], types: str) -> tuple[str, ...]:
    param, gradient, state = TYPES[types]
    # Squares are kept in float32, whatever the gradient is.
    squares = "fp64" if param == "fp64" else "fp32"
    inputs = (gradient if degree == 1 else squares for degree in rule.degrees)
    return (param, *inputs, *[state] * len(rule.states(group)))


def candidates(key: str) -> list[LaunchConfig]:
    """Return every configuration that accesses of 16 bytes a thread allow, but for the default."""
    found = []
    for block in BLOCKS:
        for threads in THREADS:
            candidate = LaunchConfig(block, threads)
            try:
                candidate.check(key)
            except ValueError:
                continue
            if candidate != launch_config.default(aligned=True):
                found.append(candidate)
    return found


def unfit(entry: Work, candidate: LaunchConfig, target: str) -> list[str]:
    """Compile everything that the entry would be for, and say which budgets are broken.

    No variant may use stack, and whole chunks move in 128-bit accesses: as in codegen.

    Args:
        entry: of the table.
        candidate: block and threads.
        target: what to compile for, ``cuda:90``.
    """
    complaints = []
    parsed = aot.parse_target(target)
    for options, dtypes in entry.options:
        variant = at(update_tensors(entry.rule, options, dtypes), candidate)
        result = aot.report(aot.compile_variant(variant, parsed), parsed)
        broken = variant.budget.broken(variant, result, parsed)
        complaints += [f"{variant.name}: {text}" for text in broken]
    return complaints


def complaints(rule: str, types: str, target: str) -> dict[tuple[str, LaunchConfig], list[str]]:
    """Return what is wrong with each candidate, by the entry's key, in a process for each core."""
    tasks = [
        (rule, types, place, candidate, target)
        for place, entry in enumerate(work(REGISTRY[rule], types))
        for candidate in candidates(entry.key)
    ]
    keys = [
        (work(REGISTRY[rule], types)[place].key, candidate) for _, _, place, candidate, _ in tasks
    ]
    # Not forked: contexts of a GPU do not survive that.
    with ProcessPoolExecutor(aot.processors(), get_context("spawn")) as pool:
        return dict(zip(keys, pool.map(_unfit, tasks), strict=True))


def _unfit(task: tuple[str, str, int, LaunchConfig, str]) -> list[str]:
    # A rule holds kernels, which do not travel between processes: its name does.
    rule, types, place, candidate, target = task
    return unfit(work(REGISTRY[rule], types)[place], candidate, target)


def at(variant: aot.Variant, candidate: LaunchConfig) -> aot.Variant:
    """Return a variant of the update kernel in another configuration."""
    constants = {**variant.constants, "BLOCK": candidate.block}
    return dataclasses.replace(
        variant, constants=constants, block=candidate.block, threads=candidate.threads
    )


def name(candidate: LaunchConfig) -> str:
    """Name a configuration for tables."""
    return f"{candidate.block}/{candidate.threads}"


def names(found: Sequence[LaunchConfig]) -> dict[str, LaunchConfig]:
    """Return configurations by their names."""
    return {name(candidate): candidate for candidate in found}
