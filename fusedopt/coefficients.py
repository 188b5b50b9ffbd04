"""The scalars of a step: from hyper-parameters and step counts to a small device table.

A rule's ``coefficients(group, step)`` runs in double precision, once for each pair of group and
step count that occurs, not once a tensor. Two tables do that:

* ``HostTable``: hyper-parameters and step counts are known on the host; the rows are computed
  there and copied over in one asynchronous transfer.
* ``LiveTable``: step counts live on the device, and hyper-parameters may (``capturable=True``,
  tensor lr on a GPU, loss scaling). The operations of ``coefficients`` are recorded once
  (``kernels/formula.py``) and done again at each step, by one kernel or by PyTorch, into the same
  memory, so that a captured CUDA graph reads the current values, and a step neither reads a device
  value nor allocates.
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .kernels import weight_average
from .kernels.formula import Formula, record
from .kernels.rule import Group, Rule
from .memory.device import is_capturing, upload

_LARGEST = torch.finfo(torch.float32).max


def lives_on_device(group: Group, hyper: Sequence[str]) -> bool:
    """Whether a hyper-parameter of the group is a tensor that the host must not read."""
    return any(
        isinstance(value, Tensor) and value.device.type != "cpu"
        for name in hyper
        for value in _flat(group[name])
    )


def numbers_of(rule: Rule, group: Group) -> tuple[str, ...]:
    """Name the entries of a group that coefficients are made of."""
    averages = group.get(weight_average.DECAY) is not None
    return (*rule.hyper, weight_average.DECAY) if averages else rule.hyper


def on_host(group: Group, hyper: Sequence[str]) -> dict[str, Any]:
    """Return the group with its numeric entries as Python numbers."""
    values = dict(group)
    for name in hyper:
        value = values[name]
        kind = type(value)
        if kind is float or kind is int:
            continue
        if isinstance(value, (tuple, list)):
            values[name] = tuple([x if type(x) is float else number(x) for x in value])
        elif isinstance(value, Tensor) and value.numel() != 1:
            values[name] = tuple(value.tolist())
        else:
            values[name] = number(value)
    return values


def number(value: Any) -> Any:
    """Return a hyper-parameter as a Python number: a tensor's value, a fraction's, a decimal's.

    Raises:
        TypeError: for anything else; text that spells a number is none.
    """
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, int):
        return value
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"a hyper-parameter must be a number, got {value!r}")
    return float(value)


class HostTable:
    """Coefficient rows computed on the host, one for each (group, step count) that occurs.

    Args:
        rule: the update.
        device: where the rows are read.
        group_of: for each tensor, the index of its group.
        wide: for each tensor, whether its arithmetic is done in float64; in float32 by default.
        with_step: whether the step's number is one more column.
        averages: whether in front of that the weight of the average of the weights is.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        group_of: list[int],
        wide: Sequence[bool] | None = None,
        with_step: bool = False,
        averages: bool = False,
    ) -> None:
        self.rule = rule
        self._with_step = with_step
        self._averages = averages
        self.device = device
        self.group_of = group_of
        self._wide = [False] * len(group_of) if wide is None else wide
        self.row_of: list[int] = []
        # Of each row, the group, the step that the rule reads, and the step's number.
        self._keys: list[tuple[int, float, float]] = []
        self.rows: list[tuple[float, ...]] = []
        # For as many rows as there can be: launches on any stream may still read it, so that it is
        # not to be replaced.
        self._width = rule.n_coefficients + averages + with_step
        shape = len(group_of), self._width
        self.values = torch.empty(shape, dtype=torch.float64, device=device)
        self._used = self.values.view(-1)[:0]
        # Numbers get into an array in a tenth of the time that a new tensor of them takes.
        self._numbers = array("d")
        self._host = torch.empty(0, dtype=torch.float64, device="cpu")

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that launches read."""
        yield self.values

    def partition(self, steps: Sequence[float], numbers: Sequence[float] | None = None) -> None:
        """Give tensors of equal group and step count the same row.

        Args:
            steps: for each tensor, the step that the rule reads.
            numbers: the step's number, where it is a column.
        """
        numbers = numbers if self._with_step and numbers is not None else steps
        first: dict[tuple[int, float, float], int] = {}
        keys = zip(self.group_of, steps, numbers, strict=True)
        self.row_of = [first.setdefault(key, len(first)) for key in keys]
        self._keys = list(first)
        used = len(first) * self._width
        self._used = self.values.view(-1)[:used]
        self._numbers = array("d", bytes(8 * used))
        if used:
            self._host = torch.frombuffer(self._numbers, dtype=torch.float64)

    def advance(self, next_step: Callable[[float], float]) -> None:
        """Count one step more, as the counts that the partition was made by do."""
        # A rule that counts no steps goes by stages, which do not advance.
        counts = self.rule.counts_steps
        self._keys = [
            (index, next_step(step) if counts else step, next_step(number))
            for index, step, number in self._keys
        ]

    def refresh(self, groups: Sequence[Group]) -> None:
        """Recompute every row, and send them to the device."""
        numbers: dict[int, dict[str, Any]] = {}
        self.rows = []
        for index, step, number in self._keys:
            if index not in numbers:
                names = numbers_of(self.rule, groups[index])
                numbers[index] = on_host(groups[index], names)
            row = self.rule.coefficients(numbers[index], step)
            if self._averages:
                row = *row, _weight(numbers[index], number)
            # Written so that nan goes the long way; complex numbers, of roots, have no order.
            if row and not (max(row) <= _LARGEST and min(row) >= -_LARGEST):
                self._check_range(len(self.rows), groups[index], row)
            self.rows.append((*row, number) if self._with_step else row)
        if len(self._numbers):
            self._numbers[:] = array("d", chain.from_iterable(self.rows))
            upload(self._used, self._host)

    def _check_range(self, index: int, group: Group, row: Sequence[float]) -> None:
        """Raise ValueError for a number that the arithmetic of some tensor of the row cannot hold.

        One kind of kernel would make it infinite and the other refuse it, as torch's does, half-way
        through a step. Infinity itself is taken by both.
        """
        if not any(_LARGEST < abs(value) < math.inf for value in row):
            return
        positions = [i for i, own in enumerate(self.row_of) if own == index]
        if all(self._wide[position] for position in positions):
            return
        names = [n for n in self.rule.hyper if any(abs(x) > _LARGEST for x in _flat(group[n]))]
        named = ", ".join(f"{n}={reprlib.repr(group[n])}" for n in names or self.rule.hyper)
        raise ValueError(
            f"param_groups[{self.group_of[positions[0]]}]: {named} is beyond float32, in which the"
            f" step is computed ({_LARGEST:.3g})"
        )


class LiveTable:
    """Coefficient rows formed on the device, one a tensor, from live hyper-parameters.

    Who hands it no kernel (``fusedopt/backends/triton_coefficients.py``) has ``refresh`` form them
    by PyTorch's operations.

    Args:
        rule: the update.
        device: where the rows are.
        group_of: for each tensor, the index of its group; those of a group follow each other.
        groups: all parameter groups.
        with_step: whether the step's number is one more column.
        averages: whether in front of that the weight of the average of the weights is.

    Attributes:
        values: the rows.
        rows: the same, number by number.
        steps: for each tensor, the step that the rule reads.
        formulas: of each group that there is.
        inputs: for each of these, what its formula takes besides the step, and its constants.
        part_of: for each tensor, which of these its group is.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        group_of: list[int],
        groups: Sequence[Group],
        with_step: bool = False,
        averages: bool = False,
    ) -> None:
        self.with_step = with_step
        self._averages = averages
        self.rule = rule
        self.device = device
        self.row_of = list(range(len(group_of)))
        count = len(group_of)
        shape = count, rule.n_coefficients + averages + with_step
        self.values = torch.empty(shape, dtype=torch.float64, device=device)
        self.steps = torch.ones(count, dtype=torch.float64, device=device)
        self._groups = list(dict.fromkeys(group_of))
        places = {index: i for i, index in enumerate(self._groups)}
        self.part_of = [places[index] for index in group_of]
        names = [(*numbers_of(rule, groups[index]), *rule.factors) for index in self._groups]
        self.formulas = [
            _formula(rule, groups[index], own, averages)
            for index, own in zip(self._groups, names, strict=True)
        ]
        width = max([1, *(f.n_inputs + len(f.constants) for f in self.formulas)])
        shape = len(self._groups), width
        self.inputs = torch.zeros(shape, dtype=torch.float64, device=device)
        # What the host knows of them: as one copy to the device, however many groups there are.
        self._numbers = array("d", bytes(8 * self.inputs.numel()))
        self._host = torch.frombuffer(self._numbers, dtype=torch.float64).view(shape)
        for i, formula in enumerate(self.formulas):
            first = i * width + formula.n_inputs
            self._numbers[first : first + len(formula.constants)] = array("d", formula.constants)
        self._inputs = [
            _LiveGroup(groups[index], own, row)
            for index, own, row in zip(self._groups, names, self.inputs, strict=True)
        ]
        if not self._push(groups):
            upload(self.inputs, self._host)
        self.read(groups)
        self._tape: list[_Entry] | None = None

    @cached_property
    def rows(self) -> list[tuple[Tensor, ...]]:
        """The rows, number by number."""
        return [tuple(row.unbind()) for row in self.values.unbind()]

    def _record(self) -> list[_Entry]:
        """Do all of it once, and note what is to be done again, into the same memory."""
        tape: list[_Entry] = []
        for part, formula in enumerate(self.formulas):
            start = self.part_of.index(part)
            rows = slice(start, start + self.part_of.count(part))
            given = self.inputs[part, : formula.n_inputs + len(formula.constants)]
            # Where nothing is made of it, there is no number of the step, either.
            number = self.values[rows, -1] if self.with_step else self.steps[rows]
            known: list[Tensor] = [self.steps[rows], number, *given.unbind()]
            for name, a, b in zip(formula.operations, formula.left, formula.right, strict=True):
                function, arguments = _FUNCTIONS[name], (known[a], known[b])
                known.append(function(*arguments))
                tape.append((function, arguments, known[-1]))
            for column, place in enumerate(formula.results):
                tape.append((_copy, (known[place],), self.values[rows, column]))
        return tape

    def memory(self) -> Iterator[Tensor]:
        """List the tensors that a step reads and writes."""
        yield self.values
        yield self.steps
        yield self.inputs
        for _, arguments, out in self._tape or ():
            yield from arguments
            yield out

    def count(self, steps: Tensor) -> None:
        """Take the counts of this step, one a tensor, on the device."""
        if self.rule.counts_steps:
            self.steps.copy_(steps)
        if self.with_step:
            self.values[:, -1].copy_(steps)

    def push(self, groups: Sequence[Group]) -> None:
        """Send hyper-parameters that are Python numbers to the device, where they changed."""
        self._push(groups)

    def _push(self, groups: Sequence[Group]) -> bool:
        """Do so; return whether all that the host knows was sent."""
        changed = [
            (row, live, place, wanted)
            for row, (index, live) in enumerate(zip(self._groups, self._inputs, strict=True))
            for place, wanted in live.changes(groups[index])
        ]
        for row, live, place, wanted in changed:
            live.pushed[place] = self._numbers[row * self.inputs.shape[1] + place] = wanted
        if len(changed) > 1:
            # Over tensors, too, which are read before anything is made of them.
            upload(self.inputs, self._host)
        elif changed:
            _, live, place, wanted = changed[0]
            live.scalars[place].fill_(wanted)
        return len(changed) > 1

    def read(self, groups: Sequence[Group]) -> None:
        """Take hyper-parameters that are tensors on the device."""
        pairs = [
            pair
            for index, live in zip(self._groups, self._inputs, strict=True)
            for pair in live.pairs(groups[index])
        ]
        # Into host memory that is read at once, the copy has to have arrived.
        later = self.device.type != "cpu"
        if len(pairs) == 1:
            pairs[0][0].copy_(pairs[0][1], non_blocking=later)
        elif pairs:
            targets, values = zip(*pairs, strict=True)
            torch._foreach_copy_(targets, values, non_blocking=later)

    def refresh(self, groups: Sequence[Group]) -> None:
        """Recompute every row from ``self.steps`` and the current hyper-parameters."""
        self.read(groups)
        if self._tape is None:
            self._tape = self._record()
        for function, arguments, out in self._tape:
            function(*arguments, out=out)


