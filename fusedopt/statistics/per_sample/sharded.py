"""The squares of a parameter that FSDP2 shards: whole for as long as its gradient is.

A backward pass makes the whole gradient of a parameter, of this process' samples, which FSDP2 then
reduces into shards. So do the squares, right behind it: what layers make is kept until the shard's
gradient is there, and added up over processes into the shard's placements. Where gradients are not
reduced, whole ones are kept by FSDP2, and squares here, until they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial

from ...memory.dtypes import compute_dtype
from ...memory.layout import share_memory
from ...memory.storage import local_tensors
from ..grad_version import weakly
from .managed import Managed, is_on_gpu
from .record import Commit, Record


class ShardedRecord(Record):
    """The squares of one sharded parameter.

    Args:
        parameter: the shard.
        name: its name in the model.
        commit: called when a pending contribution has arrived.
        managed: what FSDP2 knows of it.
        expects: whether squares are expected of a backward pass, the same in all processes.
        reduced: called when squares have been added up over processes.
    """

    def __init__(
        self,
        parameter: Tensor,
        name: str,
        commit: Commit,
        managed: Managed,
        expects: Callable[[], bool],
        reduced: Callable[[Record], None],
    ) -> None:
        self.managed = managed
        self._expects = expects
        self._on_reduced = reduced
        # Of this process' samples, and not reduced yet; and reduced over shards, not over replicas.
        self._whole: Tensor | None = None
        self._partial: Tensor | None = None
        self._reduced_hook: Any = None
        # The backward pass that has reduced a gradient.
        self._reduced_in = -1
        super().__init__(parameter, name, commit)

    @property
    def leaf(self) -> Tensor | None:
        """The whole parameter, which autograd sees; None before it was first gathered."""
        return self.managed.leaf

    @property
    def mesh(self) -> Any:
        """The processes that have shards."""
        return self.parameter.device_mesh  # type: ignore[attr-defined]

    @property
    def placements(self) -> tuple[Any, ...]:
        """How shards lie on the mesh."""
        return self.parameter.placements  # type: ignore[attr-defined, no-any-return]

    @property
    def _is_waiting(self) -> bool:
        """Whether there are squares that are yet to be reduced."""
        return self._whole is not None or self._partial is not None

    def watch(self) -> None:
        """See whole gradients as they arrive, and shards of them once they are reduced."""
        if self._reduced_hook is None:
            # FSDP2 calls it by itself: autograd never adds to a shard.
            hook = weakly(self._reduced)
            self._reduced_hook = self.parameter.register_post_accumulate_grad_hook(hook)
        super().watch()

    def remove(self) -> None:
        """Take the hooks off the parameter."""
        super().remove()
        if self._reduced_hook is not None:
            self._reduced_hook.remove()
        self._reduced_hook = None

    def _check(self, gradient: Tensor) -> None:
        lost = self._is_waiting and not self.managed.holds_unreduced_gradient
        if lost and self.squares is not None:
            raise RuntimeError(
                f"a gradient of {self.name!r} that was not reduced yet is gone, as by"
                " reset_iter_state(), and squares of it are not: call optimizer.zero_grad()"
            )
        if lost:
            self._whole = self._partial = None
        if self._reduced_in == torch._C._current_graph_task_id():
            # Shards that are reduced together are views, which count the writes to all of them.
            self.accept()
        super()._check(gradient)
        self.restarts |= lost

    def _is_zero(self) -> bool:
        unknown = not self._is_waiting and self.managed.holds_unreduced_gradient
        return not unknown and super()._is_zero()

    def _is_nonzero(self, gradient: Tensor) -> bool:
        # In all processes the same: a shard may be empty.
        found = local_tensors([gradient])[0].any().to(torch.int32)
        for dim in range(self.mesh.ndim):
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.mesh.get_group(dim))
        return bool(found)

    def _add(self, squares: Tensor) -> None:
        squares = squares.to(compute_dtype([self.parameter.dtype]))
        self._whole = squares if self._whole is None else self._whole.add_(squares)
        self.local = True
        if self.managed.leaves_replicas and not self.managed.zero_if_unused:
            # FSDP2 reduces its gradient over shards now, and calls no hook.
            self._partial, self._whole = self._over_shards(), None

    def _reduced(self, _: Tensor) -> None:
        """Run after FSDP2 has added a reduced gradient to the shard's."""
        if not (self._expects() or self.local):
            return
        problem = self.managed.refusal()
        divisor = self.managed.divisor
        if problem is None and self.divisor not in (None, divisor):
            problem = (
                f"the gradients of one step were divided by {self.divisor:g}, and now by"
                f" {divisor:g}: set_gradient_divide_factor() between steps only"
            )
        if problem is not None:
            raise RuntimeError(f"parameter {self.name!r}: {problem}")
        own = self._over_shards()
        for dim, placement in enumerate(self.placements):
            if placement.is_replicate():
                distributed.all_reduce(own, group=self.mesh.get_group(dim))
        # A sample's contribution to the reduced gradient is its local one over the divisor.
        own = own.div_(divisor**2).to(local_tensors([self.parameter])[0].device)
        self._whole = self._partial = None
        if self.squares is None:
            self.squares = self._as_shard(own)
        else:
            local_tensors([self.squares])[0].add_(own)
        self.divisor, self.local = divisor, False
        self._reduced_in = torch._C._current_graph_task_id()
        self.accept()
        self._on_reduced(self)

    def is_to_be_counted(self) -> bool:
        """Whether the samples of all processes are to be counted with squares that are shared."""
        return super().is_to_be_counted() and self.managed.reduces

    def _over_shards(self) -> Tensor:
        """Add up whole squares over the processes that shard them; return this one's shard."""
        whole = self._whole
        if whole is None:
            # Of a process whose samples did not use the parameter.
            leaf = self.leaf
            assert leaf is not None
            dtype = compute_dtype([self.parameter.dtype])
            whole = torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)
        if is_on_gpu(whole):
            # FSDP2 reduces on a stream of its own, where this is called.
            whole.record_stream(torch.accelerator.current_stream())
        sums = [Partial()] * self.mesh.ndim
        target = [Partial() if p.is_replicate() else p for p in self.placements]
        added = DTensor.from_local(whole.contiguous(), self.mesh, sums, run_check=False)
        own = local_tensors([added.redistribute(placements=target)])[0]
        # What is made of one process alone may be what it was made of.
        own = own.clone() if share_memory(own, whole) else own
        return own if self._partial is None else own.add_(self._partial)

    def _as_shard(self, local: Tensor) -> Tensor:
        p = self.parameter
        shape, stride = p.shape, p.stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def zeros(self) -> Tensor:
        """Return squares of no sample."""
        local = local_tensors([self.parameter])[0]
        return self._as_shard(torch.zeros_like(local, dtype=compute_dtype([local.dtype])))

    def stepped(self) -> None:
        """Note that a step has used the squares."""
        norms = self.norms
        super().stepped()
        # Which tell whether shards were cleared since: see look_at_shards.
        self.norms = norms

    def reset(self, start: int) -> None:
        """Forget the squares; count samples from ``start`` on."""
        before = self.start
        super().reset(start)
        if self._is_waiting and self.managed.holds_unreduced_gradient:
            # Clearing the shard's gradient leaves what is yet to be added to it.
            self.start, self.local = before, True
        else:
            self._whole = self._partial = None
