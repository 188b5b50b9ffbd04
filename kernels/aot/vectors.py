"""The variants of the vector and embedding kernels."""

from __future__ import annotations

from collections.abc import Iterator

from ..per_sample import embedding, vectors
from .variant import DTYPES, Budget, Variant

# What is reduced, and whether samples are given by offsets.
FORMS = (
    ("bias", False),
    ("gain", False),
    ("RMSNorm gain", False),
    ("gain and bias", False),
    ("gain and bias", True),
)


def variants() -> Iterator[Variant]:
    """Every variant."""
    for dtype in ("fp32", "bf16", "fp16"):
        yield from _variants(dtype)


def _variants(dtype: str) -> Iterator[Variant]:
    """Every variant for one type of the errors."""
    for form, segmented in FORMS:
        yield partial_sums(dtype, form, segmented)
    yield partial_sums(dtype, "bias", False, layout="samples of one position")
    yield partial_sums(dtype, "gain and bias", False, layout="samples of one position")
    yield partial_sums(dtype, "bias", False, layout="shared samples")
    yield partial_sums(dtype, "bias", False, layout="contiguous positions")
    yield partial_sums(dtype, "gain and bias", False, layout="unaligned")
    yield finish(dtype, chunked=False)
    yield finish(dtype, chunked=True)
    for segmented in (False, True):
        yield sum_chunks(dtype, segmented)
    yield sum_chunks(dtype, False, aligned=False)
    yield join(dtype)


def partial_sums(dtype: str, form: str, segmented: bool, layout: str = "") -> Variant:
    """Stage 1. A variant of its own for each shape of tile, and for each set of operands.

    Unless rows are unaligned, errors and input are read once, by 128-bit loads.
    """
    contiguous_rows = layout == "contiguous positions"
    block = vectors.STRIDED_BLOCK if contiguous_rows else vectors.BLOCK
    rows = vectors.TILE // block
    lanes = rows if layout == "samples of one position" else 1
    absent = []
    if form == "bias":
        absent += ["x", "rstd"]
    if form in ("bias", "RMSNorm gain"):
        absent += ["mean"]
    if not segmented:
        absent += ["offsets"]
    pointers = {
        "e": f"*{dtype}",
        "x": f"*{dtype}",
        "mean": "*fp32",
        "rstd": "*fp32",
        "offsets": "*i32",
        "partials": "*fp32",
    }
    strides = ["e_sample", "e_row", "e_column", "x_sample", "x_row", "x_column"]
    strides += ["norm_sample", "norm_row"]
    ones = ["e_row"] if contiguous_rows else ["e_column", "x_column"]
    ones += ["norm_row"]
    if layout == "samples of one position":
        ones += ["length"]
    divisible = (*strides, "width", "length") if layout != "unaligned" else ()
    constants = {
        **dict.fromkeys(absent),
        **dict.fromkeys(ones, 1),
        "BIAS": "bias" in form,
        "ONE_STEP": layout == "samples of one position",
        "CHUNKED": layout == "shared samples",
        "SAMPLES": lanes,
        "ROWS": rows // lanes,
        "BLOCK": block,
    }
    integers = (*strides, "width", "count", "length", "chunks", "samples_per_program")
    arguments = {**pointers, **dict.fromkeys(integers, "i32")}
    label = f"{form}{' segmented' if segmented else ''}{f' ({layout})' if layout else ''}"
    return Variant(
        name=f"partial_sums {label} {dtype}",
        kernel=vectors.partial_sums,
        arguments={k: v for k, v in arguments.items() if k not in constants},
        constants=constants,
        threads=vectors.THREADS,
        block=vectors.TILE,
        divisible=tuple(d for d in divisible if d not in constants),
        budget=Budget(
            bytes_per_element=DTYPES[dtype] * (1 if form == "bias" else 2) if divisible else None
        ),
    )


def finish(dtype: str, chunked: bool) -> Variant:
    """Stage 2."""
    chunks = 16 if chunked else 1
    return Variant(
        name=f"finish gain and bias{' (shared samples)' if chunked else ''} {dtype}",
        kernel=vectors.finish,
        arguments={
            "partials": "*fp32",
            "gain_gradient": f"*{dtype}",
            "gain_squares": "*fp32",
            "bias_gradient": f"*{dtype}",
            "bias_squares": "*fp32",
            "width": "i32",
            "count": "i32",
            "chunks": "i32",
        },
        constants=vectors.finish_constants(True, False, chunked, chunks),
        threads=vectors.FINISH_THREADS,
        divisible=("width",),
    )


def sum_chunks(dtype: str, segmented: bool, aligned: bool = True) -> Variant:
    """Stage 1 of an embedding.

    Unless rows are unaligned, errors are read once, by 128-bit loads, and the squares that they are
    added to. How often a store stands in the code is up to the compiler.
    """
    constants = {"e_column": 1, **embedding.sum_chunks_constants(True, segmented)}
    label = f"{' segmented' if segmented else ''}{'' if aligned else ' unaligned'}"
    return Variant(
        name=f"embedding sum_chunks{label} {dtype}",
        kernel=embedding.sum_chunks,
        arguments={
            "keys": "*i64",
            "order": "*i64",
            "e": f"*{dtype}",
            "e_sample": "i32",
            "e_row": "i32",
            "gradient": f"*{dtype}",
            "squares": "*fp32",
            "partials": "*fp32",
            "tokens": "i32",
            "length": "i32",
            "vocabulary": "i32",
            "width": "i32",
        },
        constants=constants,
        threads=embedding.THREADS,
        block=embedding.AT_ONCE * embedding.BLOCK,
        divisible=("e_sample", "e_row", "width") if aligned else (),
        budget=Budget(read_per_element=DTYPES[dtype] + 4 if aligned else None),
    )


def join(dtype: str) -> Variant:
    """Stage 2 of an embedding."""
    return Variant(
        name=f"embedding join {dtype}",
        kernel=embedding.join,
        arguments={
            "keys": "*i64",
            "partials": "*fp32",
            "gradient": f"*{dtype}",
            "squares": "*fp32",
            "tokens": "i32",
            "chunks": "i32",
            "vocabulary": "i32",
            "width": "i32",
        },
        constants=embedding.join_constants(add=True),
        threads=embedding.THREADS,
        divisible=("width",),
    )
