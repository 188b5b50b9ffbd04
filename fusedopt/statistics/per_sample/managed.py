"""What FSDP2 (``torch.distributed.fsdp.fully_shard``) knows of the parameters that it shards.

It has no interface for when and how gradients are reduced, so that its own objects are read, here
and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ...memory.dtensor import holds_dtensors


@dataclass(frozen=True)
class Managed:
    """One parameter that FSDP2 shards.

    Attributes:
        group: the parameters that are gathered and reduced together.
        inner: the parameter as FSDP2 keeps it.
    """

    group: Any
    inner: Any

    @property
    def sharded(self) -> Tensor:
        """The shard, which an optimizer updates."""
        return self.inner.sharded_param  # type: ignore[no-any-return]

    @property
    def leaf(self) -> Tensor | None:
        """The whole parameter, which layers compute with; None before it was first gathered."""
        return getattr(self.inner, "_unsharded_param", None)

    @property
    def holds_unreduced_gradient(self) -> bool:
        """Whether there is a gradient that is yet to be reduced, or to be over replicas."""
        leaf = self.leaf
        return (
            (leaf is not None and leaf.grad is not None)
            or self.inner.unsharded_accumulated_grad is not None
            or getattr(self.group, "_partial_reduce_output", None) is not None
        )

    @property
    def reduces(self) -> bool:
        """Whether a backward pass reduces gradients to those of all processes."""
        return bool(self.group.reduce_grads) and not self.leaves_replicas

    @property
    def leaves_replicas(self) -> bool:
        """Whether it reduces over shards, and leaves replicas apart for now."""
        group = self.group
        two = self.sharded.device_mesh.ndim > 1  # type: ignore[attr-defined]
        return bool(group.reduce_grads) and two and not group.all_reduce_grads

    @property
    def zero_if_unused(self) -> bool:
        """Whether processes take part that have no gradient."""
        return bool(getattr(self.group, "reduce_scatter_unused_params", False))

    @property
    def divisor(self) -> float:
        """What the sum over processes of their gradients is divided by."""
        factor = self.group.gradient_divide_factor
        mesh = self.sharded.device_mesh  # type: ignore[attr-defined]
        return float(mesh.size() if factor is None else factor)

    def refusal(self) -> str | None:
        """Say why gradients may be anything after they are reduced; None where they are sums."""
        if getattr(self.group, "_all_reduce_hook", None) is not None:
            return (
                "set_all_reduce_hook() lets a function of yours change gradients once they are"
                " reduced, which squares cannot follow: take a mesh of two dimensions (HSDP)"
                " instead, or MicroBatchSquares"
            )
        return None


def managed(model: nn.Module) -> dict[int, Managed]:
    """Find the parameters that FSDP2 shards in a model, by the identity of their shards."""
    return {id(m.sharded): m for m in _all(model)}


def _all(model: nn.Module) -> Iterator[Managed]:
    for module in model.modules():
        if is_managing(module):
            for group in _groups(module):
                for inner in group.fsdp_params:
                    yield Managed(group, inner)


def reshard(parameters: Sequence[Tensor]) -> None:
    """Give up what FSDP2 has gathered of some shards, so that it is gathered anew when needed.

    After a forward pass without backward the outermost module keeps its whole weights, and the next
    pass computes with them, whatever was written to the shards since.
    """
    if not distributed.is_available() or not holds_dtensors(parameters):
        return
    from torch.distributed._composable_state import _module_state_mapping

    own = set(map(id, parameters))
    for module in list(_module_state_mapping):
        if is_managing(module):
            inner = [x for group in _groups(module) for x in group.fsdp_params]
            if not own.isdisjoint(id(x.sharded_param) for x in inner):
                module.reshard()  # type: ignore[operator]


def is_managing(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with a module."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    # torch 2.11
    group = state._fsdp_param_group
    return [] if group is None else [group]


def refusal(model: nn.Module, parameter: Tensor) -> str | None:
    """Say why squares of a sharded parameter cannot be made; None where they can."""
    found = managed(model).get(id(parameter))
    if found is None:
        return (
            "is sharded (a DTensor), and not by torch.distributed.fsdp.fully_shard within this"
            " model, so that its gradient is never whole where squares could be made: observe the"
            " module that fully_shard was called with, or use MicroBatchSquares, which squares the"
            " gradients of micro-batches as they are"
        )
    if found.inner.is_dtensor:
        return (
            "is sharded by fully_shard, and for tensor or expert parallelism before, so that its"
            " gradient is never whole where squares could be made: use MicroBatchSquares, which"
            " squares the gradients of micro-batches as they are"
        )
    return found.refusal()


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether work on a tensor is queued on streams."""
    return tensor.device.type != "cpu" and torch.accelerator.is_available()
