"""Per-sample sums and squares of an embedding table.

Sample i's row of the table's entry v is r_i[v] = the sum of e over the positions of sample i whose
id is v; wanted are sum_i r_i[v] and sum_i r_i[v]**2. A token that a sample repeats is summed before
the square.

Positions come sorted by (id, sample), so that a sample's row is a run of equal keys, and an entry a
run of equal ids. Sorted positions are divided into chunks. A program sums one chunk and *owns the
runs of equal keys that begin there*: it leaves out the rest of a run that began before, and goes on
beyond the chunk's end to finish its last one. So no row is ever divided between programs, and what
chunks contribute to an entry can be added up. An entry within one chunk is written at once. Those
that reach from chunk to chunk are left as partial sums, at most two a chunk (the "head", its first
entry, and the "tail", its last), which ``join`` adds up in order. A frequent token's thousands of
positions are thus spread over programs; every sum has a fixed order, and there are no atomics.
"""

from __future__ import annotations

from ..codecs import decode, encode
from ..lang import jit, tl

# Sorted positions of a program, and how many of them it asks for at once.
CHUNK = 32
AT_ONCE = 8
# Columns of a program: 8 elements a thread, one 16-byte access in 16-bit types.
BLOCK = 512
THREADS = 64
# Chunks whose partial sums ``join`` asks for at once.
JOIN_ROWS = 16
JOIN_BLOCK = 128

# Bits of a key that hold the sample; the id is above them.
SAMPLE_BITS = 32
_SHIFT = SAMPLE_BITS if tl is None else tl.constexpr(SAMPLE_BITS)
_SAMPLE = 0 if tl is None else tl.constexpr((1 << SAMPLE_BITS) - 1)


