"""What is gathered for one parameter, and whether it still belongs to the gradient at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...memory.dtypes import compute_dtype
from ...memory.storage import local_tensors
from .. import shards
from ..grad_version import GradVersion, weakly
from . import factors
from .expected import Expected, Foreign, deviation
from .sample_count import SampleCount

Commit = Callable[["Record", list[SampleCount]], None]


class Record:
    """The squares of one parameter.

    What a backward pass makes is pending until autograd adds the gradient to ``parameter.grad``:
    ``torch.autograd.grad`` runs the same nodes and adds nothing.

    Args:
        parameter: whose squares these are.
        name: its name in the model.
        commit: called when a pending contribution has arrived.

    Attributes:
        squares: the sum over samples of squared contributions to ``parameter.grad``, in float32
            (float64 for float64 parameters); None where nothing has arrived.
        start: how many samples the statistics had seen when ``parameter.grad`` was cleared, or when
            squares were last added up over processes.
        reduced: how many samples of all processes were added up.
        divisor: what the sum over processes of their gradients was divided by; None where squares
            are of this process alone.
        local: whether squares of this process alone have been added since.
        foreign: where a part of the gradient came from that no observed layer made, or None.
        deviates: whether what arrived is not what was expected, on the device; None where that is
            known on the host.
        norms: of the gradient as it arrived, see ``factors``; None where they were not made.
        altered: whether a gradient was changed by hand before another was added to it.
        due: whether squares are made in the latest call of the model.
    """

    def __init__(self, parameter: Tensor, name: str, commit: Commit) -> None:
        self.parameter = parameter
        self.name = name
        self.squares: Tensor | None = None
        self.start = 0
        self.reduced: Callable[[], int] = _none
        self.divisor: float | None = None
        self.local = False
        self.foreign: Foreign | None = None
        self.deviates: Tensor | None = None
        self.norms: Tensor | None = None
        self.altered = False
        self.due = True
        # Whether the gradient was gone before the one that now arrives.
        self.restarts = False
        # The backward pass in which a gradient is being added that has not been counted yet.
        self._arriving: int | None = None
        # Whether a layer has ever been seen to use the parameter.
        self.gated = False
        self._memory = -1
        self._commit = commit
        self._pending: Tensor | None = None
        self._pending_calls: list[SampleCount] = []
        self._backward = -1
        self._expected: list[Expected | None] = []
        self._unexpected: Foreign | None = None
        self._deviates: Tensor | None = None
        # The gradient as it was when it was known to be zero.
        self._zero: GradVersion | None = None
        self._version: GradVersion | None = None
        self._stepped = False
        self._check_hook: Any = None
        self._arrived_hook: Any = None
        if parameter.requires_grad:
            self.watch()

    @property
    def leaf(self) -> Tensor | None:
        """The tensor that layers compute with, whose gradient autograd makes."""
        return self.parameter

    @property
    def mesh(self) -> Any:
        """The processes that have shards of the parameter; None for one that is whole."""
        return None

    def pending(self) -> Tensor | None:
        """Return what this backward pass has made so far, to be added to."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._pending, self._pending_calls, self._expected = None, [], []
        return self._pending

    def propose(self, squares: Tensor, call: SampleCount) -> None:
        """Take the squares of a call of the model, which belong to a gradient on its way."""
        self._pending = squares
        self._pending_calls.append(call)

    def expect(self, gradient: Tensor | None, known: bool) -> None:
        """Note the gradient that an observed layer hands to autograd, if it is known."""
        found = gradient is not None and known
        self._expected.append(Expected(gradient, gradient._version, None) if found else None)  # type: ignore[union-attr, arg-type]

    def expect_sum(self, total: Tensor, allowed: Tensor) -> None:
        """Note what the gradient that autograd makes should be, and how far it may be from that."""
        self._expected.append(Expected(total, None, allowed))

    def watch(self) -> None:
        """See the gradient as it arrives, behind hooks that others have registered since."""
        parameter: Any = self.leaf
        if parameter is None:
            return
        registered = parameter._backward_hooks
        if self._memory != parameter._cdata:
            if self._memory != -1:
                # A conversion has swapped other contents into the parameter, which know of no
                # hook: setting the dictionaries makes them known, as at the first registration.
                parameter._backward_hooks = registered
                parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
                self.remove()
            self._memory = parameter._cdata
        if self._check_hook is not None:
            if registered and next(reversed(registered)) == self._check_hook.id:
                return
            self.remove()
        self._check_hook = parameter.register_hook(weakly(self._check))
        arrived = weakly(self._arrived)
        self._arrived_hook = parameter.register_post_accumulate_grad_hook(arrived)

    def _check(self, gradient: Tensor) -> None:
        """Compare what reaches the parameter with what the layers handed over."""
        expected, self._expected = self._expected, []
        self._unexpected = self._deviates = None
        if not expected:
            self._unexpected = Foreign.UNOBSERVED
        elif len(expected) == 1 and expected[0] is not None and expected[0].allowed is None:
            own = expected[0]
            # One contribution is passed on as it is.
            if gradient is not own.tensor or gradient._version != own.version:
                self._unexpected = Foreign.OUTSIDE
        elif None not in expected:
            self._deviates = deviation(gradient, expected)  # type: ignore[arg-type]
        if self.squares is None and not self._is_zero():
            self._unexpected = Foreign.BEFORE
        self.restarts = self.is_cleared()
        if not self.restarts and self.squares is not None and self.is_changed():
            # Else what is added now would hide it.
            self.altered |= not follow([self])
        self._arriving = torch._C._current_graph_task_id()

    def _is_zero(self) -> bool:
        """Whether there is nothing in ``parameter.grad`` that is now added to."""
        gradient = self.parameter.grad
        if gradient is None or (self._zero is not None and self._zero.holds(gradient)):
            return True
        return not self._is_nonzero(gradient)

    def _is_nonzero(self, gradient: Tensor) -> bool:
        return bool(gradient.any())

    def take_zero(self, like: Record) -> None:
        """Gather zeros for a gradient that was cleared in place, and not reached since.

        Args:
            like: another of the same step, of which this has seen the samples.
        """
        if self.squares is None and self.parameter.grad is not None and self._is_zero():
            self.squares = self.zeros()
            self.start, self.reduced = like.start, like.reduced
            self.divisor, self.local = like.divisor, like.local
            self.accept()

    def cleared(self) -> None:
        """Note that the gradient is None or zero."""
        gradient = self.parameter.grad
        self._zero = None if gradient is None else GradVersion(gradient)

    def _arrived(self, _: Tensor) -> None:
        """Run after autograd has added a gradient to ``parameter.grad``."""
        self._settle()

    def settle(self) -> None:
        """Take the gradient that has arrived in this backward pass, if it was not taken yet.

        Hooks of others that run after the addition may step and clear the gradient before this
        record's own hook is run. ``torch.autograd.grad`` runs the hook in front, and adds nothing.
        """
        if self._arriving is not None:
            if self._arriving == torch._C._current_graph_task_id():
                self._settle()

    def _settle(self) -> None:
        if self._arriving is None:
            return
        self._arriving = None
        parameter = self.parameter
        calls, self._pending_calls = self._pending_calls, []
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(self, calls)
            self._add(pending)
        self.foreign = self.foreign or self._unexpected
        if self._deviates is not None:
            known = self.deviates
            self.deviates = self._deviates if known is None else known | self._deviates
        self._version, self._stepped = GradVersion(parameter.grad), False
        self.norms = None

    def _add(self, squares: Tensor) -> None:
        if self.squares is None:
            self.squares = squares
        else:
            self.to_share()
            self.squares.add_(squares)
        self.local = True

    def to_share(self) -> None:
        """Give squares that were added up the form of one process' share, to be added up again."""
        if self.divisor is not None and not self.local and self.squares is not None:
            # The sum of as many equal shares, over the square of the divisor, is the same again.
            self.squares.mul_(self.divisor)
        self.local = True

    @property
    def is_shared(self) -> bool:
        """Whether squares are those of all processes."""
        return self.divisor is not None and not self.local

    def share(self, reduced: Callable[[], int], divisor: float, seen: int) -> None:
        """Take squares for those of all processes, and the gradient for their average."""
        self.reduced, self.divisor, self.local = reduced, divisor, False
        self.start = seen
        if self.parameter.grad is not None:
            self.accept()

    @property
    def has_arrived(self) -> bool:
        """Whether there has been a gradient since it was cleared."""
        return self._version is not None

    def zeros(self) -> Tensor:
        """Return squares of no sample."""
        parameter = self.parameter
        dtype = compute_dtype([parameter.dtype])
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

    def is_to_be_counted(self) -> bool:
        """Whether the samples of all processes are to be counted with squares that are shared."""
        return self.parameter.requires_grad

    def stepped(self) -> None:
        """Note that a step has used the squares."""
        self._version, self._stepped = GradVersion(self.parameter.grad), True
        self.norms = None

    def accept(self) -> None:
        """Take the gradient as it is now for what the squares belong to."""
        self._version = GradVersion(self.parameter.grad)
        self.norms = None

    def is_same_tensor(self) -> bool:
        """Whether the gradient is still the tensor that arrived, written or not."""
        return self._version is not None and self._version.is_same_tensor(self.parameter.grad)

    def may_be_followed(self) -> bool:
        """Whether the gradient may be what arrived, times a factor."""
        gradient = self.parameter.grad
        # DistributedDataParallel moves sums into new buckets once, if they are views of these.
        moved = gradient is not None and gradient._is_view() and self.divisor is not None
        return moved or self.is_same_tensor()

    def is_cleared(self) -> bool:
        """Whether the gradient that the squares belong to is gone."""
        if self.squares is None and not self._stepped:
            return False
        gradient = self.parameter.grad
        if gradient is None or not self.is_changed():
            return gradient is None
        # Written after a step: zeroed in place, by the model's zero_grad or by hand. Written before
        # one: an error that step() finds, unless it was zeroed; this once the host looks.
        return self._stepped or not self._is_nonzero(gradient)

    def is_changed(self) -> bool:
        """Whether the gradient was written or replaced since it arrived."""
        return self._version is not None and not self._version.holds(self.parameter.grad)

    def reset(self, start: int) -> None:
        """Forget the squares; count samples from ``start`` on."""
        self.squares = None
        self.start = start
        self.reduced, self.divisor, self.local = _none, None, False
        self.foreign = self.deviates = None
        self.altered = False
        self._version, self._stepped, self.norms = None, False, None

    def remove(self) -> None:
        """Take the hooks off the parameter."""
        if self._check_hook is not None:
            self._check_hook.remove()
            self._arrived_hook.remove()
        self._check_hook = self._arrived_hook = None


