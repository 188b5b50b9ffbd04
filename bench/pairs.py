"""Two optimizers, timed in turn within one run: ratios survive a machine that changes speed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def make_params(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Allocate parameters with gradients, the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        params.append(p)
    return params


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Median time of ``ours`` over median time of ``theirs``, called in turn after a warm-up."""
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
    return statistics.median(samples[True]) / statistics.median(samples[False])
