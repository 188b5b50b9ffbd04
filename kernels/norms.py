"""Global norm of the gradients: one read of them, two stages, no atomics.

Stage 1 reduces each chunk to one partial value, stage 2 reduces the partial values in a fixed
order and forms what the update needs: the factor on the gradient. Both stages run in the same
order every time, so equal gradients give equal bits.

Norm and factor are those of ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al., arXiv 1211.5063,
algorithm 1): factor = min(1, max_norm / (norm + 1e-6)).
"""

from __future__ import annotations

from .lang import jit, tl

# Larger chunks than the update's: there is one stream to read, so a program must ask for more
# of it at once to keep the memory busy, and fewer partial values are left for stage 2.
NORM_BLOCK = 4096
NORM_THREADS = 128
REDUCE_BLOCK = 2048
REDUCE_THREADS = 256


@jit(do_not_specialize=["width"])
def partial_norms(
    table,  # int64 [.., width]: the table of addresses of the update kernel
    width,  # int32
    chunk_tensor,  # int32 [programs]
    chunk_index,  # int32 [programs], in units of NORM_BLOCK elements
    inverse_scale,  # float64 [1]: what gradients are multiplied by before anything else
    partials,  # float64 [programs], written
    DTYPE: tl.constexpr,  # element type of the gradients
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INFINITY_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
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
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        g = tl.load(gradient + offsets).to(COMPUTE)
    else:
        g = tl.load(gradient + offsets, offsets < numel, 0.0).to(COMPUTE)
    g = g * tl.load(inverse_scale).to(COMPUTE)
    tl.store(partials + program, _reduce(g, INFINITY_NORM).to(tl.float64))


@jit
def _reduce(x, INFINITY_NORM: tl.constexpr):
    """Sum of squares, or largest magnitude with nan winning."""
    if INFINITY_NORM:
        # tl.max may drop a nan: a sum cannot, and is finite exactly where every term is.
        magnitude = tl.abs(x)
        poison = tl.sum(tl.where(magnitude == magnitude, 0.0, magnitude), 0)
        return tl.max(tl.where(magnitude == magnitude, magnitude, 0.0), 0) + poison
    else:
        return tl.sum(x * x, 0)


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
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    # A while loop: the interpreter of Triton 3.6 fails on range() with a run-time bound.
    while start < count:
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(partials + offsets, offsets < count, 0.0)
        if INFINITY_NORM:
            total = tl.where((x > total) | (x != x), x, total)
        else:
            total = total + x
        start += BLOCK
    if INFINITY_NORM:
        value = _reduce(total, True)
    else:
        value = tl.sqrt(tl.sum(total, 0))
    factor = tl.load(max_norm) / (value + 1e-6)
    # Not minimum(): a nan norm must give a nan factor, as torch's clamp does.
    factor = tl.where(factor > 1.0, 1.0, factor)
    tl.store(control, factor * tl.load(inverse_scale))
    tl.store(norm, value.to(tl.float32))


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def partial_norms_constants(
    dtype, compute, aligned: bool, infinity_norm: bool
) -> dict[str, object]:
    """State what ``partial_norms`` is compiled for: whoever launches or compiles it asks here."""
    return {
        "DTYPE": dtype,
        "COMPUTE": compute,
        "ALIGNED": aligned,
        "INFINITY_NORM": infinity_norm,
        "BLOCK": NORM_BLOCK,
    }


def clip_factor_constants(infinity_norm: bool) -> dict[str, object]:
    """Do the same for ``clip_factor``."""
    return {"INFINITY_NORM": infinity_norm, "BLOCK": REDUCE_BLOCK}
