"""The average of the weights, as it is asked for, and put in the place of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .formats.options import check_average
from .kernels.weight_average import DECAY, DTYPE, NAME, OPTIONS, START
from .memory.storage import local_tensors
from .owned import Owned
from .statistics.per_sample.managed import reshard


class WeightAverage(Owned):
    """An exponential average of the weights, written by the pass that updates them.

    ``average=WeightAverage(decay)`` keeps in ``state["ema"]`` of each parameter what
    ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))`` would
    have, updated after each step: the first average is a copy of the parameter, and from then on

        ema = decay ema + (1 - decay) parameter

    of the parameter before it is rounded to its type (the master, where there is one). That costs 8
    bytes a float32 parameter, 4 in bfloat16, and no launch; a pass of its own costs 12. Clipping,
    decay and the update are what they are without it, to the bit. A parameter without a gradient is
    not updated, and neither is its average; a step that is skipped changes no average.

    The numbers are entries of the parameter groups, ``average_decay``, ``average_dtype`` and
    ``average_start``, which may differ: with ``"average_decay": None`` a group has no average.

    Args:
        decay: of the average, from 0 to 1; its horizon is 1 / (1 - decay) steps. May be changed
            between steps, or be a tensor of one element.
        dtype: of the average: ``torch.float32``; ``torch.bfloat16`` or ``torch.float16``, rounded
            stochastically, as to nearest it would stand still; or None for the parameter's, which
            is then not to be one of the last two.
        start: up to this step of a parameter, and the next, the average is a copy of it.

    Raises:
        ValueError: for options without meaning.

    Attributes:
        is_applied: whether the weights are the averages now.
    """

    role = "average"

    def __init__(
        self,
        decay: float | Tensor = 0.9999,
        dtype: torch.dtype | None = torch.float32,
        start: int = 0,
    ) -> None:
        check_average(decay, dtype, start, "")
        self._options = {DECAY: decay, DTYPE: dtype, START: start}
        self.is_applied = False

    @property
    def decay(self) -> Any:
        """How much of the average a step keeps; that of all groups which have one."""
        return self._read(DECAY)

    @decay.setter
    def decay(self, value: float | Tensor) -> None:
        check_average(value, None, 0, "")
        self._write(DECAY, value)

    @property
    def dtype(self) -> Any:
        """In what it is kept; averages that there are change with the next step."""
        return self._read(DTYPE)

    @dtype.setter
    def dtype(self, value: torch.dtype | None) -> None:
        check_average(0.0, value, 0, "")
        self._write(DTYPE, value)

    @property
    def start(self) -> Any:
        """The steps before it."""
        return self._read(START)

    @start.setter
    def start(self, value: int) -> None:
        check_average(0.0, None, value, "")
        self._write(START, value)

    def _read(self, name: str) -> Any:
        found = [group[name] for group in self._groups()] or [self._options[name]]
        if any(value is not found[0] and value != found[0] for value in found):
            raise ValueError(f"groups differ: read optimizer.param_groups[i][{name!r}]")
        return found[0]

    def _write(self, name: str, value: Any) -> None:
        self._options[name] = value
        for group in self._groups():
            group[name] = value
        optimizer = self.owner()
        if optimizer is not None:
            optimizer.defaults[name] = value

    def _groups(self) -> list[dict[str, Any]]:
        """List the groups that have an average."""
        optimizer = self.owner()
        groups = [] if optimizer is None else optimizer.param_groups
        return [group for group in groups if group.get(DECAY) is not None]

    def options(self) -> dict[str, Any]:
        """Return the entries of parameter groups that say so."""
        return dict(self._options)

    def __getstate__(self) -> dict[str, Any]:
        return {"_options": self._options, "_optimizer": None, "is_applied": False}

    def __repr__(self) -> str:
        decay, dtype, start = (self._options[name] for name in OPTIONS)
        return f"WeightAverage({decay}, dtype={dtype}, start={start})"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the parameters, and the parameters back at the end.

        ::

            with optimizer.average.applied():
                evaluate(model)

        Averages are rounded to the parameters' types, to nearest. At the end, whatever was raised,
        the parameters have the bits that they had: what was written to them within is lost. What
        has no average yet stays what it is. Of sharded parameters each process exchanges its part,
        and nothing is gathered; for FSDP2's, weights that a forward pass has left gathered are
        given up, so that the next one gathers them anew.

        Meanwhile there is a copy of the parameters, and a step, or loading the optimizer's state,
        is an error. Buffers, as the statistics of batch norm, are not parameters: see
        ``torch.optim.swa_utils.update_bn`` for them, on a copy of the model.

        Raises:
            RuntimeError: within itself; without an optimizer; for parameters of FSDP1, or that
                ``ZeroRedundancyOptimizer`` has dealt out.
        """
        optimizer = self.owner()
        self._check_applicable(optimizer)
        pairs = [
            (p, state[NAME])
            for group in self._groups()
            for p in group["params"]
            if isinstance((state := optimizer.state.get(p) or {}).get(NAME), Tensor)
        ]
        params = [p for p, _ in pairs]
        with torch.no_grad():
            before = [x.clone() for x in local_tensors(params)]
        self.is_applied = True
        try:
            _exchange(params, local_tensors([average for _, average in pairs]))
            yield
        finally:
            self.is_applied = False
            _exchange(params, before)

    def _check_applicable(self, optimizer: Any) -> None:
        if optimizer is None:
            raise RuntimeError("no optimizer has this average: pass it on as average=")
        if self.is_applied:
            raise RuntimeError("the averages are applied already: leave applied() first")
        if optimizer.wrapper_group is not None:
            raise RuntimeError(
                "ZeroRedundancyOptimizer has dealt out the parameters, and a process has the"
                " averages of its own alone: use torch.distributed.fsdp.fully_shard"
            )
        if any(getattr(p, "_fsdp_flattened", False) for g in self._groups() for p in g["params"]):
            raise RuntimeError(
                "FullyShardedDataParallel may hold on to weights that it has gathered before: use"
                " torch.distributed.fsdp.fully_shard"
            )


