"""The variants of the update kernel."""

from __future__ import annotations

from collections.abc import Iterator

from .. import multi_tensor
from ..launch_config import update_launch_config
from ..rule import Rule
from ..rules import REGISTRY
from .option_sets import option_sets
from .variant import DTYPES, Budget, Variant, alignment_suffix, element_type

# What every kernel takes that finds its tensors by the table of addresses.
TABLE = {"table": "*i64", "width": "i32", "chunk_tensor": "*i32", "chunk_index": "*i32"}

# Element types of parameter, gradient and states, and whether addresses are aligned.
LAYOUTS = (
    *((dtype, dtype, dtype, True) for dtype in DTYPES),
    ("fp32", "bf16", "fp32", True),
    ("bf16", "fp32", "bf16", True),
    ("fp32", "fp32", "fp32", False),
    ("bf16", "bf16", "bf16", False),
)


def variants(architecture: str = "") -> Iterator[Variant]:
    """Every variant that the registry's rules can need.

    Args:
        architecture: for which, as in ``launch_config.update_launch_config``.
    """
    for rule in REGISTRY.values():
        for group in option_sets(rule):
            key = rule.options(group), len(rule.states(group))
            for param, gradient, state, aligned in LAYOUTS:
                # Squares are kept in float32, whatever the gradient is.
                squares = "fp64" if param == "fp64" else "fp32"
                inputs = [gradient if degree == 1 else squares for degree in rule.degrees]
                types = (param, *inputs, *[state] * key[1])
                yield update_tensors(rule, key[0], types, aligned, architecture)


def update_tensors(
    rule: Rule,
    options: tuple[bool, ...],
    dtypes: tuple[str, ...],
    aligned: bool = True,
    architecture: str = "",
) -> Variant:
    """The update kernel with a rule, for one mix of types.

    Whole chunks of aligned tensors move in 128-bit accesses: everything is read, and everything
    but the gradient written. AdamW in float32 takes at most 64 registers, half the threads an SM
    can hold.
    """
    types = tuple(element_type(d) for d in dtypes)
    core = (*dtypes[:2], *dtypes[1 + len(rule.degrees) :])
    names = "/".join(dict.fromkeys(core))
    if len(set(core)) > 1:
        names += " states" if core[0] == core[1] else " gradient"
    sizes = [DTYPES[d] for d in dtypes]
    inputs = sum(sizes[1 : 1 + len(rule.degrees)])
    is_adamw = rule.name == "Adam" and not any(options) and set(dtypes) == {"fp32"}
    launch = update_launch_config(architecture, rule.name, dtypes, aligned)
    return Variant(
        name=f"{rule.label(options)} {names}{alignment_suffix(aligned)}",
        kernel=multi_tensor.update_tensors,
        arguments={
            **TABLE,
            "coefficients": "*fp64",
            "control": "*fp64",
        },
        constants=multi_tensor.update_constants(rule, options, types, aligned, launch.block),
        threads=launch.threads,
        block=launch.block,
        budget=Budget(
            bytes_per_element=2 * sum(sizes) - inputs if aligned else None,
            registers=64 if is_adamw else None,
        ),
        coefficients=rule.coefficient_names,
    )
