"""Norms of gradient, parameter and update of each parameter, as they are asked for and read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .backends import Executor
from .kernels.telemetry import COUNT
from .memory.device import upload
from .memory.storage import local_tensors
from .owned import Owned
from .step.span import Span, in_several_processes, span_of
from .step.wrappers import flat_group

# What ``log_dict`` calls them.
_KEYS = ("grad_norm", "param_norm", "update_norm", "update_ratio")
_TITLES = ("parameter", "gradient norm", "parameter norm", "update norm", "update / parameter")


class Telemetry(Owned):
    """Norms of gradient, parameter and update, for each parameter, from the pass that updates it.

    ``telemetry=Telemetry(every=k)`` has the update kernel of every k-th step write sums of squares,
    12 bytes for 2,048 elements: no launch more, and nothing is read besides. They are added up when
    ``norms``, ``table()`` or ``log_dict()`` is asked for, in a fixed order, so that the same steps
    give the same bits. What is updated is the same with it and without, to the bit.

    The gradient is the one before clipping, without the loss scale; the parameter that after the
    step; the update what the step has added to it; the latter two before they are rounded to what
    the parameter is kept in, so that of a bfloat16 parameter the update is the one that was meant.
    A complex parameter has the norm of its real and imaginary parts.

    Of a sharded parameter the norms are those of the whole, with one collective for all parameters
    at each reading, and none at a step: every process has to read. Where
    ``ZeroRedundancyOptimizer`` has dealt out the parameters, each process reads those of its own.

    Args:
        every: the first step is measured, and every k-th from it on. A step that a CUDA graph
            captures is measured whatever its number is, and so is each replay.

    Raises:
        TypeError: for anything but an int.
        ValueError: for one below 1.

    Attributes:
        measured: whether the latest step was; False where that came to nothing.
        is_due: whether the one under way is to be.
    """

    role = "telemetry"

    def __init__(self, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._every = every
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._count = 0
        self.measured = self.is_due = False
        self._is_open = False
        self._parts: dict[Executor, list[Tensor]] = {}
        # What was measured before these, for as long as the device alone knows whether the step
        # of these was skipped.
        self._earlier: tuple[list[Tensor], Tensor] | None = None

    @property
    def every(self) -> int:
        """One step in how many is measured."""
        return self._every

    def begin(self) -> None:
        """Begin a step, or a backward pass that takes one; whether it is measured is decided."""
        self.is_due = self._count % self._every == 0
        self.measured = False
        self._is_open = True

    def took(
        self, parts: Sequence[tuple[list[Tensor], Executor]], measured: bool, certain: bool = True
    ) -> None:
        """Note a step, or a part of one.

        Args:
            parts: what has measured it, each with its parameters in order.
            measured: whether it was.
            certain: whether the host knows that it is not skipped.
        """
        if self._is_open:
            # Steps that come to nothing are not counted.
            self._is_open = False
            self._count += 1
            if measured:
                self._leave({executor for _, executor in parts}, certain)
        self.measured = measured
        if measured:
            self._parts.update((executor, params) for params, executor in parts)

    def _leave(self, following: set[Executor], certain: bool) -> None:
        """Let go of what has measured before, but for what may have to be read again."""
        if certain:
            self._earlier = None
        elif self._parts and following != self._parts.keys():
            params = [p for own in self._parts.values() for p in own]
            if self._earlier is not None:
                params += self._earlier[0]
            params = list({id(p): p for p in params}.values())
            self._earlier = params, self._sums(params)
        self._parts.clear()

    @property
    def norms(self) -> Tensor:
        """The norms of the latest step that was measured, and not skipped.

        float32 ``[parameters, 3]``, a new tensor on the parameters' device: of gradient, parameter
        and update, of every parameter in the order of ``param_groups``; nan for one that was not
        updated. The host does not wait.

        Raises:
            RuntimeError: before a step was measured; and where shards have no processes in common.
        """
        optimizer = self._attached()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        span = _span(optimizer, params)
        if span is None and not self._parts:
            raise RuntimeError(
                "no step was measured yet: norms are there after the first step() with this"
                " Telemetry"
            )
        sums = self._sums(params)
        if span is not None:
            sums *= _sent(span.weights(params), torch.float64, sums.device).unsqueeze(1)
            distributed.all_reduce(sums, group=span.group)
        norms = sums[:, :COUNT].sqrt()
        return torch.where(sums[:, COUNT:] > 0, norms, math.nan).float()

    def _sums(self, params: list[Tensor]) -> Tensor:
        """Return squared norms of what is in this process, and whether each was updated."""
        device = next(iter(self._parts)).device if self._parts else params[0].device
        place = {id(p): i for i, p in enumerate(params)}
        sums = torch.zeros(len(params), COUNT + 1, dtype=torch.float64, device=device)
        for executor, own in self._parts.items():
            _put(sums, place, own, executor.squares())
        earlier = torch.zeros_like(sums)
        if self._earlier is not None:
            _put(earlier, place, *self._earlier)
        # Of a step that was skipped nothing is written.
        return torch.where((sums < 0).any(), earlier, sums)

    def table(self) -> Table:
        """Return the norms by name of the parameter; this waits for the device.

        Names are those of ``model.named_parameters()``, where the optimizer was given that, and
        else ``group0.param0`` and so on. Printed, it is a table.

        Raises:
            RuntimeError: as of ``norms``.
        """
        return Table(
            (name, Norms(*own))
            for name, own in zip(_names(self._attached()), self.norms.tolist(), strict=True)
        )

    def log_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the norms as loggers take them; this waits for the device.

        Args:
            prefix: in front of every key, as ``"train/"``.

        Returns:
            ``grad_norm/NAME``, ``param_norm/NAME``, ``update_norm/NAME`` and ``update_ratio/NAME``
            (update over parameter) of each parameter that was updated, and under ``grad_norm`` and
            so on those of all together.

        Raises:
            RuntimeError: as of ``norms``.
        """
        table = {name: own for name, own in self.table().items() if not math.isnan(own.parameter)}
        columns = zip(*table.values(), strict=True)
        total = Norms(*(math.hypot(*column) for column in columns)) if table else None
        found = {} if total is None else dict(zip(_KEYS, total.with_ratio(), strict=True))
        for name, own in table.items():
            for key, value in zip(_KEYS, own.with_ratio(), strict=True):
                found[f"{key}/{name}"] = value
        return {f"{prefix}{key}": value for key, value in found.items()}

    def attach(self, optimizer: Any) -> None:
        """Take an optimizer as the one that is measured.

        Raises:
            ValueError: where that is another one's already.
        """
        before = self.owner()
        super().attach(optimizer)
        if before is not optimizer:
            self._begin_anew()

    def _attached(self) -> Any:
        optimizer = self.owner()
        if optimizer is None:
            raise RuntimeError("no optimizer has this Telemetry: pass it on as telemetry=")
        return optimizer

    # Copies begin anew: what was measured is in memory of the optimizer's plan.
    def __reduce__(self) -> tuple[type[Telemetry], tuple[int]]:
        return type(self), (self._every,)

    def __repr__(self) -> str:
        return f"Telemetry(every={self._every})"


