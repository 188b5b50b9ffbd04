"""Who is compared: this library, and the ways that torch has; the others are in ``peers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import fusedopt

from . import OURS, traffic
from .arms import Arm, Unsupported, loss_scaler, protocol, seed_states
from .gate import max_norm
from .peers import PEERS
from .problem import SAMPLES, Problem


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        name: on the command line and in results.
        title: for tables and pictures.
        make: from a problem, whether to clip, and a loss scale or None, what is timed; raises
            ``Unsupported`` where there is no such thing.
        bytes_per_parameter: from the same, what its operations read and write.
    """

    name: str
    title: str
    make: Callable[[Problem, bool, float | None], Arm]
    bytes_per_parameter: Callable[[Problem, bool, bool], float]


def backend_of(device: torch.device) -> str:
    """Return the backend that is measured on a device."""
    return "reference" if device.type == "cpu" else "triton"


def ours(problem: Problem, clip: bool, scale: float | None) -> Arm:
    """Return this library's step, which clips and unscales in its launch."""
    row = problem.row
    options: dict[str, Any] = {"backend": backend_of(problem.device)}
    if clip and row.takes_pairs:
        raise Unsupported("SVAG does not cover clipping")
    if clip:
        options["clip"] = fusedopt.GlobalNorm(max_norm(problem))
    if row.takes_squares:
        options["statistics"] = fusedopt.BackpackSquares(batch_size=SAMPLES)
    optimizer = row.ours(problem.params, **row.arguments, **options)
    counts = torch.device("cpu") if row.rule.counts_steps else None
    seed_states(optimizer, problem, counts)
    for group in optimizer.param_groups:
        # Who unscales, as in torch: the scaler in front of the step, or the step.
        group["fused"] = scale is not None
    scaler = None if scale is None else loss_scaler(problem.device, scale)
    arm = protocol(optimizer, problem.params, optimizer.step, None, scaler)
    return arm if row.ell is None else _paired(arm, optimizer, row.ell, problem)


def _paired(arm: Arm, optimizer: fusedopt.FusedOptimizer, ell: float, problem: Problem) -> Arm:
    """Return SVAG's step, with the first gradient held just before."""
    svag = fusedopt.SVAG(optimizer, ell)

    def step() -> None:
        problem.attach_held()
        svag.hold()
        problem.attach_gradients()
        arm.step()

    return replace(arm, step=step)


def _torch(problem: Problem, clip: bool, scale: float | None, **how: bool) -> Arm:
    row = problem.row
    if row.theirs is None:
        raise Unsupported(f"torch has no {row.name}")
    optimizer = row.theirs(problem.params, **row.arguments, **how)
    fused = how.get("fused", False)
    has_steps = row.theirs is not torch.optim.SGD
    device = problem.device if fused else torch.device("cpu")
    seed_states(optimizer, problem, device if has_steps else None)
    bound = max_norm(problem) if clip else None
    scaler = None if scale is None else loss_scaler(problem.device, scale)
    return protocol(optimizer, problem.params, optimizer.step, bound, scaler)


def for_loop(problem: Problem, clip: bool, scale: float | None) -> Arm:
    """Return torch's step, tensor by tensor."""
    return _torch(problem, clip, scale, foreach=False)


def foreach(problem: Problem, clip: bool, scale: float | None) -> Arm:
    """Return torch's step, operation by operation for all tensors."""
    return _torch(problem, clip, scale, foreach=True)


def fused(problem: Problem, clip: bool, scale: float | None) -> Arm:
    """Return torch's step in kernels of its own."""
    if problem.row.theirs is not None and not problem.row.fused:
        raise Unsupported(f"torch has no fused {problem.row.name}")
    return _torch(problem, clip, scale, fused=True)


def compiled(problem: Problem, clip: bool, scale: float | None) -> Arm:
    """Return torch's step, compiled; clipping is not part of it, as it is not in training loops."""
    if scale is not None:
        raise Unsupported("GradScaler calls the optimizer's own step, which is not compiled")
    arm = _torch(problem, False, None, foreach=True)
    run = torch.compile(arm.optimizer.step)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]

    def step() -> None:
        run()
        # At its limit of recompilations, torch runs the eager step without a word.
        if graphs["unique_graphs"] == before:
            raise Unsupported("torch has compiled nothing")

    bound = max_norm(problem) if clip else None
    return protocol(arm.optimizer, problem.params, step, bound, None)


_TORCH = (
    ("torch-for-loop", "torch for-loop", for_loop, traffic.eager),
    ("torch-foreach", "torch foreach", foreach, traffic.eager),
    ("torch-fused", "torch fused", fused, traffic.eager),
    ("torch-compiled", "torch.compile", compiled, traffic.one_pass),
)


def _contenders() -> Mapping[str, Contender]:
    own = Contender(OURS, "fusedopt", ours, traffic.ours)
    rest = [Contender(name, title, make, count(make)) for name, title, make, count in _TORCH]
    others = []
    for name, peer in PEERS.items():
        count = traffic.one_pass_on_gpu if peer.eager_on_cpu else traffic.one_pass
        others.append(Contender(name, name, peer.make, count(peer.make)))
    return {contender.name: contender for contender in (own, *rest, *others)}


CONTENDERS = _contenders()
