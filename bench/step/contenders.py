"""Who is compared: this library, and the ways that torch has; the others are in ``external``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import fusedopt
from bench.harness.contenders import backend_of

from . import OURS, bytes_moved
from .correctness import max_norm
from .external import LIBRARIES
from .protocol import TimedStep, Unsupported, loss_scaler, seed_states, timed_step
from .workload import SAMPLES, Workload


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        name: on the command line and in results.
        title: for tables and pictures.
        make: from a workload, whether to clip, and a loss scale or None, what is timed; raises
            ``Unsupported`` where there is no such thing.
        bytes_per_parameter: from the same, what its operations read and write.
    """

    name: str
    title: str
    make: Callable[[Workload, bool, float | None], TimedStep]
    bytes_per_parameter: Callable[[Workload, bool, bool], float]


def ours(workload: Workload, clip: bool, scale: float | None) -> TimedStep:
    """Return this library's step, which clips and unscales in its launch."""
    row = workload.row
    options: dict[str, Any] = {"backend": backend_of(workload.device)}
    if clip and row.takes_pairs:
        raise Unsupported("SVAG does not cover clipping")
    if clip:
        options["clip"] = fusedopt.GlobalNorm(max_norm(workload))
    if row.takes_squares:
        options["statistics"] = fusedopt.BackpackSquares(batch_size=SAMPLES)
    optimizer = row.ours(workload.params, **row.arguments, **options)
    counts = torch.device("cpu") if row.rule.counts_steps else None
    seed_states(optimizer, workload, counts)
    for group in optimizer.param_groups:
        # Who unscales, as in torch: the scaler in front of the step, or the step.
        group["fused"] = scale is not None
    scaler = None if scale is None else loss_scaler(workload.device, scale)
    timed = timed_step(optimizer, workload.params, optimizer.step, None, scaler)
    return timed if row.ell is None else _paired(timed, optimizer, row.ell, workload)


def _paired(
    timed: TimedStep, optimizer: fusedopt.FusedOptimizer, ell: float, workload: Workload
) -> TimedStep:
    """Return SVAG's step, with the first gradient held just before."""
    svag = fusedopt.SVAG(optimizer, ell)

    def step() -> None:
        workload.attach_held()
        svag.hold()
        workload.attach_gradients()
        timed.step()

    return replace(timed, step=step)


def _torch(workload: Workload, clip: bool, scale: float | None, **how: bool) -> TimedStep:
    row = workload.row
    if row.theirs is None:
        raise Unsupported(f"torch has no {row.name}")
    optimizer = row.theirs(workload.params, **row.arguments, **how)
    fused = how.get("fused", False)
    has_steps = row.theirs is not torch.optim.SGD
    device = workload.device if fused else torch.device("cpu")
    seed_states(optimizer, workload, device if has_steps else None)
    bound = max_norm(workload) if clip else None
    scaler = None if scale is None else loss_scaler(workload.device, scale)
    return timed_step(optimizer, workload.params, optimizer.step, bound, scaler)


def for_loop(workload: Workload, clip: bool, scale: float | None) -> TimedStep:
    """Return torch's step, tensor by tensor."""
    return _torch(workload, clip, scale, foreach=False)


def foreach(workload: Workload, clip: bool, scale: float | None) -> TimedStep:
    """Return torch's step, operation by operation for all tensors."""
    return _torch(workload, clip, scale, foreach=True)


def fused(workload: Workload, clip: bool, scale: float | None) -> TimedStep:
    """Return torch's step in kernels of its own."""
    if workload.row.theirs is not None and not workload.row.fused:
        raise Unsupported(f"torch has no fused {workload.row.name}")
    return _torch(workload, clip, scale, fused=True)


def compiled(workload: Workload, clip: bool, scale: float | None) -> TimedStep:
    """Return torch's step, compiled; clipping is not part of it, as it is not in training loops."""
    if scale is not None:
        raise Unsupported("GradScaler calls the optimizer's own step, which is not compiled")
    timed = _torch(workload, False, None, foreach=True)
    run = torch.compile(timed.optimizer.step)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]

    def step() -> None:
        run()
        # At its limit of recompilations, torch runs the eager step without a word.
        if graphs["unique_graphs"] == before:
            raise Unsupported("torch has compiled nothing")

    bound = max_norm(workload) if clip else None
    return timed_step(timed.optimizer, workload.params, step, bound, None)


_TORCH = (
    ("torch-for-loop", "torch for-loop", for_loop, bytes_moved.eager),
    ("torch-foreach", "torch foreach", foreach, bytes_moved.eager),
    ("torch-fused", "torch fused", fused, bytes_moved.eager),
    ("torch-compiled", "torch.compile", compiled, bytes_moved.one_pass),
)


def _contenders() -> Mapping[str, Contender]:
    own = Contender(OURS, "fusedopt", ours, bytes_moved.ours)
    rest = [Contender(name, title, make, count(make)) for name, title, make, count in _TORCH]
    others = []
    for name, library in LIBRARIES.items():
        count = bytes_moved.one_pass_on_gpu if library.eager_on_cpu else bytes_moved.one_pass
        others.append(Contender(name, name, library.make, count(library.make)))
    return {contender.name: contender for contender in (own, *rest, *others)}


CONTENDERS = _contenders()