def _formula(rule: Rule, group: Group, names: Sequence[str], averages: bool) -> Formula:
    counts = {name: sum(1 for _ in _flat(group[name])) for name in names}

    def row(group: Mapping[str, Any], step: Any, number: Any) -> tuple[Any, ...]:
        found = tuple(rule.coefficients(dict(group), step))
        return (*found, _weight(dict(group), number)) if averages else found

    return record(row, group, counts)


class _LiveGroup:
    """The numeric hyper-parameters of one group, as float64 scalars on the device.

    Args:
        group: the group.
        hyper: names of its entries.
        row: where they go, one after the other.

    Attributes:
        scalars: the places.
        pushed: of each, the number that the host has sent; None where a tensor is read.
    """

    def __init__(self, group: Group, hyper: Sequence[str], row: Tensor) -> None:
        self._counts = [(name, sum(1 for _ in _flat(group[name]))) for name in hyper]
        self._device = row.device
        self.scalars = row.unbind()
        self.pushed: list[float | None] = [None] * len(self.scalars)

    def _is_live(self, value: Any) -> bool:
        # A tensor on the host, where parameters are on a GPU, is a number like any other.
        return isinstance(value, Tensor) and (
            value.device.type != "cpu" or self._device.type == "cpu"
        )

    def changes(self, group: Group) -> Iterator[tuple[int, float]]:
        """Yield the Python numbers that are not those on the device, with their places."""
        first = 0
        for name, count in self._counts:
            values = list(_flat(group[name]))
            plural = isinstance(group[name], (tuple, list))
            if len(values) != count or (plural and len(values) == 1):
                raise TypeError(f"{name} has another number of entries than it had")
            for place, value in enumerate(values, first):
                if self._is_live(value):
                    # Read when the step is under way: nothing may be wrong with it then.
                    if value.numel() != 1 or value.is_meta or value.is_complex():
                        raise TypeError(f"{name} must be a number, got {value!r}")
                    # A number that comes after it is one that is not there.
                    self.pushed[place] = None
                    continue
                wanted = float(number(value))
                if wanted == self.pushed[place]:
                    continue
                if is_capturing(self._device):
                    raise RuntimeError(
                        f"{name} changed from {self.pushed[place]} to {value} since the last"
                        " step, and a CUDA graph is being captured: call"
                        " optimizer.push_hyperparameters() before the capture"
                    )
                yield place, wanted
            first += count

    def pairs(self, group: Group) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is read at every step: where it goes, and the tensor that it is."""
        values = (value for name, _ in self._counts for value in _flat(group[name]))
        for scalar, value in zip(self.scalars, values, strict=False):
            if self._is_live(value):
                yield scalar, value.reshape(())


def _weight(group: Group, number: Any) -> Any:
    """Return the weight of a group's average of the weights; any where it has none."""
    averages = group.get(weight_average.DECAY) is not None
    return weight_average.weight(group, number) if averages else 1.0


_Entry = tuple[Callable[..., Any], tuple[Tensor, ...], Tensor]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor) and value.dim() == 1 and len(value) != 1:
        return iter(value.unbind())
    return iter(value) if isinstance(value, (tuple, list)) else iter((value,))


def _copy(source: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(source)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "gt": torch.gt,
}  # fmt: skip


Table = HostTable | LiveTable
Groups = Sequence[Mapping[str, Any]]
