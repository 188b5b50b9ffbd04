"""The update kernel: one launch for any number of tensors, whatever the rule.

A program owns one chunk of BLOCK consecutive elements of one tensor. Which chunk of which tensor
stands in two small device arrays; where the tensors live stands in a table of addresses::

    row 0             number of elements
    row 1             row of the coefficient table that holds this tensor's scalars
    row 2             address of the parameter
    rows 3 ...        addresses of the inputs (the gradient), then of the states

with one column a tensor. Coefficients and control values are float64 and narrowed here, so that
one table serves every bucket of a device.
"""

from __future__ import annotations

from .codecs import compute_type, decode, encode
from .lang import jit, tl

# Elements and threads of a program. A thread holds 8 elements of each operand: one 16-byte access
# for 2-byte types, two for float32, and AdamW in float32 stays below 64 registers.
BLOCK = 1024
THREADS = 128
# Without alignment each element has an address of its own, which takes registers.
UNALIGNED_BLOCK = 512

# Rows of the address table in front of the addresses.
HEADER_ROWS = 2


def block_size(aligned: bool) -> int:
    """Elements a program owns."""
    return BLOCK if aligned else UNALIGNED_BLOCK


@jit(do_not_specialize=["width"])
def update_tensors(
    table,  # int64 [HEADER_ROWS + operands, width]
    width,  # int32: columns of the table
    chunk_tensor,  # int32 [programs]: column of the tensor
    chunk_index,  # int32 [programs]: which chunk of that tensor
    coefficients,  # float64 [rows, N_COEFFICIENTS]
    control,  # float64 [2]: factor on the gradient, and whether to skip the step
    RULE: tl.constexpr,  # the device function of the rule
    OPTIONS: tl.constexpr,  # its compile-time options
    DTYPES: tl.constexpr,  # element types of parameter, inputs and states
    DEGREES: tl.constexpr,  # for each input, its degree in the gradient
    N_COEFFICIENTS: tl.constexpr,
    COMPUTE: tl.constexpr,  # type the arithmetic is done in
    ALIGNED: tl.constexpr,  # whether every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,
):
    """Update every chunk in place, unless ``control`` says that the step is to be skipped."""
    if tl.load(control + 1) == 0:
        program = tl.program_id(0)
        column = table + tl.load(chunk_tensor + program)
        numel = tl.load(column)
        row = coefficients + tl.load(column + width) * N_COEFFICIENTS
        scale = tl.load(control).to(COMPUTE)
        scalars = ()
        for i in tl.static_range(N_COEFFICIENTS):
            scalars = scalars + (tl.load(row + i).to(COMPUTE),)
        # In int64: beyond 2^31 elements an int32 product would wrap around and pass the mask.
        start = tl.load(chunk_index + program).to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        # Only an access without a mask is vectorised, so whole chunks take a branch of their own.
        if start + BLOCK <= numel:
            _update_chunk(
                column, width, offsets, None, scale, scalars,
                RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
            )  # fmt: skip
        else:
            _update_chunk(
                column, width, offsets, offsets < numel, scale, scalars,
                RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
            )  # fmt: skip


@jit
def _update_chunk(
    column, width, offsets, mask, scale, scalars,
    RULE: tl.constexpr, OPTIONS: tl.constexpr, DTYPES: tl.constexpr, DEGREES: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Load one chunk of every operand, apply the rule, and store parameter and states."""
    n_inputs: tl.constexpr = len(DEGREES)
    inputs = ()
    for i in tl.static_range(n_inputs):
        x = decode(address(column, width, 1 + i, DTYPES, ALIGNED) + offsets, mask, COMPUTE)
        x = x * scale
        if DEGREES[i] == 2:
            x = x * scale
        inputs = inputs + (x,)
    apply_rule(
        column, width, offsets, mask, inputs, scalars,
        RULE, OPTIONS, DTYPES, n_inputs, COMPUTE, ALIGNED,
    )  # fmt: skip


@jit
def apply_rule(
    column, width, offsets, mask, inputs, scalars,
    RULE: tl.constexpr, OPTIONS: tl.constexpr, DTYPES: tl.constexpr, N_INPUTS: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update one chunk of parameter and states, whose addresses follow those of the inputs."""
    n_operands: tl.constexpr = len(DTYPES)
    parameter = address(column, width, 0, DTYPES, ALIGNED) + offsets
    p = decode(parameter, mask, COMPUTE)
    # Addresses of states are kept from load to store: a store might alias the table, so that
    # reading an address again would wait for it.
    pointers = ()
    states = ()
    for i in tl.static_range(1 + N_INPUTS, n_operands):
        pointer = address(column, width, i, DTYPES, ALIGNED) + offsets
        pointers = pointers + (pointer,)
        states = states + (decode(pointer, mask, COMPUTE),)
    p, states = RULE(p, inputs, states, scalars, OPTIONS)
    encode(parameter, p, mask)
    for i in tl.static_range(n_operands - 1 - N_INPUTS):
        encode(pointers[i], states[i], mask)


@jit
def address(column, width, OPERAND: tl.constexpr, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Read an operand's address and give it its type and, where it holds, its alignment."""
    # 2 is HEADER_ROWS, in int64 because a table can have many columns.
    value = tl.load(column + (2 + OPERAND) * width.to(tl.int64))
    pointer = value.to(tl.pointer_type(DTYPES[OPERAND]))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def update_constants(
    rule, options: tuple[bool, ...], types: tuple, aligned: bool, block: int
) -> dict[str, object]:
    """State what ``update_tensors`` is compiled for: whoever launches or compiles it asks here.

    Args:
        rule: the ``Rule``.
        options: its compile-time options.
        types: Triton's types of parameter, inputs and states.
        aligned: whether every address is a multiple of 16 bytes.
        block: elements that a program owns.
    """
    return {
        "RULE": rule.update,
        "OPTIONS": options,
        "DTYPES": types,
        "DEGREES": rule.degrees,
        "N_COEFFICIENTS": rule.n_coefficients,
        "COMPUTE": compute_type(types),
        "ALIGNED": aligned,
        "BLOCK": block,
    }
