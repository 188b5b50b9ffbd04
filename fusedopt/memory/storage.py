"""Which tensors have memory of their own that an address can reach, and why others have none.

A tensor may stand for others (a wrapper made by ``_make_wrapper_subclass``), for a computation (a
transform, a functional graph) or for nothing (a fake tensor, a freed storage). Its address is 0, or
that of something else, and a kernel that is given it ends the process. So every address that goes
into a table is taken by ``addresses``, and every tensor is asked ``refusal`` before a plan is made.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dtensor import dtensor_class

# Types whose address is that of their values, unless what torch dispatches on says otherwise.
PLAIN = {Tensor, torch.nn.Parameter}


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return where tensors lie in memory.

    Raises:
        RuntimeError: for a tensor with elements and no memory.
    """
    found = list(map(Tensor.data_ptr, tensors))
    # Empty tensors have no memory, either.
    if 0 in found and any(a == 0 and t.numel() for a, t in zip(found, tensors, strict=True)):
        raise RuntimeError("a tensor has no memory that a kernel could be given the address of")
    return found


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """Replace tensors that stand for others by what lies in this process' memory.

    DTensors are replaced by their shards, results of collectives by what has arrived, and wrappers
    by the tensor that holds their values; what has no such tensor stays, to be refused.
    """
    local = _without_wrappers(tensors)
    return list(map(_unwrapped, tensors)) if local is None else local


def unwrapped(inputs: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Any]]:
    """Replace tensors as ``local_tensors`` does, and return what of wrappers decides how.

    Of DTensors of plain tensors that is nothing: how they are placed is asked for by itself. Where
    nothing is replaced, ``inputs`` itself is returned.
    """
    local = list(map(_without_wrappers, inputs))
    if all(map(operator.is_, local, inputs)):
        return inputs, []
    found = [own for own in local if own is not None]
    if len(found) == len(inputs):
        return found, []
    wrappings = [None if type(t) in PLAIN else _wrapping(t) for ts in inputs for t in ts]
    return list(map(local_tensors, inputs)), wrappings


def chained(columns: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """List the tensors of all columns one after the other."""
    return columns[0] if len(columns) == 1 else list(chain.from_iterable(columns))


def _without_wrappers(tensors: list[Tensor]) -> list[Tensor] | None:
    """Do so for plain tensors, which stay, and DTensors of such; None where there are others."""
    kinds = set(map(type, tensors))
    if kinds <= PLAIN:
        return tensors
    dtensor = dtensor_class()
    if not kinds <= {*PLAIN, dtensor}:
        return None
    # As ``dtensor.local_of``, without a call each.
    local = [t._local_tensor if type(t) is dtensor else t for t in tensors]  # type: ignore[attr-defined]
    return local if set(map(type, local)) <= PLAIN else None


def _unwrapped(t: Tensor) -> Tensor:
    return t if type(t) in PLAIN else _local(t)


def _local(t: Tensor) -> Tensor:
    local: Tensor = t.to_local() if hasattr(t, "to_local") else t
    # What a collective is still working on has no memory to point at.
    local = local.wait() if hasattr(local, "wait") else local
    holder = _holder(local)
    return local if holder is None else local_tensors([holder])[0]


def _wrapping(t: Tensor) -> Any:
    local = t.to_local() if hasattr(t, "to_local") else t
    context = repr(local.__tensor_flatten__()) if _wraps(local) else None  # type: ignore
    return getattr(t, "placements", None), type(t), type(local), context


def _wraps(t: Tensor) -> bool:
    return type(t) not in PLAIN and is_traceable_wrapper_subclass(t) and not t.is_nested


def _holder(t: Tensor) -> Tensor | None:
    """Return the one inner tensor that is like the wrapper; None where there is no such."""
    if not _wraps(t):
        return None
    names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
    alike = [x for x in (getattr(t, name) for name in names) if _alike(t, x)]
    return alike[0] if len(alike) == 1 else None


def _alike(t: Tensor, inner: Tensor) -> bool:
    # Not a scale that is kept beside the values.
    traits = (t.shape, t.stride(), t.dtype, t.device)
    return (inner.shape, inner.stride(), inner.dtype, inner.device) == traits


def refusal(t: Tensor) -> str | None:
    """Say why a tensor's values cannot be read and written at an address; None where they can.

    Args:
        t: dense, as it was found: a DTensor, for example, and not its shard.
    """
    if type(t) not in PLAIN:
        local = t.to_local() if hasattr(t, "to_local") else t
        local = local.wait() if hasattr(local, "wait") else local
        if _wraps(local):
            problem = _opaque(local)
            return problem if problem is not None else refusal(_local(local))
        t = local
    kind = type(t).__name__
    if t.is_nested:
        return f"is a nested tensor ({kind}); use the plain tensors in it"
    if torch._is_functional_tensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "exists only within a transform or trace of torch; step outside of it"
    if torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python) and not _has_memory(t):
        return f"is a {kind}, which has no memory of its own; use a plain tensor"
    if not _has_memory(t):
        return (
            "has no values in memory (its storage was freed or shrunk, it is fake, or it is an"
            " implicit zero); give it its memory back, or replace it by a plain tensor"
        )
    return None


def _has_memory(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    extent = t.storage_offset() + 1
    extent += sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    try:
        storage = t.untyped_storage()
        # A fake tensor's is on meta, and its address must not be asked for.
        there = storage.device == t.device and t.data_ptr() != 0
        return there and storage.nbytes() >= extent * t.element_size()
    except RuntimeError:
        return False


def _opaque(t: Tensor) -> str | None:
    """Say why a wrapper is not replaced by a tensor in it; None where it may be."""
    kind = type(t).__name__
    names, context = t.__tensor_flatten__()  # type: ignore[attr-defined]
    what = f"is a {kind}, which wraps other tensors ({', '.join(names)})"
    holder = _holder(t)
    if holder is None:
        return f"{what}, and not one that holds its values as they are; use plain tensors"
    if not _shows_its_values(t, names, context, holder):
        return f"{what} and changes their values on the way; use plain tensors"
    return None


def _shows_its_values(t: Any, names: Sequence[str], context: Any, holder: Tensor) -> bool:
    """Whether a wrapper reads as the tensor that it holds, whatever else it holds.

    Values as they are may agree by chance (all zeros, a scale of 1): others are put in their place.
    """
    try:
        inner = {name: _probe(getattr(t, name), place) for place, name in enumerate(names)}
        probe = next(inner[name] for name in names if getattr(t, name) is holder)
        wrapped = type(t).__tensor_unflatten__(inner, context, t.shape, t.stride())
        with torch.no_grad():
            read = torch.zeros_like(probe)
            read.add_(wrapped)
        return torch.equal(read, probe)
    except Exception:
        # What such a class raises where it cannot be read is up to it.
        return False


def _probe(like: Tensor, place: int) -> Tensor:
    values = torch.arange(like.numel(), device=like.device).remainder(5)
    values = (values + 2 + place).to(like.dtype).reshape(like.shape)
    return torch.empty_like(like).copy_(values)
