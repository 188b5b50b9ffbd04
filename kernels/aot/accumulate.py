"""The variants of the kernel that adds up gradients of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from .. import accumulate, multi_tensor
from .update import TABLE
from .variant import DTYPES, Budget, Variant, alignment_suffix, element_type


def variants() -> Iterator[Variant]:
    """Every type of gradient that a parameter of 16 bits can have."""
    for gradient in ("bf16", "fp16", "fp32"):
        yield _accumulate(gradient)
    yield _accumulate("bf16", aligned=False)


def _accumulate(gradient: str, aligned: bool = True) -> Variant:
    """Read the gradient, and read and write the sum, by 128-bit accesses."""
    types = (element_type("fp32"), element_type(gradient))
    return Variant(
        name=f"accumulate {gradient}{alignment_suffix(aligned)}",
        kernel=accumulate.accumulate,
        arguments=dict(TABLE),
        constants=accumulate.accumulate_constants(types, aligned),
        threads=multi_tensor.THREADS,
        block=multi_tensor.block_size(aligned),
        budget=Budget(bytes_per_element=DTYPES[gradient] + 8 if aligned else None),
    )
