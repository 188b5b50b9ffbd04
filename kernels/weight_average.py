"""The average of the weights that an update carries along, in float32 or less.

    a = p                        up to step start + 1
    a = a + (1 - decay)(p - a)   from then on

after each update, of the parameter p before it is rounded to its type (the master, where there is
one). A decay of 0.9999 has a horizon of 10,000 steps. These are the values of torch's
``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``, updated after each step behind ``start``.

Polyak and Juditsky, SIAM J. Control Optim. 30, 1992 (averages of iterates); the exponential form of
Tarvainen and Valpola, arXiv 1703.01780.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lang import jit, tl
from .rule import Group, Scalar

# Key of the state.
NAME = "ema"
# Entries of the parameter groups: the number that may live on the device, and all of them. A group
# without a decay has no average.
DECAY = "average_decay"
DTYPE = "average_dtype"
START = "average_start"
OPTIONS = (DECAY, DTYPE, START)


def weight(group: Group, step: Scalar) -> Scalar:
    """Return the weight of the new parameter: only arithmetic, as of ``Rule.coefficients``.

    Args:
        group: hyper-parameters, with a decay.
        step: number of the step, from 1.
    """
    return 1.0 - group[DECAY] * (step > group[START] + 1)


@jit
def follow(average, p, new_weight):
    """Move the average of a block towards the parameter."""
    # Not a product with 1, which leaves of a nan or an infinity a nan.
    return tl.where(new_weight < 1.0, average + new_weight * (p - average), p)


def follow_twin(average: Tensor, p: Tensor, new_weight: Any) -> Tensor:
    """State it in PyTorch; ``average`` is overwritten."""
    if isinstance(new_weight, Tensor):
        moved = average + new_weight.to(average.dtype) * (p - average)
        return torch.where(new_weight < 1, moved, p)
    return average.add_(p - average, alpha=new_weight) if new_weight < 1 else average.copy_(p)
