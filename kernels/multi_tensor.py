"""The update kernel: one launch for any number of tensors, whatever the rule.

A program owns one chunk of BLOCK consecutive elements of one tensor. Which chunk of which tensor
stands in two small device arrays; where the tensors live stands in a table of addresses::

    row 0             number of elements
    row 1             row of the coefficient table that holds this tensor's scalars
    row 2             address of the parameter
    rows 3 ...        addresses of the inputs (the gradient), then of what is kept beside the
                      parameter, then of the states, of which codes are followed by their scales
    rows behind       what codecs that draw need to know: see ``codecs/place.py``
    last row          where partial sums of squares go, with telemetry: see ``telemetry.py``

with one column a tensor. Coefficients and control values are float64 and narrowed here, so that
one table serves every bucket of a device. Behind the rule's coefficients stands the weight of the
average of the weights, where there is one, and in the last column the step, where codecs draw.
"""

from __future__ import annotations

from .codecs import codes, compute_type, decode, encode, encode_positive, parameter
from .codecs.format import PLAIN, Format
from .codecs.place import DRAW_ROWS, ROWWISE_ROWS, draw, numbered, walk_rows
from .codecs.rounding import stochastic, turned
from .lang import jit, tl
from .telemetry import begin_sums, put_sums, sums_at
from .weight_average import follow

# Elements and threads of a program. A thread holds 8 elements of each operand: one 16-byte access
# for 2-byte types, two for float32, and AdamW in float32 stays below 64 registers.
BLOCK = 1024
THREADS = 128
# Without alignment each element has an address of its own, which takes registers.
UNALIGNED_BLOCK = 512
# So it does with codecs besides, and where groups are walked one by one.
SMALL_BLOCK = 256
# With codes a compiler left to itself takes a dozen more, and none of them for long.
REGISTERS = 80
# An average of the weights beside them is one operand more, which takes stack within those; and
# what telemetry sums up is kept to the end.
MORE_REGISTERS = 96


def register_limit(format: Format, measured: bool = False) -> int | None:
    """Registers of a thread at most, or None for as many as the compiler takes."""
    if format.parameter == "cast" and set(format.states) <= {"cast", "positive cast"}:
        return None
    return MORE_REGISTERS if measured or (format.average and format.has_codes) else REGISTERS


# Rows of the address table in front of the addresses.
HEADER_ROWS = 2


def block_size(aligned: bool, rowwise: bool = False, format: Format = PLAIN) -> int:
    """Elements a program owns."""
    if rowwise or not (aligned or format.is_cast):
        return SMALL_BLOCK
    return BLOCK if aligned else UNALIGNED_BLOCK