@jit(do_not_specialize=["tokens", "length"])
def sum_chunks(
    keys,  # int64 [tokens], ascending: id << SAMPLE_BITS | sample
    order,  # int64 [tokens]: where each key's position is among [count * length] or [tokens]
    e,  # [count, length, width] or [tokens, width]: gradient of the layer's output
    e_sample, e_row, e_column,  # its strides in elements; that of samples is unused if SEGMENTED
    gradient,  # [vocabulary, width] of zeros, entries of this chunk written; or None
    squares,  # float32 [vocabulary, width], contiguous: likewise, or added to
    partials,  # float32 [chunks, head and tail, sum and squares, width], written where needed
    tokens,
    length,
    vocabulary,  # ids that are not below it contribute nothing
    width,
    ADD: tl.constexpr,  # whether squares are added to what is there
    SEGMENTED: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the runs of equal keys that begin in one chunk."""
    blocks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    wanted = columns < width
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, tokens)
    before = _key(keys, start - 1, tokens)
    final = tl.load(keys + end - 1)
    # The entries that reach into this chunk, and out of it.
    head = tl.load(keys + start) >> _SHIFT
    head = tl.where(before >> _SHIFT == head, head, -1)
    tail = final >> _SHIFT
    tail = tl.where(_key(keys, end, tokens) >> _SHIFT == tail, tail, -1)
    partial = partials + chunk.to(tl.int64) * (4 * width) + columns
    zero = tl.zeros((BLOCK,), tl.float32)
    # The head's sums are zeros where no run of it begins here, else the loop stores them. Never
    # both: two stores to one address may be done by different threads, in any order.
    positions = start + tl.arange(0, CHUNK)
    here = tl.load(keys + positions, positions < end, -1)
    begins = tl.sum(((here >> _SHIFT == head) & (here != before)).to(tl.int32), 0)
    if (head >= 0) & (begins == 0):
        tl.store(partial, zero, wanted)
        tl.store(partial + width, zero, wanted)
    row = zero
    total = zero
    total_squares = zero
    position = start
    key = tl.load(keys + start)
    # A while loop: the interpreter of Triton 3.6 fails on range() with a run-time bound.
    while (position < end) | (key == final):
        # All loads before the first use, so that they are on their way together.
        run = (key,)
        for i in tl.static_range(1, AT_ONCE + 1):
            run = run + (_key(keys, position + i, tokens),)
        owned = ()
        errors = ()
        for i in tl.static_range(AT_ONCE):
            own = (run[i] != before) & ((position + i < end) | (run[i] == final))
            own = own & (run[i] >= 0) & (run[i] >> _SHIFT < vocabulary)
            owned = owned + (own,)
            token = tl.load(order + position + i, own, 0)
            if SEGMENTED:
                start_of_row = token * e_row
            else:
                sample = run[i] & _SAMPLE
                start_of_row = sample * e_sample + (token - sample * length) * e_row
            at = e + start_of_row + columns.to(tl.int64) * e_column
            # Not wanted & own: Triton 3.9's interpreter cannot broadcast a truth value.
            errors = errors + (decode(at, columns < tl.where(own, width, 0), tl.float32),)
        for i in tl.static_range(AT_ONCE):
            entry = run[i] >> _SHIFT
            if owned[i]:
                row += errors[i]
            if owned[i] & (run[i + 1] != run[i]):
                total += row
                total_squares += row * row
                row = zero
                # The last run of this entry that is owned.
                if (run[i + 1] >> _SHIFT != entry) | (position + i + 1 >= end):
                    if (entry == head) | (entry == tail):
                        end_sum = partial + tl.where(entry == head, 0, 2 * width)
                        tl.store(end_sum, total, wanted)
                        tl.store(end_sum + width, total_squares, wanted)
                    else:
                        offsets = entry * width + columns
                        _write(gradient, squares, offsets, total, total_squares, wanted, ADD)
                    total = zero
                    total_squares = zero
        position += AT_ONCE
        key = run[AT_ONCE]


@jit(do_not_specialize=["tokens", "chunks"])
def join(
    keys,  # int64 [tokens], as above
    partials,  # float32 [chunks, head and tail, sum and squares, width]
    gradient,  # [vocabulary, width], entries of several chunks written; or None
    squares,  # float32 [vocabulary, width]
    tokens,
    chunks,
    vocabulary,
    width,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums of the entry that begins in one chunk and reaches beyond it."""
    blocks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    wanted = columns < width
    end = (chunk + 1) * CHUNK
    entry = _key(keys, end - 1, tokens) >> _SHIFT
    begins = _key(keys, end - CHUNK - 1, tokens) >> _SHIFT != entry
    reaches = _key(keys, end, tokens) >> _SHIFT == entry
    if begins & reaches & (entry >= 0) & (entry < vocabulary):
        tail = partials + (chunk.to(tl.int64) * 4 + 2) * width + columns
        total = tl.load(tail, wanted, 0.0)
        total_squares = tl.load(tail + width, wanted, 0.0)
        other = chunk + 1
        while _key(keys, other * CHUNK, tokens) >> _SHIFT == entry:
            others = other + tl.arange(0, ROWS)
            heads = tl.load(keys + others * CHUNK, others < chunks, -1) >> _SHIFT
            mask = (heads == entry)[:, None] & wanted[None, :]
            at = partials + (others.to(tl.int64) * (4 * width))[:, None] + columns[None, :]
            total += tl.sum(tl.load(at, mask, 0.0), 0)
            total_squares += tl.sum(tl.load(at + width, mask, 0.0), 0)
            other += ROWS
        _write(gradient, squares, entry * width + columns, total, total_squares, wanted, ADD)


@jit
def _key(keys, position, tokens):
    """The key at a sorted position; -1, whose entry is -1, before the first and after the last."""
    return tl.load(keys + position, (position >= 0) & (position < tokens), -1)


@jit
def _write(gradient, squares, offsets, total, total_squares, wanted, ADD: tl.constexpr):
    if gradient is not None:
        encode(gradient + offsets, total, wanted)
    if ADD:
        total_squares += tl.load(squares + offsets, wanted, 0.0)
    tl.store(squares + offsets, total_squares, wanted)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def sum_chunks_constants(add: bool, segmented: bool, block: int = BLOCK) -> dict[str, object]:
    """State what ``sum_chunks`` is compiled for: whoever launches or compiles it asks here.

    Args:
        add: whether squares are added to what is there.
        segmented: whether samples are given by offsets.
        block: columns of a program; fewer for a narrow table.
    """
    return {
        "ADD": add,
        "SEGMENTED": segmented,
        "CHUNK": CHUNK,
        "AT_ONCE": AT_ONCE,
        "BLOCK": block,
    }


def join_constants(add: bool, block: int = JOIN_BLOCK) -> dict[str, object]:
    """Do the same for ``join``."""
    return {"ADD": add, "CHUNK": CHUNK, "ROWS": JOIN_ROWS, "BLOCK": block}
