"""Global norm of the gradients: one read of them, two stages, no atomics.

Stage 1 reduces each chunk to one partial value, stage 2 reduces the partial values in a fixed
order and forms what the update needs: the factor on the gradient. Both stages run in the same
order every time, so equal gradients give equal bits.

Norm and factor are those of ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al., arXiv 1211.5063,
algorithm 1): factor = min(1, max_norm / (norm + 1e-6)).
"""

from __future__ import annotations

from .lang import jit, tl

# A program's pieces, one after the other; all of a piece is on its way at once. Larger than the
# update's chunk: there is one stream to read, so a program must ask for more of it at once to keep
# the memory busy.
NORM_PIECE = 4096
NORM_THREADS = 128
# Elements of a program, a multiple of the piece: the larger, the fewer partial values are left for
# stage 2, whose one program has them from one processor's share of the memory's bandwidth.
NORM_BLOCK = 16384
# Of stage 2, in one turn. 10^9 parameters take it at most 32 turns: see ``reduce_turns``.
REDUCE_BLOCK = 4096
REDUCE_THREADS = 512


@jit(do_not_specialize=["width"])
def partial_norms(
    table,  # int64 [.., width]: the table of addresses of the update kernel
    width,  # int32
    chunk_tensor,  # int32 [programs]
    chunk_index,  # int32 [programs], in units of BLOCK elements
    inverse_scale,  # float64 [1]: what gradients are multiplied by before anything else
    partials,  # float64 [programs], written
    DTYPE: tl.constexpr,  # element type of the gradients
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INFINITY_NORM: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,  # a multiple of PIECE
):
    """Reduce each chunk of the gradients to its sum of squares, or to its largest magnitude."""
    program = tl.program_id(0)
    column = table + tl.load(chunk_tensor + program)
    numel = tl.load(column)
    # Row 3 holds the gradient's address.
    gradient = tl.load(column + 3 * width.to(tl.int64)).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    start = tl.load(chunk_index + program).to(tl.int64) * BLOCK
    scale = tl.load(inverse_scale).to(COMPUTE)
    total = tl.zeros((PIECE,), COMPUTE)
    if start + BLOCK <= numel:
        for piece in tl.static_range(BLOCK // PIECE):
            offsets = start + piece * PIECE + tl.arange(0, PIECE)
            total = _add(total, tl.load(gradient + offsets).to(COMPUTE) * scale, INFINITY_NORM)
    else:
        # As many as there are: of small tensors, most would be of nothing.
        while start < numel:
            offsets = start + tl.arange(0, PIECE)
            g = tl.load(gradient + offsets, offsets < numel, 0.0).to(COMPUTE)
            total = _add(total, g * scale, INFINITY_NORM)
            start += PIECE
    tl.store(partials + program, _reduce(total, INFINITY_NORM).to(tl.float64))


@jit
def _add(total, x, INFINITY_NORM: tl.constexpr):
    """Take elements in: their squares, or magnitudes of which the largest stays, and nan."""
    if INFINITY_NORM:
        magnitude = tl.abs(x)
        return tl.where((magnitude > total) | (magnitude != magnitude), magnitude, total)
    else:
        return total + x * x


@jit
def _reduce(total, INFINITY_NORM: tl.constexpr):
    """Sum, or largest of magnitudes with nan winning."""
    if INFINITY_NORM:
        # tl.max may drop a nan: a sum cannot, and is finite exactly where every term is.
        poison = tl.sum(tl.where(total == total, 0.0, total), 0)
        return tl.max(tl.where(total == total, total, 0.0), 0) + poison
    else:
        return tl.sum(total, 0)


@jit(do_not_specialize=["count"])
def clip_factor(
    partials,  # float64 [count]
    count,  # int32
    inverse_scale,  # float64 [1]
    max_norm,  # float64 [1]
    control,  # float64 [2]: element 0 is written with the factor on the raw gradient
    norm,  # float32 [1], written
    INFINITY_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce the partial values in one program and form the factor on the gradient."""
    value = total_norm(partials, count, INFINITY_NORM, BLOCK)
    store_factor(value, inverse_scale, max_norm, control, norm)


@jit
def total_norm(partials, count, INFINITY_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Reduce the partial values to the norm, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    # A while loop: the interpreter of Triton 3.6 fails on range() with a run-time bound.
    while start < count:
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(partials + offsets, offsets < count, 0.0)
        if INFINITY_NORM:
            total = _add(total, x, True)
        else:
            total = total + x
        start += BLOCK
    value = _reduce(total, INFINITY_NORM)
    if not INFINITY_NORM:
        value = tl.sqrt(value)
    return value


@jit
def store_factor(value, inverse_scale, max_norm, control, norm):
    """Write the norm, and the factor on the raw gradient that comes of it."""
    factor = tl.load(max_norm) / (value + 1e-6)
    # Not minimum(): a nan norm must give a nan factor, as torch's clamp does.
    factor = tl.where(factor > 1.0, 1.0, factor)
    tl.store(control, factor * tl.load(inverse_scale))
    tl.store(norm, value.to(tl.float32))


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def partial_count(numel: int) -> int:
    """Return how many partial values a tensor has."""
    return -(-numel // NORM_BLOCK)


def reduce_turns(partials: int) -> int:
    """Return how many turns stage 2 takes, one after the other."""
    return -(-partials // REDUCE_BLOCK)


def partial_norms_constants(
    dtype, compute, aligned: bool, infinity_norm: bool
) -> dict[str, object]:
    """State what ``partial_norms`` is compiled for: whoever launches or compiles it asks here."""
    return {
        "DTYPE": dtype,
        "COMPUTE": compute,
        "ALIGNED": aligned,
        "INFINITY_NORM": infinity_norm,
        "PIECE": NORM_PIECE,
        "BLOCK": NORM_BLOCK,
    }


def clip_factor_constants(infinity_norm: bool) -> dict[str, object]:
    """Do the same for ``clip_factor``."""
    return {"INFINITY_NORM": infinity_norm, "BLOCK": REDUCE_BLOCK}
