"""Two optimizers, timed in turn within one run: ratios survive a machine that changes speed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fusedopt import backends
from fusedopt.backends import triton as backend


def make_params(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Allocate parameters with gradients, the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        params.append(p)
    return params


@contextmanager
def without_launches() -> Iterator[list[int]]:
    """Leave the launch out, and list the programs that each would have run.

    The Triton backend then takes tensors on the CPU, on a machine with a GPU too.
    """
    programs: list[int] = []
    before = backend.launch, backends._triton_runs_on
    backend.launch = lambda kernel, count, *_, **__: programs.append(count)
    backends._triton_runs_on = lambda device: (True, "nothing is launched")
    try:
        yield programs
    finally:
        backend.launch, backends._triton_runs_on = before


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    of: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Time of ``ours`` over time of ``theirs``, called in turn after a warm-up.

    Args:
        ours: in the numerator.
        theirs: in the denominator.
        rounds: how often each is called.
        of: what of the times of one is compared. The median is what a user sees; the minimum is
            what other processes on the machine change least.
    """
    samples: dict[bool, list[float]] = {True: [], False: []}
    for is_ours in (True, False):
        (ours if is_ours else theirs)()
    # Other people's garbage is not either one's cost; what each makes itself still counts.
    gc.collect()
    for _ in range(rounds):
        for is_ours in (True, False):
            function = ours if is_ours else theirs
            start = time.perf_counter()
            function()
            samples[is_ours].append(time.perf_counter() - start)
    return of(samples[True]) / of(samples[False])
