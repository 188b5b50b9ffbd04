"""Accumulation of micro-batches in float32, beside gradients of 16 bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from . import backends
from .memory.device import is_capturing
from .memory.dtensor import is_dtensor, local_of, placed_as, sharded_like
from .memory.layout import is_dense
from .memory.storage import local_tensors
from .release import release_of
from .statistics.replicas import replicas_of
from .tracing import untraced

_NARROW = (torch.bfloat16, torch.float16)


class GradientAccumulator:
    """Adds the gradients of micro-batches up in float32, for parameters of 16 bits.

    Autograd adds a gradient to ``p.grad`` in the type of the parameter: of a sum of 64 gradients in
    bfloat16, which has 8 bits, little is left of the last ones. Here they are added to a sum in
    float32, by one launch for all parameters after each micro-batch, and freed::

        accumulator = fusedopt.GradientAccumulator(model)
        for x, y in micro_batches:
            with accumulator.micro_batch():
                (criterion(model(x), y) / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    Outside of ``micro_batch()``, ``p.grad`` is that sum, a float32 tensor: clipping, a gradient
    scaler and fusedopt's optimizers read it as any gradient (torch's need not take one of another
    type than the parameter's), and ``zero_grad()`` clears it. ``p.grad_dtype``, which says what
    autograd may put there, is set to None.

    It takes 4 bytes a parameter for as long as this lives, and 2 for the gradient during backward.
    Parameters in float32 or float64 have sums in their type by themselves, and are left alone.

    Args:
        params: a module, or parameters. Those that are frozen may be thawed later.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``, as of optimizers.

    Raises:
        TypeError: for something else.
        ValueError: where none has 16 bits.
    """

    def __init__(self, params: nn.Module | Iterable[Tensor], *, backend: str = "auto") -> None:
        backends.check_name(backend)
        every = list(params.parameters() if isinstance(params, nn.Module) else params)
        if not all(isinstance(p, Tensor) for p in every):
            raise TypeError(f"params must be a module or parameters, got {every!r:.200}")
        self._params = [p for p in every if p.dtype in _NARROW]
        if not self._params:
            raise ValueError(
                "no parameter has 16 bits: gradients of others are added up in float32 without this"
            )
        self._backend = backend
        self._sums: list[Tensor | None] = [None] * len(self._params)
        # Whether a sum has gradients in it.
        self._begun = [False] * len(self._params)
        self._adders: dict[torch.device, backends.Sums] = {}
        self._is_open = False
        self._is_new = True
        self._replicas: list[Any] = []
        for p in self._params:
            p.grad_dtype = None

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Add the gradients of the backward passes within to the sums.

        Where backward raises, what it has left is dropped, and the sums are as before. Parameters
        that ``gradient_release`` steps are not stepped within: run the last micro-batch outside.

        Raises:
            RuntimeError: within another one; for gradients that are sparse or on another device;
                for those that ``DistributedDataParallel.no_sync()`` has left unreduced; while a
                CUDA graph is captured.
        """
        if self._is_open:
            raise RuntimeError("micro_batch() within micro_batch(): leave one of the two out")
        try:
            self._take_away()
        except Exception:
            self._publish()
            raise
        self._is_open = True
        try:
            with ExitStack() as stack:
                for release in {id(r): r for p in self._params if (r := release_of(p))}.values():
                    stack.enter_context(release.accumulating())
                yield
            self._check_reduced()
            self._add()
        except BaseException:
            for p in self._params:
                p.grad = None
            raise
        finally:
            self._is_open = False
            self._publish()

    @untraced
    def _take_away(self) -> None:
        """Take the sums out of the way of autograd, which would add to them one by one."""
        for i, p in enumerate(self._params):
            total = self._sums[i]
            self._begun[i] = total is not None and p.grad is total
            if self._begun[i]:
                p.grad = None
        # What backward passes outside have left since the sums were cleared.
        self._add()

    @untraced
    def _publish(self) -> None:
        for i, p in enumerate(self._params):
            total = self._sums[i]
            if total is not None and self._begun[i] and total.shape == p.shape:
                p.grad = total

    @untraced
    @torch.no_grad()
    def _add(self) -> None:
        """Add what is in ``p.grad`` to the sums, and free it."""
        own = [i for i, p in enumerate(self._params) if p.grad is not None]
        gradients: list[Any] = [self._params[i].grad for i in own]
        self._check(own, gradients)
        for i in own:
            self._sums[i] = self._fitting(i)
        gradients = placed_as([self._params[i] for i in own], gradients)
        columns: dict[torch.device, list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
        local = local_tensors([self._sums[i] for i in own])  # type: ignore[misc]
        for i, total, gradient in zip(own, local, local_tensors(gradients), strict=True):
            columns[total.device].append((total, gradient, self._begun[i]))
        for device, rows in columns.items():
            if device not in self._adders:
                self._adders[device] = backends.sums_on(device, self._backend)
            self._adders[device].add(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]
        for i in own:
            self._begun[i] = True
            self._params[i].grad = None

    def _check(self, own: Sequence[int], gradients: Sequence[Tensor]) -> None:
        for i, gradient in zip(own, gradients, strict=True):
            p = self._params[i]
            who = f"parameter {i} of those of 16 bits, of shape {tuple(p.shape)}"
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{who}: its gradient is sparse ({gradient.layout}); use a dense one (for an"
                    " embedding sparse=False)"
                )
            if gradient.device != p.device:
                raise RuntimeError(f"{who}: it is on {p.device}, its gradient on {gradient.device}")
        if any(map(is_capturing, {gradient.device for gradient in gradients})):
            raise RuntimeError(
                "a CUDA graph is being captured, which would add up what is at the addresses of"
                " now: accumulate outside of it"
            )

    def _fitting(self, i: int) -> Tensor:
        """Return the sum of a parameter; a new one where that has changed."""
        p, total = self._params[i], self._sums[i]
        if total is not None and (total.shape, total.device) == (p.shape, p.device):
            return total
        if self._begun[i]:
            raise RuntimeError(
                f"parameter {i} of those of 16 bits is {tuple(p.shape)} on {p.device}, and the sum"
                f" of its gradients {tuple(total.shape)} on {total.device}: call zero_grad() after"  # type: ignore[union-attr]
                " changing a parameter"
            )
        local = local_of(p) if is_dtensor(p) else p
        made = torch.empty_like(local, dtype=torch.float32)
        if not is_dense(made):
            made = torch.empty(local.shape, dtype=torch.float32, device=local.device)
        return sharded_like(p, made) if is_dtensor(p) else made

    def _check_reduced(self) -> None:
        """Raise where gradients are those of this process alone, which nothing would reduce."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if self._is_new:
            self._replicas, self._is_new = replicas_of(self._params), False
        for reference in self._replicas:
            module = reference()
            # Set by each forward pass, and still there when no_sync() is over.
            if module is not None and not module.require_forward_param_sync:
                raise RuntimeError(
                    "DistributedDataParallel.no_sync() leaves each process with its own gradients,"
                    " and those that are added up here are not reduced later, so that the processes"
                    " would drift apart. Leave no_sync() out: every micro-batch is reduced"
                )
