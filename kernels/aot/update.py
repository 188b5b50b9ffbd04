"""The variants of the update kernel and of the norm kernels, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import multi_tensor, norms
from .aot import DTYPES, Budget, Variant, element_type
from .lang import tl
from .launch_config import update_launch_config
from .option_sets import option_sets
from .rule import Rule
from .rules import REGISTRY

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
    """Every variant that the registry's rules and the norm kernels can need.

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
    for infinity_norm in (False, True):
        for dtype in DTYPES:
            yield partial_norms(dtype, infinity_norm)
        yield partial_norms("fp32", infinity_norm, aligned=False)
        yield clip_factor(infinity_norm)


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
        name=f"{rule.label(options)} {names}{_suffix(aligned)}",
        kernel=multi_tensor.update_tensors,
        arguments={
            **TABLE,
            "coefficients": "*fp64",
            "control": "*fp64",
        },
        constants={
            "RULE": rule.update,
            "OPTIONS": options,
            "DTYPES": types,
            "DEGREES": rule.degrees,
            "N_COEFFICIENTS": rule.n_coefficients,
            "COMPUTE": _compute(types),
            "ALIGNED": aligned,
            "BLOCK": launch.block,
        },
        threads=launch.threads,
        block=launch.block,
        budget=Budget(
            bytes_per_element=2 * sum(sizes) - inputs if aligned else None,
            registers=64 if is_adamw else None,
        ),
    )


def partial_norms(dtype: str, infinity_norm: bool, aligned: bool = True) -> Variant:
    """Stage 1 of the norm, which reads each gradient once."""
    kind = element_type(dtype)
    return Variant(
        name=f"partial_norms ({'inf' if infinity_norm else '2'}) {dtype}{_suffix(aligned)}",
        kernel=norms.partial_norms,
        arguments={
            **TABLE,
            "inverse_scale": "*fp64",
            "partials": "*fp64",
        },
        constants={
            "DTYPE": kind,
            "COMPUTE": _compute((kind,)),
            "ALIGNED": aligned,
            "INFINITY_NORM": infinity_norm,
            "BLOCK": norms.NORM_BLOCK,
        },
        threads=norms.NORM_THREADS,
        block=norms.NORM_BLOCK,
        budget=Budget(bytes_per_element=DTYPES[dtype] if aligned else None),
    )


def clip_factor(infinity_norm: bool) -> Variant:
    """Stage 2 of the norm, one program."""
    return Variant(
        name=f"clip_factor ({'inf' if infinity_norm else '2'})",
        kernel=norms.clip_factor,
        arguments={
            "partials": "*fp64",
            "count": "i32",
            "inverse_scale": "*fp64",
            "max_norm": "*fp64",
            "control": "*fp64",
            "norm": "*fp32",
        },
        constants={"INFINITY_NORM": infinity_norm, "BLOCK": norms.REDUCE_BLOCK},
        threads=norms.REDUCE_THREADS,
        block=norms.REDUCE_BLOCK,
    )


def _suffix(aligned: bool) -> str:
    return "" if aligned else " unaligned"


def _compute(types: tuple[Any, ...]) -> Any:
    return tl.float64 if tl.float64 in types else tl.float32