@jit(do_not_specialize=["width"])
def update_tensors(
    table,  # int64 [HEADER_ROWS + operands, width]
    width,  # int32: columns of the table
    chunk_tensor,  # int32 [programs]: column of the tensor
    chunk_index,  # int32 [programs]: which chunk of that tensor
    coefficients,  # float64 [rows, STRIDE]
    control,  # float64 [3]: factor on the gradient, whether to skip, the factor without clipping
    RULE: tl.constexpr,  # the device function of the rule
    OPTIONS: tl.constexpr,  # its compile-time options
    DTYPES: tl.constexpr,  # element types of parameter, inputs and states
    DEGREES: tl.constexpr,  # for each input, its degree in the gradient
    N_COEFFICIENTS: tl.constexpr,  # the rule's, and the weight of the average
    COMPUTE: tl.constexpr,  # type the arithmetic is done in
    ALIGNED: tl.constexpr,  # whether every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # columns of ``coefficients``
    PARAMETER: tl.constexpr,  # how the parameter is kept: see ``codecs/format.py``
    STATES: tl.constexpr,  # how each state is
    ROWS: tl.constexpr,  # for each state, which operand its first tensor is
    DRAWS: tl.constexpr,  # whether something that is kept depends on index and step
    AVERAGE: tl.constexpr,  # whether the last state is the average of the weights
    ROWWISE: tl.constexpr,  # whether tensors are walked row by row: see ``codecs/place.py``
    PIECES: tl.constexpr,  # whether the chunk that a tensor ends in is taken in pieces
    MEASURED: tl.constexpr,  # row of the table that says where sums go; 0 where none are formed
    EARLY: tl.constexpr,  # whether addresses are read before it is known which chunks are whole
):
    """Update every chunk in place, unless ``control`` says that the step is to be skipped."""
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor + program)
    # In int64: beyond 2^31 elements an int32 product would wrap around and pass the mask.
    chunk = tl.load(chunk_index + program).to(tl.int64)
    # Neither is below 0: a compiler that does not know it asks for all three at once.
    if (tl.load(control + 1) == 0) & (tensor >= 0):
        column = table + tensor
        # What the data waits for comes first, then what the coefficients do.
        early = addresses(column, width, len(DTYPES)) if EARLY else None
        numel = tl.load(column)
        row = coefficients + tl.load(column + width) * STRIDE
        scale = tl.load(control).to(COMPUTE)
        sums = None
        if MEASURED:
            sums = sums_at(column, width, chunk, control, MEASURED, COMPUTE)
        scalars = ()
        for i in tl.static_range(N_COEFFICIENTS):
            scalars = scalars + (tl.load(row + i).to(COMPUTE),)
        step = None
        if DRAWS:
            step = tl.load(row + (STRIDE - 1)).to(tl.int64)
        start = chunk * BLOCK
        # Here, not in the branches: there it takes half as many registers again.
        offsets = start + tl.arange(0, BLOCK)
        if ROWWISE:
            place = walk_rows(column, width, numel, chunk, 2 + len(DTYPES), BLOCK)
            _update_chunk(
                column, width, early, place, step, scale, sums, scalars,
                RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
                PARAMETER, STATES, ROWS, DRAWS, AVERAGE,
            )  # fmt: skip
        # Only an access without a mask is vectorised, so whole chunks take a branch of their own.
        elif start + BLOCK <= numel:
            whole = whole_chunk(column, width, offsets, chunk, DTYPES, DRAWS)
            _update_chunk(
                column, width, early, whole, step, scale, sums, scalars,
                RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
                PARAMETER, STATES, ROWS, DRAWS, AVERAGE,
            )  # fmt: skip
        elif PIECES:
            if MEASURED:
                begin_sums(sums)
            # What is no cast, and types of several sizes, take half as many registers again with
            # masks.
            piece = chunk * (BLOCK // 256)
            # A while loop: the interpreter of Triton 3.6 fails on range() with a run-time bound.
            while piece * 256 < numel:
                elements = piece * 256 + tl.arange(0, 256)
                last = last_chunk(column, width, numel, elements, piece, DTYPES, DRAWS)
                _update_chunk(
                    column, width, early, last, step, scale, sums, scalars,
                    RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
                    PARAMETER, STATES, ROWS, DRAWS, AVERAGE, True,
                )  # fmt: skip
                piece += 1
        else:
            last = last_chunk(column, width, numel, offsets, chunk, DTYPES, DRAWS)
            _update_chunk(
                column, width, early, last, step, scale, sums, scalars,
                RULE, OPTIONS, DTYPES, DEGREES, COMPUTE, ALIGNED,
                PARAMETER, STATES, ROWS, DRAWS, AVERAGE,
            )  # fmt: skip


@jit
def whole_chunk(column, width, offsets, chunk, DTYPES: tl.constexpr, DRAWS: tl.constexpr):
    """Place a chunk all of which are elements: as ``codecs.place.walk_rows`` returns it."""
    if DRAWS:
        BLOCK: tl.constexpr = offsets.shape[0]
        lower, upper, groups = numbered(column, width, chunk, 2 + len(DTYPES), BLOCK)
        # In 32 bits from the chunk's begin: an address of 64 bits a lane and operand costs AMD's
        # compiler a dozen registers.
        return tl.arange(0, BLOCK), None, lower, upper, groups, None, chunk * BLOCK
    else:
        return offsets, None, None, None, None, None, None


@jit
def last_chunk(column, width, numel, offsets, chunk, DTYPES: tl.constexpr, DRAWS: tl.constexpr):
    """Place a chunk that the tensor ends in."""
    if DRAWS:
        lower, upper, groups = numbered(column, width, chunk, 2 + len(DTYPES), offsets.shape[0])
        return offsets, offsets < numel, lower, upper, groups, groups * 128 < numel, None
    else:
        return offsets, offsets < numel, None, None, None, None, None


@jit
def _update_chunk(
    column, width, early, place, step, scale, sums, scalars,
    RULE: tl.constexpr, OPTIONS: tl.constexpr, DTYPES: tl.constexpr, DEGREES: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, PARAMETER: tl.constexpr, STATES: tl.constexpr,
    ROWS: tl.constexpr, DRAWS: tl.constexpr, AVERAGE: tl.constexpr, ADDS: tl.constexpr = False,
):  # fmt: skip
    """Load one chunk of every operand, apply the rule, and store parameter and states.

    With ``sums``, as of ``telemetry.sums_at``, those of squares, too; added, if ``ADDS``.
    """
    n_inputs: tl.constexpr = len(DEGREES)
    offsets, mask = place[0], place[1]
    inputs = ()
    gradient = None
    for i in tl.static_range(n_inputs):
        pointer = operand(column, width, early, 1 + i, DTYPES, ALIGNED, place[6]) + offsets
        x = decode(pointer, mask, COMPUTE)
        if i == 0:
            gradient = x
        if DEGREES[i] > 0:
            x = x * scale
        if DEGREES[i] == 2:
            x = x * scale
        inputs = inputs + (x,)
    apply_rule(
        column, width, early, place, step, inputs, gradient, sums, scalars,
        RULE, OPTIONS, DTYPES, n_inputs, COMPUTE, ALIGNED, PARAMETER, STATES, ROWS, DRAWS,
        AVERAGE, ADDS,
    )  # fmt: skip


@jit
def apply_rule(
    column, width, early, place, step, inputs, gradient, sums, scalars,
    RULE: tl.constexpr, OPTIONS: tl.constexpr, DTYPES: tl.constexpr, N_INPUTS: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, PARAMETER: tl.constexpr, STATES: tl.constexpr,
    ROWS: tl.constexpr, DRAWS: tl.constexpr, AVERAGE: tl.constexpr, ADDS: tl.constexpr = False,
):  # fmt: skip
    """Update one chunk of parameter and states, whose addresses follow those of the inputs.

    ``gradient`` is as it was read, for ``sums``, as of ``_update_chunk``.
    """
    offsets, mask, lower, upper, groups, some, begin = place
    own = operand(column, width, early, 0, DTYPES, ALIGNED, begin) + offsets
    if PARAMETER == "cast" or PARAMETER == "stochastic":
        companion = own
    else:
        companion = address(column, width, 1 + N_INPUTS, DTYPES, ALIGNED, begin) + offsets
    p = parameter.load(own, companion, mask, PARAMETER, COMPUTE)
    before = p
    # Addresses of states are kept from load to store: a store might alias the table, so that
    # reading an address again would wait for it.
    pointers = ()
    states = ()
    for i in tl.static_range(len(STATES)):
        pointer = operand(column, width, early, ROWS[i], DTYPES, ALIGNED, begin) + offsets
        pointers = pointers + (pointer,)
        if STATES[i] == "cast" or STATES[i] == "positive cast" or STATES[i] == "stochastic":
            states = states + (decode(pointer, mask, COMPUTE),)
        else:
            scale = address(column, width, ROWS[i] + 1, DTYPES, False) + groups
            x = codes.load(pointer, scale, mask, some, STATES[i])
            states = states + (x.to(COMPUTE),)
    if AVERAGE:
        count: tl.constexpr = len(STATES) - 1
        last: tl.constexpr = len(scalars) - 1
        moved = states[count:]
        p, states = RULE(p, inputs, states[:count], scalars[:last], OPTIONS)
        states = states + (follow(moved[0], p, scalars[last]),)
    else:
        p, states = RULE(p, inputs, states, scalars, OPTIONS)
    bits = None
    thresholds = None
    if DRAWS:
        bits, thresholds = draw(column, width, lower, upper, step, 2 + len(DTYPES))
    if sums is not None:
        # Behind the last of what is read of the table, which a store might alias.
        put_sums(sums, gradient, before, p, mask, ADDS)
    parameter.store(own, companion, p, mask, bits, PARAMETER)
    for i in tl.static_range(len(STATES)):
        if STATES[i] == "cast":
            encode(pointers[i], states[i], mask)
        elif STATES[i] == "positive cast":
            encode_positive(pointers[i], states[i], mask)
        elif STATES[i] == "stochastic":
            # By the other half of the bits: what rounds the parameter up is not to do so here.
            tl.store(pointers[i], stochastic(states[i], turned(bits), DTYPES[ROWS[i]]), mask)
        else:
            # Here addresses are read again: they come while codes are formed, and to keep them
            # would take four registers a state.
            pointer = address(column, width, ROWS[i], DTYPES, ALIGNED, begin) + offsets
            scale = address(column, width, ROWS[i] + 1, DTYPES, False) + groups
            codes.store(
                pointer, scale, states[i].to(tl.float32), mask, some,
                thresholds, STATES[i],
            )  # fmt: skip


@jit
def addresses(column, width, COUNT: tl.constexpr):
    """Read the addresses of all operands."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (_address(column, width, i),)
    return found


@jit
def operand(
    column, width, early, OPERAND: tl.constexpr, DTYPES: tl.constexpr, ALIGNED: tl.constexpr,
    begin=None,
):  # fmt: skip
    """Return an operand's address as ``address`` does, of those read early if there are such."""
    if early is None:
        return address(column, width, OPERAND, DTYPES, ALIGNED, begin)
    else:
        return _typed(early[OPERAND], DTYPES[OPERAND], ALIGNED, begin)


@jit
def address(
    column, width,
    OPERAND: tl.constexpr, DTYPES: tl.constexpr, ALIGNED: tl.constexpr, begin=None,
):  # fmt: skip
    """Read an operand's address and give it its type and, where it holds, its alignment.

    With ``begin`` it is that of this element, a multiple of 16.
    """
    return _typed(_address(column, width, OPERAND), DTYPES[OPERAND], ALIGNED, begin)


@jit
def _address(column, width, OPERAND: tl.constexpr):
    # 2 is HEADER_ROWS, in int64 because a table can have many columns.
    return tl.load(column + (2 + OPERAND) * width.to(tl.int64))


@jit
def _typed(value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, begin):
    pointer = value.to(tl.pointer_type(DTYPE))
    if begin is not None:
        pointer += begin
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def measured_row(n_operands: int, format: Format, rowwise: bool) -> int:
    """Return which row of the table says where sums of squares go: the one behind all others."""
    drawn = (ROWWISE_ROWS if rowwise else DRAW_ROWS) if format.draws else 0
    return HEADER_ROWS + n_operands + drawn


def update_constants(
    rule,
    options: tuple[bool, ...],
    types: tuple,
    aligned: bool,
    block: int,
    format: Format = PLAIN,
    rowwise: bool = False,
    stride: int | None = None,
    n_inputs: int | None = None,
    backend: str = "cuda",
    measured: bool = False,
) -> dict[str, object]:
    """State what ``update_tensors`` is compiled for: whoever launches or compiles it asks here.

    Args:
        rule: the ``Rule``.
        options: its compile-time options.
        types: Triton's types of parameter, inputs, and what else is kept.
        aligned: whether every address is a multiple of 16 bytes.
        block: elements that a program owns.
        format: how parameter and states are kept.
        rowwise: whether tensors are walked row by row.
        stride: columns of the coefficients; those that the rule has, by default, and those of the
            format.
        n_inputs: how many inputs there are, if not as many as the rule has.
        backend: Triton's, ``cuda`` or ``hip``. That addresses are read early spares a wait, for
            registers that other formats and float64 have not, and AMD's compiler takes more of.
        measured: whether sums of squares are formed for telemetry.
    """
    n_inputs = len(rule.degrees) if n_inputs is None else n_inputs
    compute = compute_type(types)
    states = format.states or ("cast",) * (len(types) - 1 - n_inputs - format.has_companion)
    return {
        "RULE": rule.update,
        "OPTIONS": options,
        "DTYPES": types,
        "DEGREES": rule.degrees,
        "N_COEFFICIENTS": rule.n_coefficients + format.average,
        "COMPUTE": compute,
        "ALIGNED": aligned,
        "BLOCK": block,
        "STRIDE": rule.n_coefficients + format.columns if stride is None else stride,
        "PARAMETER": format.parameter,
        "STATES": states,
        "ROWS": format.rows(n_inputs, len(states)),
        "DRAWS": format.draws,
        "AVERAGE": format.average,
        "ROWWISE": rowwise,
        "PIECES": not format.is_cast or len({t.primitive_bitwidth for t in types}) > 1,
        "MEASURED": measured_row(len(types), format, rowwise) if measured else 0,
        "EARLY": format.is_cast and backend != "hip" and compute == tl.float32,
    }
