"""The sums over samples of squared contributions, operation by operation.

Every operation is stated twice with one signature, in PyTorch (``reference``) and in Triton
(``triton_*``). It takes a layer's input and the gradient of its output and returns the gradient of
the parameter, in type ``dtype``, and the squares: the sum over samples of the square of each
sample's contribution to that gradient. No tensor of batch x parameter elements is formed.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import reference

NARROW = (torch.float16, torch.bfloat16, torch.float32)


def choose(backend: str, dtypes: set[torch.dtype]) -> ModuleType:
    """Return the module of operations for a backend that ``fusedopt.backends.choose`` named.

    The kernels accumulate in float32, so float64 takes the reference on every device.
    """
    if backend == "triton" and dtypes <= set(NARROW):
        from . import triton_all

        return triton_all
    return reference
