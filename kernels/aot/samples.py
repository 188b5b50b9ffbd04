"""The variants of the kernels that reduce the samples of a weight.

To add a kernel: write a function that returns its ``Variant`` for a type, and yield it below. What
the launcher decides from a tensor is stated by hand: strides that are 1, multiples of 16, None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..lang import tl
from ..per_sample import convolution, linear, rows, shares
from ..per_sample.linear import has_tf32
from ..per_sample.shapes import (
    ROWS,
    SHARE_REGISTERS,
    Tile,
    convolution_tile,
    rows_tile,
    samples_tile,
    takes_descriptors,
)
from .targets import capability
from .variant import DTYPES, Budget, Variant

# Type of the operands, and how products of float32 are formed where a target has tf32.
OPERANDS = (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee"))

# Widths of a weight for which a tile of its own is chosen: wide in both directions, or in neither.
WIDTHS = (4096, 64)

# What every kernel of tiles is told of its programs' shares.
SHARED = ("whole", "shares", "positions")

# Outputs of a group and columns: 3 x 3 over 512 channels, and the same by depth.
CONVOLUTIONS = ((512, 4608), (1, 9))


def variants(target: Any) -> Iterator[Variant]:
    """Every variant on a target."""
    sizes = set()
    for dtype, precision in _operands(target):
        for variant in _of_type(dtype, precision, target):
            sizes.add((variant.constants["BLOCK_O"], variant.constants["BLOCK_I"]))
            yield variant
            yield shared(variant)
    for dtype in ("fp32", "bf16"):
        for outputs, inputs in sorted(sizes):
            yield reduce_shares(dtype, outputs, inputs)


def _of_type(dtype: str, precision: str, target: Any) -> Iterator[Variant]:
    """Every variant for operands of a type, with a whole tile a program."""
    choice = capability(target), DTYPES[dtype], precision
    for wide in (True, False):
        if not wide and dtype != "bf16":
            continue
        # Those of float16 are bfloat16's.
        lengths = ROWS if wide and dtype != "fp16" else ROWS[:1]
        for form in ("dense", "described", "segmented"):
            if form != "described" or (wide and takes_descriptors(*choice)):
                for tile in _samples_tiles(*choice, wide, lengths, form == "segmented"):
                    yield linear_samples(dtype, precision, tile, form, wide)
        for tile in sorted({rows_tile(*choice, width, width, wide) for width in WIDTHS}):
            yield linear_rows(dtype, precision, tile, wide)
    for outputs, inputs in CONVOLUTIONS:
        yield convolution_samples(dtype, precision, convolution_tile(*choice, outputs, inputs))


def shared(variant: Variant) -> Variant:
    """Return the variant whose programs have shares, and write partial results."""
    constants = {name: value for name, value in variant.constants.items() if name != "partials"}
    arguments = {**variant.arguments, "partials": "*fp32"}
    name = f"{variant.name} shared"
    return replace(
        variant,
        name=name,
        arguments=arguments,
        constants=constants,
        registers=SHARE_REGISTERS,
    )


def _samples_tiles(
    capability: int,
    itemsize: int,
    precision: str,
    wide: bool,
    lengths: Sequence[int],
    segmented: bool,
) -> list[Tile]:
    choice = capability, itemsize, precision
    # A set: the same tile may serve several widths and lengths.
    tiles = {
        samples_tile(*choice, width, width, wide, length, segmented)
        for width in WIDTHS
        for length in lengths
    }
    return sorted(tiles)


def _operands(target: Any) -> list[tuple[str, str]]:
    """OPERANDS, as a target has them."""
    if has_tf32(str(target.arch) if target.backend == "hip" else None):
        return list(OPERANDS)
    return [(dtype, "ieee") for dtype in dict.fromkeys(dtype for dtype, _ in OPERANDS)]


def linear_samples(dtype: str, precision: str, tile: Tile, form: str, wide: bool = True) -> Variant:
    """Samples of many rows, whose products must be matrix instructions.

    ``form`` is how they are reached: ``dense``, ``described`` or ``segmented``.
    """
    numbers = ("samples", "length", *SHARED, "unit", "steps")
    arguments = dict.fromkeys(numbers, "i32")
    strides = ("a_sample", "e_sample")
    constants: dict[str, Any] = {"DESCRIBED": form == "described"}
    if form == "segmented":
        # Samples are reached through their offsets: the stride is 0.
        arguments["offsets"] = "*i32"
    else:
        constants["offsets"] = None
    if form == "described":
        arguments["a"] = f"tensordesc<{dtype}[1,{tile.rows},{tile.inputs}]>"
        arguments["e"] = f"tensordesc<{dtype}[1,{tile.rows},{tile.outputs}]>"
    return _linear(
        linear.linear_samples,
        form,
        dtype,
        precision,
        tile,
        {**arguments, **dict.fromkeys(strides, "i32")},
        {**constants, **tile.constants_of_samples(precision, accumulate=False)},
        strides,
        wide,
    )


def linear_rows(dtype: str, precision: str, tile: Tile, wide: bool = True) -> Variant:
    """Samples of one row."""
    arguments = dict.fromkeys(("rows", *SHARED), "i32")
    constants = tile.constants(precision, accumulate=False)
    return _linear(rows.linear_rows, "", dtype, precision, tile, arguments, constants, (), wide)


def _linear(
    kernel: Any,
    label: str,
    dtype: str,
    precision: str,
    tile: Tile,
    arguments: dict[str, str],
    constants: dict[str, Any],
    strides: tuple[str, ...],
    wide: bool,
) -> Variant:
    sizes = ("outputs", "inputs", "a_row", "e_row")
    return Variant(
        name=_name(kernel, label, dtype, precision, tile) + ("" if wide else " unaligned"),
        kernel=kernel,
        arguments={
            **dict.fromkeys(("a", "e", "gradient"), f"*{dtype}"),
            "squares": "*fp32",
            **arguments,
            **dict.fromkeys(sizes, "i32"),
        },
        constants={"partials": None, "a_column": 1, "e_column": 1, **constants},
        threads=tile.threads,
        stages=tile.stages,
        divisible=(*sizes, *strides) if wide else (),
        budget=Budget(matrix=dtype != "fp32" or precision != "ieee"),
    )


def convolution_samples(dtype: str, precision: str, tile: Tile) -> Variant:
    """A convolution in torch's default memory format, at no fortunate size."""
    sizes = (
        "whole", "shares", "row_blocks", "unit", "steps",
        "groups", "outputs", "channels", "columns", "height", "width",
        "positions", "out_width", "kernel_h", "kernel_w", "stride_h", "stride_w",
        "padding_h", "padding_w", "dilation_h", "dilation_w",
        "x_sample", "x_channel", "x_row", "e_sample", "e_channel",
    )  # fmt: skip
    return Variant(
        name=_name(convolution.convolution_samples, "", dtype, precision, tile),
        kernel=convolution.convolution_samples,
        arguments={
            **dict.fromkeys(("x", "e", "gradient"), f"*{dtype}"),
            "squares": "*fp32",
            **dict.fromkeys(sizes, "i32"),
        },
        constants={
            "partials": None,
            "x_column": 1,
            "e_position": 1,
            "INDEX": tl.int32,
            **tile.constants_of_samples(precision, accumulate=False),
        },
        threads=tile.threads,
        stages=tile.stages,
    )


def reduce_shares(dtype: str, outputs: int, inputs: int) -> Variant:
    """What adds the partial results of shares, with a gradient of a type."""
    numbers = (*SHARED, "tiles", "unit", "steps")
    return Variant(
        name=f"reduce_shares {dtype} {outputs}x{inputs}",
        kernel=shares.reduce_shares,
        arguments={
            **dict.fromkeys(("partials", "squares"), "*fp32"),
            "gradient": f"*{dtype}",
            **dict.fromkeys((*numbers, "outputs", "inputs"), "i32"),
        },
        constants=shares.reduce_shares_constants(outputs, inputs, accumulate=False),
        threads=shares.REDUCE_THREADS,
        divisible=("outputs", "inputs"),
    )


def _name(kernel: Any, label: str, dtype: str, precision: str, tile: Tile) -> str:
    parts = (
        kernel.__name__,
        label,
        dtype,
        precision if dtype == "fp32" else "",
        f"{tile.outputs}x{tile.inputs}x{tile.rows}",
    )
    return " ".join(part for part in parts if part)
