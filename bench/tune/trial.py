"""The update kernel in a given configuration, on tensors of its own, as an optimizer does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from unittest import mock

import torch
from torch import Tensor

from fusedopt.backends import Entries, prepare
from fusedopt.coefficients import HostTable
from fusedopt.kernels import launch_config
from fusedopt.kernels.launch_config import LaunchConfig

from .candidates import Work

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@contextmanager
def forced(candidate: LaunchConfig) -> Iterator[None]:
    """Make launches that are prepared in here take a configuration, whatever the table says."""
    with mock.patch.object(launch_config, "update_launch_config", lambda *_: candidate):
        yield


class Trial:
    """Tensors of an entry's types, and updates of them in any configuration.

    Args:
        entry: rule, types and hyper-parameters.
        sizes: elements of each tensor.
        device: where they live.
    """

    def __init__(self, entry: Work, sizes: Sequence[int], device: torch.device) -> None:
        self.entry = entry
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        n_inputs = len(entry.rule.degrees)
        self.sizes = sizes
        params, *others = (
            [
                _values(size, DTYPES[kind], i, n_inputs, entry.rule.degrees, generator)
                for size in sizes
            ]
            for i, kind in enumerate(entry.dtypes)
        )
        inputs, states = others[:n_inputs], others[n_inputs:]
        options = entry.rule.options(entry.group)
        self.tensors = Entries(range(len(sizes)), params, inputs, states, options)

    def update(self, candidate: LaunchConfig) -> Callable[[], None]:
        """Return what updates all tensors once, at the third step of a training."""
        rule = self.entry.rule
        with forced(candidate):
            part = prepare("triton", rule, self.device, [self.tensors])
        table = HostTable(rule, self.device, [0] * len(self.sizes))
        table.partition([3.0] * len(self.sizes))
        table.refresh([self.entry.group])
        control = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64, device=self.device)
        inputs = self.tensors.inputs
        part.move_inputs(inputs)
        return lambda: part.update(inputs, table, control)

    def written(self) -> list[Tensor]:
        """Return parameters and states."""
        rows = zip(self.tensors.params, *self.tensors.states, strict=True)
        return list(chain.from_iterable(rows))


def _values(
    size: int,
    dtype: torch.dtype,
    operand: int,
    n_inputs: int,
    degrees: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    values = torch.empty(size, dtype=dtype, device=generator.device)
    # Squares, and averages of them, which states may be, are not negative.
    if operand > n_inputs or (operand and degrees[operand - 1] == 2):
        return values.uniform_(0.5, 1.5, generator=generator)
    return values.normal_(generator=generator)


def differs(
    entry: Work, candidate: LaunchConfig, device: torch.device, steps: int = 2
) -> str | None:
    """Say how a configuration's results differ from the default's, if not a bit does: None.

    Args:
        entry: rule and types.
        candidate: block and threads.
        device: where to run.
        steps: updates of the same tensors.
    """
    sizes = (2 * candidate.block + 77, candidate.block, 3)
    results = []
    for one in (launch_config.default(aligned=True), candidate):
        trial = Trial(entry, sizes, device)
        before = [tensor.clone() for tensor in trial.written()]
        update = trial.update(one)
        for _ in range(steps):
            update()
        results.append(trial.written())
    if any(torch.equal(a, b) for a, b in zip(results[0], before, strict=True)):
        return "the default changes nothing"
    for ours, theirs in zip(*results, strict=True):
        if not torch.equal(ours, theirs):
            count = int((ours != theirs).sum())
            return f"{count} of {ours.numel()} elements are not the default's"
    return None
