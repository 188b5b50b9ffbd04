"""The guard against spikes: whether a step is taken, decided where clip's factor is formed.

The norm z-score of a step is that of its gradients' norm among the norms of the last steps taken:
(norm - mean) / standard deviation, the latter of n - 1, as in the skipped steps of OLMo 2
(arXiv 2501.00656). The program that forms the factor knows the norm, and decides; what it goes by
is one small tensor, the record:

    [norms taken in, steps skipped, latest z-score, bound, ring of the last norms ...]
"""

from __future__ import annotations

from .lang import jit, tl
from .norms import REDUCE_BLOCK, store_factor, total_norm

ACCEPTED, SKIPPED, ZSCORE, BOUND, HEADER = range(5)


@jit(do_not_specialize=["count", "window", "min_steps", "scaled"])
def guarded_factor(
    partials,  # float64 [count]
    count,  # int32
    inverse_scale,  # float64 [1]
    max_norm,  # float64 [1]
    control,  # float64 [2]: written with the factor on the raw gradient, and whether to skip
    norm,  # float32 [1], written
    record,  # float64 [HEADER + window]: see above
    window,  # int32
    min_steps,  # int32: norms below which nothing is decided
    scaled,  # int32: whether control[1] already says that a loss scaler found an overflow
    INFINITY_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do what ``clip_factor`` does, and decide whether the step is taken."""
    # Of what is written below, all is read above the sums: their barriers lie between, and no warp
    # sees what another has written.
    accepted = tl.load(record)
    skipped = tl.load(record + 1)
    bound = tl.load(record + 3)
    overflow = (scaled != 0) & (tl.load(control + 1) != 0.0)
    value = total_norm(partials, count, INFINITY_NORM, BLOCK)

    held = tl.minimum(accepted, window.to(tl.float64)).to(tl.int32)
    mean, deviation = _spread(record + 4, held, BLOCK)
    # Equal norms have no deviation to measure by.
    decides = (held >= min_steps) & (deviation > 0.0)
    z = (value - mean) / tl.where(decides, deviation, 1.0)
    z = tl.where(decides, z, float("nan"))
    # No nan is above the bound, and none is below infinity.
    taken = tl.where(z > bound, 0.0, tl.where(value < float("inf"), 1.0, 0.0))
    # An overflow is the scaler's to count. A norm of 0 says nothing about norms.
    noted = tl.where(overflow | (value == 0.0), 0.0, 1.0)
    store_factor(value, inverse_scale, max_norm, control, norm)
    tl.store(control + 1, tl.where(overflow, 1.0, 1.0 - taken))
    tl.store(record, accepted + noted * taken)
    tl.store(record + 1, skipped + noted * (1.0 - taken))
    tl.store(record + 2, z, noted != 0.0)
    place = accepted.to(tl.int64) % window
    tl.store(record + 4 + place, value, noted * taken != 0.0)


@jit
def _spread(ring, held, BLOCK: tl.constexpr):
    """Mean and standard deviation of the norms in the ring, in a fixed order."""
    # From one of them on, so that equal norms have a deviation of exactly zero.
    first = tl.load(ring)
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < held:
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(ring + offsets, offsets < held, first) - first
        start += BLOCK
    shift = tl.sum(total, 0) / tl.maximum(held, 1).to(tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < held:
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(ring + offsets, offsets < held, first) - first - shift
        squares += tl.where(offsets < held, x * x, 0.0)
        start += BLOCK
    variance = tl.sum(squares, 0) / tl.maximum(held - 1, 1).to(tl.float64)
    return first + shift, tl.sqrt(variance)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def guarded_factor_constants(infinity_norm: bool) -> dict[str, object]:
    """State what ``guarded_factor`` is compiled for: whoever launches or compiles it asks here."""
    return {"INFINITY_NORM": infinity_norm, "BLOCK": REDUCE_BLOCK}