@torch.no_grad()
def _exchange(params: list[Tensor], values: Sequence[Tensor]) -> None:
    """Write what of some parameters lies in this process."""
    reshard(params)
    for target, value in zip(local_tensors(params), values, strict=True):
        target.copy_(value)
    # Autograd then notices a parameter that changed between forward and backward.
    torch.autograd.graph.increment_version(params)


class Averaged:
    """An optimizer that may have an average of its weights: what its groups say of it holds."""

    param_groups: list[dict[str, Any]]
    _average: WeightAverage | None = None

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights; None for none. May be set between steps."""
        self._average = _average_of(self, self._average)
        return self._average

    @average.setter
    def average(self, average: WeightAverage | None) -> None:
        self.refuse_if_applied("average cannot be set")
        _set_average(self, average)
        self._average = average

    def refuse_if_applied(self, what: str) -> None:
        """Raise RuntimeError while the averages are in the place of the weights."""
        if self._average is not None and self._average.is_applied:
            raise RuntimeError(f"{what} within optimizer.average.applied(): leave it first")


def _average_of(optimizer: Any, known: WeightAverage | None) -> WeightAverage | None:
    """Return the average of an optimizer whose groups say that there is one; None for none.

    Args:
        optimizer: whose groups may be those of a checkpoint.
        known: what it was made with, or found before.
    """
    for group in optimizer.param_groups:
        if group.get(DECAY) is not None:
            if known is None:
                known = WeightAverage(*(group[name] for name in OPTIONS))
                known.attach(optimizer)
            return known
    return None


def _set_average(optimizer: Any, average: WeightAverage | None) -> None:
    """Give all groups of an optimizer an average, or none: then averages are deleted.

    Raises:
        TypeError: for anything else.
        ValueError: for what does not go with a parameter; nothing has changed then.
    """
    check_kind(average)
    if average is not None:
        average.check_free(optimizer)
        for group in optimizer.param_groups:
            optimizer.check_entries({**group, **average.options()})
    for group in (optimizer.defaults, *optimizer.param_groups):
        for name in OPTIONS:
            group.pop(name, None)
        if average is not None:
            group.update(average.options())
    if average is not None:
        average.attach(optimizer)
        return
    for state in optimizer.state.values():
        state.pop(NAME, None)


def check_kind(average: Any) -> None:
    """Raise TypeError for what is no ``WeightAverage``, nor None."""
    if average is not None and not isinstance(average, WeightAverage):
        raise TypeError(f"average must be a fusedopt.WeightAverage or None, got {average!r}")
