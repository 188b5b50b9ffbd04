"""Whether gradients were multiplied by one factor since they arrived, as by ``clip_grad_norm_``.

Of each gradient the sums of absolute values and of squares are kept, both made once at the end of a
backward pass, for all gradients together. One factor multiplies both norms by itself. A change that
leaves both as they are is not seen: signs, which squares do not see either, an order of elements,
and, in a narrow type, what is small beside its rounding. Nothing is read on the host until a
gradient has been written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How far apart ratios of norms may be. Wide types: sums in another order, a few hundred roundings
# of float32. Narrow ones: every element of a gradient was rounded anew, by half an eps at most.
TOLERANCE = 2.0**-16


@torch.no_grad()
def norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return for each gradient its norms of order 1 and 2, ``[2]``.

    Costs two reads of the gradients, in a few launches for all of them.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, gradient in enumerate(gradients):
        kinds.setdefault((gradient.device, gradient.dtype), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(gradients)
    for (device, dtype), places in kinds.items():
        own = [gradients[i].detach() for i in places]
        # On a CPU torch's sums of many float32 are off by more than the tolerance.
        wide = torch.float64 if device.type == "cpu" or dtype == torch.float64 else torch.float32
        orders = [torch.stack(torch._foreach_norm(own, order, dtype=wide)) for order in (1, 2)]
        for i, pair in zip(places, torch.stack(orders, 1).unbind(), strict=True):
            found[i] = pair
    return found


def common_factor(
    before: Sequence[Tensor], after: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> float | None:
    """Return the factor that all gradients were multiplied by, or None where it is not one.

    Args:
        before: norms of each gradient as it arrived.
        after: its norms now.
        dtypes: of the gradients.

    Returns:
        A positive number; exactly 1 where no norm has changed. Waits for the device.
    """
    old, new = _on_host(before), _on_host(after)
    squares = [sum(pair[1] ** 2 for pair in pairs) for pairs in (old, new)]
    if not (all(map(math.isfinite, squares)) and squares[1] > 0.0):
        # All zero, before as after, is any factor at all; zero after is no multiple.
        return 1.0 if squares == [0.0, 0.0] else None
    if squares[0] == 0.0:
        return None
    factor = 1.0 if old == new else math.sqrt(squares[1] / squares[0])
    for pair, changed, dtype in zip(old, new, dtypes, strict=True):
        narrow = dtype in (torch.float16, torch.bfloat16)
        tolerance = torch.finfo(dtype).eps if narrow else TOLERANCE
        for x, y in zip(pair, changed, strict=True):
            if not abs(y - factor * x) <= tolerance * factor * x:
                return None
    return factor


def _on_host(pairs: Sequence[Tensor]) -> list[list[float]]:
    if len({pair.device for pair in pairs}) == 1:
        return torch.stack([pair.double() for pair in pairs]).tolist()  # type: ignore[no-any-return]
    return [pair.tolist() for pair in pairs]
