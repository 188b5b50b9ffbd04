"""The variants of the update kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from .. import multi_tensor, telemetry
from ..codecs.format import Format
from ..codecs.place import GROUP
from ..launch_config import default, update_launch_config
from ..launch_config import measured as with_telemetry
from ..rule import Group, Rule, held
from ..rules import (
    ADAM,
    BATCH_DECOUPLED_ADAM,
    BATCH_DECOUPLED_RMSPROP,
    REGISTRY,
    RMSPROP,
    SGD,
)
from . import formats
from .formats import Kept
from .option_sets import option_sets
from .variant import DTYPES, Budget, Variant, alignment_suffix, element_bytes, element_type

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

# AMD's compiler takes more than NVIDIA's for a few formats, and stack where it is kept from that.
# With so many four waves fit on a SIMD.
AMD_REGISTERS = 128

# Of AdamW in float32 with telemetry: a program of 256 threads three times on a processor.
MEASURED_REGISTERS = 80

# Rules that are compiled for some formats, and hyper-parameters that choose their options.
_SOME: tuple[tuple[Rule, Group], ...] = (
    (SGD, {"momentum": 0.9}),
    (RMSPROP, {}),
    (RMSPROP, {"momentum": 0.9}),
    (BATCH_DECOUPLED_ADAM, {}),
)


def variants(architecture: str = "") -> Iterator[Variant]:
    """Every variant that the registry's rules can need.

    Args:
        architecture: for which, as in ``launch_config.update_launch_config``.
    """
    yield from plain_variants(architecture)
    backend = architecture.partition(":")[0]
    for kept in formats.every():
        yield update_kept(ADAM, ADAM.example_groups[0], kept, backend)
    for kept in formats.averaged():
        yield update_kept(ADAM, ADAM.example_groups[0], kept, backend)
        if kept.average == "fp32" and kept.aligned and not kept.rowwise:
            for rule, more in _SOME:
                yield update_kept(rule, {**rule.example_groups[0], **more}, kept, backend)
    yield from measured_variants(architecture)
    yield from held_variants(architecture)
    for rule, more in _SOME:
        for kept in formats.some():
            yield update_kept(rule, {**rule.example_groups[0], **more}, kept, backend)


def held_variants(architecture: str = "") -> Iterator[Variant]:
    """Those that read squares of an earlier step, in the unit of the update already."""
    for rule in map(held, (BATCH_DECOUPLED_ADAM, BATCH_DECOUPLED_RMSPROP)):
        group = rule.example_groups[0]
        states = len(rule.states(group))
        for param, gradient, state, aligned in LAYOUTS:
            squares = "fp64" if param == "fp64" else "fp32"
            types = (param, gradient, squares, *[state] * states)
            variant = update_tensors(rule, rule.options(group), types, aligned, architecture)
            yield replace(variant, name=f"{variant.name}, squares held")
    rule = held(BATCH_DECOUPLED_ADAM)
    for kept in formats.some():
        variant = update_kept(rule, rule.example_groups[0], kept, architecture.partition(":")[0])
        yield replace(variant, name=f"{variant.name}, squares held")


def measured_variants(architecture: str = "") -> Iterator[Variant]:
    """Those with telemetry: one row of sums a chunk, whatever else there is."""
    backend = architecture.partition(":")[0]
    group = ADAM.example_groups[0]
    for param, gradient, state, aligned in LAYOUTS:
        types = (param, gradient, state, state)
        yield update_tensors(ADAM, ADAM.options(group), types, aligned, architecture, True)
    for rule, more in _SOME:
        group = {**rule.example_groups[0], **more}
        types = ("fp32",) * (1 + len(rule.degrees) + len(rule.states(group)))
        yield update_tensors(rule, rule.options(group), types, True, architecture, True)
    for kept in formats.measured():
        yield update_kept(ADAM, ADAM.example_groups[0], kept, backend)


def plain_variants(architecture: str = "") -> Iterator[Variant]:
    """Those of parameters and states as torch keeps them.

    Rules that differ in coefficients alone, as Adam's and AdamC's, have one kernel: the first's.
    """
    found = set()
    for rule in REGISTRY.values():
        for group in option_sets(rule):
            key = rule.options(group), len(rule.states(group))
            if (rule.update, key) in found:
                continue
            found.add((rule.update, key))
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
    measured: bool = False,
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
    limit = 64
    if measured:
        launch, names, limit = with_telemetry(launch), f"{names} measured", MEASURED_REGISTERS
    sums = sums_of(dtypes) if measured else 0
    return Variant(
        name=f"{rule.label(options)} {names}{alignment_suffix(aligned)}",
        kernel=multi_tensor.update_tensors,
        arguments={
            **TABLE,
            "coefficients": "*fp64",
            "control": "*fp64",
        },
        constants=multi_tensor.update_constants(
            rule, options, types, aligned, launch.block, backend=architecture.partition(":")[0],
            measured=measured,
        ),
        threads=launch.threads,
        block=launch.block,
        sums=sums,
        budget=Budget(
            bytes_per_element=2 * sum(sizes) - inputs if aligned else None,
            narrow={32: 4 * sums / launch.block} if sums and aligned else {},
            registers=limit if is_adamw else None,
            amd_registers=AMD_REGISTERS if measured and is_adamw else None,
        ),
        coefficients=rule.coefficient_names,
    )  # fmt: skip


def update_kept(rule: Rule, group: Group, kept: Kept, backend: str = "cuda") -> Variant:
    """The update kernel with a rule, for parameters and states that are kept in another way.

    Whole chunks of aligned tensors move in 128-bit accesses where an element has two bytes or more,
    and in 64-bit ones where it has one; of each group a scale of 32 bits is read, and written.
    """
    format, options = kept.format(rule, group), rule.options(group)
    squares = ["fp64" if kept.types[0] == "fp64" else "fp32"] * (len(rule.degrees) - 1)
    types = (*kept.types, *squares, *kept.kept_types(rule, group))
    launch = default(kept.aligned, kept.rowwise, format)
    launch = with_telemetry(launch) if kept.measured else launch
    is_counted = kept.aligned and not kept.rowwise
    limit = multi_tensor.register_limit(format, kept.measured)
    moved = bytes_by_width(types, format, len(rule.degrees)) if is_counted else {}
    sums = sums_of(types) if kept.measured else 0
    if moved and sums:
        moved[32] = moved.get(32, 0.0) + 4 * sums / launch.block
    return Variant(
        name=f"{rule.label(options)} {kept.name}",
        kernel=multi_tensor.update_tensors,
        arguments={**TABLE, "coefficients": "*fp64", "control": "*fp64"},
        constants=multi_tensor.update_constants(
            rule, options, tuple(map(element_type, types)), kept.aligned, launch.block, format,
            kept.rowwise, backend=backend, measured=kept.measured,
        ),
        threads=launch.threads,
        registers=limit,
        block=launch.block,
        sums=sums,
        budget=kept_budget(moved, limit),
        coefficients=rule.coefficient_names,
    )  # fmt: skip


def sums_of(types: Sequence[str]) -> int:
    """Return how many 32-bit sums a program writes that measures; none in float64."""
    return 0 if "fp64" in types else telemetry.COUNT


def kept_budget(moved: Mapping[int, float], limit: int | None) -> Budget:
    """Return what a variant may use that keeps tensors in other formats than as they are.

    Args:
        moved: bytes an element by width of the access; nothing where they are not counted.
        limit: registers of a thread on NVIDIA's.
    """
    return Budget(
        bytes_per_element=moved.get(128),
        narrow={width: size for width, size in moved.items() if width != 128},
        registers=limit,
        amd_registers=limit and AMD_REGISTERS,
    )


def bytes_by_width(types: Sequence[str], format: Format, n_inputs: int) -> dict[int, float]:
    """Return the bytes an element that one pass moves, by the width of the access in bits.

    Args:
        types: of parameter, inputs, and what is kept.
        format: how parameter and states are.
        n_inputs: how many of them are read alone.
    """
    scales = set(format.scales(n_inputs)) if format.states else set()
    moved = {128: 0.0, 64: 0.0, 32: 0.0}
    for row, name in enumerate(types):
        passes = 1 if 1 <= row <= n_inputs else 2
        size = element_bytes(name)
        if row in scales:
            moved[32] += passes * size / GROUP
        else:
            moved[64 if size == 1 else 128] += passes * size
    return {width: count for width, count in moved.items() if count}