def _put(sums: Tensor, place: Mapping[int, int], own: list[Tensor], values: Tensor) -> None:
    """Put rows into those of the same parameters; with what was updated, if they lack it."""
    device = sums.device
    # One may have been taken out of the groups since.
    rows = [(place[id(p)], i) for i, p in enumerate(own) if id(p) in place]
    to, of = _sent(rows, torch.int64, device).reshape(-1, 2).unbind(1)
    sums[to, : values.shape[1]] = values.to(device)[of]
    if values.shape[1] == COUNT:
        # Who has nothing of a parameter does not know whether it was.
        local = local_tensors(own)
        known = [local[i].numel() > 0 or own[i].numel() == 0 for _, i in rows]
        sums[to, COUNT] = _sent(known, torch.float64, device)


def _sent(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Send numbers to a device without waiting for it."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    found = torch.empty(host.shape, dtype=dtype, device=device)
    upload(found, host)
    return found


class Norms(NamedTuple):
    """The norms of one parameter: of gradient, parameter and update."""

    gradient: float
    parameter: float
    update: float

    @property
    def ratio(self) -> float:
        """The update over the parameter; inf or nan for a parameter of zeros."""
        if self.parameter != 0.0:
            return self.update / self.parameter
        return math.inf if self.update > 0.0 else math.nan

    def with_ratio(self) -> tuple[float, float, float, float]:
        """Return the three, and the ratio."""
        return (*self, self.ratio)


class Table(dict[str, Norms]):
    """Norms by name of the parameter; as a text, a table."""

    def __str__(self) -> str:
        rows = [_TITLES]
        for name, own in self.items():
            rows.append((name, *(f"{value:.4g}" for value in own.with_ratio())))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def _line(row: Iterable[str], widths: list[int]) -> str:
    name, *numbers = row
    cells = [name.ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def _names(optimizer: Any) -> Iterator[str]:
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or ()
        for place in range(len(group["params"])):
            # Who appends a parameter to a group need not append a name.
            yield names[place] if place < len(names) else f"group{index}.param{place}"


def _span(optimizer: Any, params: list[Tensor]) -> Span | None:
    """Return the processes that have parts of the same parameters; None for this one."""
    if optimizer.wrapper_group is not None or not in_several_processes():
        return None
    try:
        return span_of(params, None, flat_group(params))
    except RuntimeError as error:
        raise RuntimeError(
            "the parameters of this optimizer are sharded over processes of which none has parts of"
            " all, so that one collective cannot bring their norms together: use an optimizer, and"
            " a Telemetry, for each mesh"
        ) from error


class Measured:
    """The part of an optimizer that holds its telemetry."""

    _telemetry: Telemetry | None = None

    @property
    def telemetry(self) -> Telemetry | None:
        """What norms are measured for; None for nothing. May be set between steps."""
        return self._telemetry

    @telemetry.setter
    def telemetry(self, telemetry: Telemetry | None) -> None:
        check_telemetry(self, telemetry)
        if telemetry is not None:
            telemetry.attach(self)
        self._telemetry = telemetry


def check_telemetry(optimizer: Any, telemetry: Any) -> None:
    """Raise for what cannot be an optimizer's telemetry.

    Raises:
        TypeError: for what is no ``Telemetry``, nor None.
        ValueError: for another optimizer's.
    """
    if telemetry is None:
        return
    if not isinstance(telemetry, Telemetry):
        raise TypeError(f"telemetry must be a fusedopt.Telemetry or None, got {telemetry!r}")
    telemetry.check_free(optimizer)