def _none() -> int:
    return 0


def settle_deviations(records: Sequence[Record]) -> None:
    """Read, at once, which gradients were not what was expected."""
    doubtful = [r for r in records if r.deviates is not None]
    flags = [r.deviates.cpu() for r in doubtful if r.deviates is not None]
    for record, flag in zip(doubtful, flags, strict=True):
        record.deviates = None
        if flag:
            record.foreign = record.foreign or Foreign.OUTSIDE


def measure(records: Iterable[Record]) -> None:
    """Note the norms of gradients as they are now, so that a factor on them can be followed."""
    own = [r for r in records if r.parameter.grad is not None and r.squares is not None]
    for record, norms in zip(own, _norms(own, _gradients(own)), strict=True):
        record.norms = norms


def _gradients(records: Iterable[Record]) -> list[Tensor]:
    """Return the gradients that there are, or this process' shards of them."""
    found = [r.parameter.grad for r in records if r.parameter.grad is not None]
    return local_tensors(found)


def _norms(records: Sequence[Record], gradients: Sequence[Tensor]) -> list[Tensor]:
    return shards.whole_norms(factors.norms(gradients), [r.parameter for r in records])


@torch.no_grad()
def follow(records: Sequence[Record]) -> bool:
    """Multiply the squares of changed gradients by the square of what these were multiplied by.

    Returns:
        False where that is not one factor for all; nothing has changed then.
    """
    before = [r.norms for r in records if r.norms is not None and r.may_be_followed()]
    gradients = _gradients(records)
    if len(before) < len(records) or len(gradients) < len(records):
        return False
    after = _norms(records, gradients)
    factor = factors.common_factor(before, after, gradients)
    if factor is not None and not all(r.is_same_tensor() for r in records):
        factor = 1.0 if abs(factor - 1.0) <= factors.TOLERANCE else None
    if factor is None:
        return False
    for record, norms in zip(records, after, strict=True):
        record.accept()
        record.norms = norms
        if factor != 1.0 and record.squares is not None:
            local_tensors([record.squares])[0].mul_(factor**2)
    return True


@torch.no_grad()
def look_at_shards(records: Iterable[Record]) -> list[Record]:
    """Follow what was done to gradients that are sharded, and return those that are zero now.

    What torch's optimizers and ``clip_grad_norm_`` write to many DTensors at once leaves no version
    count changed, so that they are read.
    """
    own = [r for r in records if r.mesh is not None and r.is_shared and r.norms is not None]
    if not own or follow(own):
        return []
    gradients = _gradients(own)
    if len(gradients) < len(own):
        # Some were set to None, which needs no look.
        return []
    norms = torch.stack([pair[0] for pair in _norms(own, gradients)])
    if not bool(norms.any()):
        return own
    for record in own:
        record.altered = True
    return []
