"""The variants of the kernels that take per-sample gradients from memory."""

from __future__ import annotations

from collections.abc import Iterator

from .. import launch_config, multi_tensor
from ..per_sample import materialised
from ..rules import BATCH_DECOUPLED_ADAM, REGISTRY
from .formats import Kept
from .update import TABLE, bytes_by_width, kept_budget
from .variant import DTYPES, Budget, Variant, element_bytes, element_type

# Loads that the loop over samples has in its text: four at a time, and the rest one by one.
LOADS = 5


def variants() -> Iterator[Variant]:
    """Every variant: samples in one tensor or two, reduced or reduced and used."""
    for samples in ("fp32", "bf16", "fp16"):
        yield reduce_samples(samples)
        for rule in ("BatchDecoupledAdam", "BatchDecoupledRMSprop"):
            yield update_from_samples(rule, samples, parts=1)
    yield update_from_samples("BatchDecoupledAdam", "fp32", parts=2)
    yield update_from_samples("BatchDecoupledAdam", "fp32", parts=1, aligned=False)
    for parameter, states in (
        ("remainder", "fp32"),
        ("stochastic", "int8"),
        ("remainder8", "int8"),
    ):
        yield update_kept_from_samples(Kept(("bf16", "bf16"), parameter, states))
    yield update_kept_from_samples(Kept(("bf16", "bf16"), "remainder8", "int8", rowwise=True))


def reduce_samples(samples: str) -> Variant:
    """Sum and sum of squares; the samples are read once, by 128-bit loads."""
    block = multi_tensor.block_size(True)
    dtypes = ("fp32", "fp32", samples)
    return Variant(
        name=f"reduce_samples {samples}",
        kernel=materialised.reduce_samples,
        arguments={**TABLE, "counts": "*i32"},
        constants=materialised.reduce_samples_constants(
            tuple(element_type(d) for d in dtypes), aligned=True
        ),
        threads=multi_tensor.THREADS,
        block=block,
        budget=Budget(bytes_per_element=LOADS * DTYPES[samples] + 8),
    )


def update_from_samples(rule: str, samples: str, parts: int, aligned: bool = True) -> Variant:
    """The whole step of a float32 parameter: reduction, moving averages, update."""
    known = REGISTRY[rule]
    group = known.example_groups[0]
    states = len(known.states(group))
    launch = launch_config.default(aligned)
    dtypes = ("fp32", *([samples] * parts), *(["fp32"] * states))
    types = tuple(element_type(d) for d in dtypes)
    moved = parts * LOADS * DTYPES[samples] + 8 * (1 + states)
    suffix = f"{f', {parts} parts' if parts > 1 else ''}{'' if aligned else ' unaligned'}"
    return Variant(
        name=f"update_from_samples {rule} {samples} samples{suffix}",
        kernel=materialised.update_from_samples,
        arguments={**TABLE, "coefficients": "*fp64", "control": "*fp64", "counts": "*i32"},
        constants=materialised.update_from_samples_constants(
            known, known.options(group), types, parts, aligned, launch.block
        ),
        threads=launch.threads,
        block=launch.block,
        budget=Budget(bytes_per_element=moved if aligned else None),
        coefficients=known.coefficient_names,
    )


def update_kept_from_samples(kept: Kept) -> Variant:
    """The same for parameters and states that are kept in another way."""
    rule = BATCH_DECOUPLED_ADAM
    group = rule.example_groups[0]
    format = kept.format(rule, group)
    types = (*kept.types, *kept.kept_types(rule, group))
    launch = launch_config.default(kept.aligned, kept.rowwise, format)
    limit = multi_tensor.register_limit(format)
    moved = {}
    if kept.aligned and not kept.rowwise:
        moved = bytes_by_width(types, format, n_inputs=1)
        moved[128] += (LOADS - 1) * element_bytes(kept.types[1])
    return Variant(
        name=f"update_from_samples {rule.name} {kept.name}",
        kernel=materialised.update_from_samples,
        arguments={**TABLE, "coefficients": "*fp64", "control": "*fp64", "counts": "*i32"},
        constants=materialised.update_from_samples_constants(
            rule, rule.options(group), tuple(map(element_type, types)), 1, kept.aligned,
            launch.block, format, kept.rowwise,
        ),
        threads=launch.threads,
        registers=limit,
        block=launch.block,
        budget=kept_budget(moved, limit),
        coefficients=rule.coefficient_names,
    )  # fmt: skip
