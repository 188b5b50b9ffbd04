"""The variants of the kernels that reduce the samples of a weight.

To add a kernel: write a function that returns its ``Variant`` for a type, and yield it below. What
the launcher decides from a tensor is stated by hand: strides that are 1, multiples of 16, None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..lang import tl
from ..per_sample import convolution, linear, tiles
from ..per_sample.linear import has_tf32
from ..per_sample.shapes import Tile, convolution_tile, rows_tile, samples_tile
from .targets import capability
from .variant import DTYPES, Budget, Variant

# Type of the operands, and how products of float32 are formed where a target has tf32.
OPERANDS = (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee"))

# Widths of a weight for which a tile of its own is chosen: wide in both directions, or in neither.
WIDTHS = (4096, 64)

# Outputs of a group and columns: 3 x 3 over 512 channels, and the same by depth.
CONVOLUTIONS = ((512, 4608), (1, 9))


def variants(target: Any) -> Iterator[Variant]:
    """Every variant on a target."""
    for dtype, precision in _operands(target):
        choice = capability(target), DTYPES[dtype], precision
        # A set: the same tile may serve both widths.
        for tile in sorted({samples_tile(*choice, width, width) for width in WIDTHS}):
            yield linear_samples(dtype, precision, tile, segmented=False)
            yield linear_samples(dtype, precision, tile, segmented=True)
        for tile in sorted({rows_tile(*choice, width, width) for width in WIDTHS}):
            yield linear_rows(dtype, precision, tile)
        if dtype == "bf16":
            for tile in sorted({samples_tile(*choice, width, width, False) for width in WIDTHS}):
                yield linear_samples(dtype, precision, tile, segmented=False, wide=False)
                yield linear_samples(dtype, precision, tile, segmented=True, wide=False)
            for tile in sorted({rows_tile(*choice, width, width, False) for width in WIDTHS}):
                yield linear_rows(dtype, precision, tile, wide=False)
        for outputs, inputs in CONVOLUTIONS:
            tile = convolution_tile(*choice, outputs, inputs)
            yield convolution_samples(dtype, precision, tile)
    for dtype in ("fp32", "bf16"):
        yield reduce_partials(dtype)


def _operands(target: Any) -> list[tuple[str, str]]:
    """OPERANDS, as a target has them."""
    if has_tf32(str(target.arch) if target.backend == "hip" else None):
        return list(OPERANDS)
    return [(dtype, "ieee") for dtype in dict.fromkeys(dtype for dtype, _ in OPERANDS)]


def linear_samples(
    dtype: str, precision: str, tile: Tile, segmented: bool, wide: bool = True
) -> Variant:
    """Samples of many rows, whose products must be matrix instructions."""
    arguments = {"samples": "i32", "length": "i32", "samples_of_split": "i32"}
    strides = ("a_sample", "e_sample")
    constants: dict[str, Any] = {"offsets": None}
    if segmented:
        arguments["offsets"] = "*i32"
        # Samples are reached through their offsets: the stride is 0.
        constants = {}
    return _linear(
        linear.linear_samples,
        "segmented" if segmented else "dense",
        dtype,
        precision,
        tile,
        {**arguments, **dict.fromkeys(strides, "i32")},
        constants,
        strides,
        wide,
    )


def linear_rows(dtype: str, precision: str, tile: Tile, wide: bool = True) -> Variant:
    """Samples of one row."""
    arguments = {"rows": "i32", "rows_of_split": "i32"}
    # Squares of 16-bit operands are float32, whose products are formed as those of float32 are.
    squares = {"SQUARE_PRECISION": precision}
    return _linear(linear.linear_rows, "", dtype, precision, tile, arguments, squares, (), wide)


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
        constants={
            "a_column": 1,
            "e_column": 1,
            **constants,
            **tile.constants(precision, accumulate=False),
        },
        threads=tile.threads,
        stages=tile.stages,
        divisible=(*sizes, *strides) if wide else (),
        budget=Budget(matrix=dtype != "fp32" or precision != "ieee"),
    )


def convolution_samples(dtype: str, precision: str, tile: Tile) -> Variant:
    """A convolution in torch's default memory format, at no fortunate size."""
    sizes = (
        "samples", "samples_of_split", "groups", "outputs", "channels", "columns", "height",
        "width", "positions", "out_width", "kernel_h", "kernel_w", "stride_h", "stride_w",
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
            "x_column": 1,
            "e_position": 1,
            "INDEX": tl.int32,
            **tile.constants(precision, accumulate=False),
        },
        threads=tile.threads,
        stages=tile.stages,
    )


def reduce_partials(dtype: str) -> Variant:
    """The second stage of a split product, with a gradient of a type."""
    return Variant(
        name=f"reduce_partials {dtype}",
        kernel=tiles.reduce_partials,
        arguments={
            "partials": "*fp32",
            "gradient": f"*{dtype}",
            "squares": "*fp32",
            "splits": "i32",
            "numel": "i32",
        },
        constants=tiles.reduce_partials_constants(accumulate=False),
        threads=tiles.REDUCE_THREADS,
        divisible=("numel",),
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
