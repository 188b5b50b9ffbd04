"""Gradients of a micro-batch added to float32 sums: one launch for any number of tensors.

The table of addresses is that of ``multi_tensor.py``, with sums in the place of parameters, and in
row 1 whether a sum has something to add to: of the first micro-batch it is written, and not read.
"""

from __future__ import annotations

from .codecs import compute_type, decode, encode
from .lang import jit, tl
from .multi_tensor import address, block_size


@jit(do_not_specialize=["width"])
def accumulate(
    table,  # int64 [4, width]: numel, whether there is a sum, address of the sum, of the gradient
    width,  # int32: columns of the table
    chunk_tensor,  # int32 [programs]: column of the tensor
    chunk_index,  # int32 [programs]: which chunk of that tensor
    DTYPES: tl.constexpr,  # element types of sum and gradient
    COMPUTE: tl.constexpr,  # type of the addition
    ALIGNED: tl.constexpr,  # whether every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,
):
    """Add each chunk of the gradients to the sums, or begin these with them."""
    program = tl.program_id(0)
    column = table + tl.load(chunk_tensor + program)
    numel = tl.load(column)
    begun = tl.load(column + width)
    start = tl.load(chunk_index + program).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _add_chunk(column, width, offsets, None, begun, DTYPES, COMPUTE, ALIGNED)
    else:
        _add_chunk(column, width, offsets, offsets < numel, begun, DTYPES, COMPUTE, ALIGNED)


@jit
def _add_chunk(
    column, width, offsets, mask, begun,
    DTYPES: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    target = address(column, width, 0, DTYPES, ALIGNED) + offsets
    total = decode(address(column, width, 1, DTYPES, ALIGNED) + offsets, mask, COMPUTE)
    if begun != 0:
        total += decode(target, mask, COMPUTE)
    encode(target, total, mask)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def accumulate_constants(types: tuple, aligned: bool) -> dict[str, object]:
    """State what ``accumulate`` is compiled for: whoever launches or compiles it asks here.

    Args:
        types: Triton's types of sum and gradient.
        aligned: whether every address is a multiple of 16 bytes.
    """
    return {
        "DTYPES": types,
        "COMPUTE": compute_type(types),
        "ALIGNED": aligned,
        "BLOCK": block_size(aligned),
    }
