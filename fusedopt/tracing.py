"""What ``torch.compile`` is to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Have the graph of a compiled step break around a function, with all that it calls.

    For what reads addresses, writes attributes of tensors or asks autograd what it did: traced, it
    would fail, or be done to stand-ins. Hooks need it as well: a compiled step that calls backward
    has them compiled one by one.
    """
    return cast(F, torch._disable_dynamo(function))
