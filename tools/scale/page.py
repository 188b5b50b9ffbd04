"""The page: conclusions, tables, assumptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.gpu.result import FUSED

from . import tables
from .cluster import MICRO
from .costs import Layout, Step
from .models import MODELS, Model
from .tables import MILLI, MOST, by_tensor, host, memory

GPUS = tuple(n for n in (2**i for i in range(3, 32)) if n <= MOST)
PICTURE = "docs/pictures/scale.png"


def fsdp2(model: Model, gpus: int) -> Step:
    """Return the step where every parameter is cut over all GPUs."""
    return Step(model, Layout(gpus, gpus))


def first(model: Model, holds: Callable[[Step], bool]) -> int | None:
    """Return the least number of GPUs at which something holds of the step, or None."""
    return next((n for n in GPUS if holds(fsdp2(model, n))), None)


def text() -> str:
    """Return the page between its markers, in Markdown."""
    parts = [
        conclusions(),
        f"![Time of each part of a step against the number of GPUs]({PICTURE})",
        "## What gives first, under FSDP2",
        *gives(),
        "## A step, in the process that has the most to do",
        *tables.steps(),
        "## Per-sample squares",
        *tables.squares(),
        "## Models and bytes",
        *tables.models(),
        "## Measured",
        *tables.sources(),
        "## Assumed: not measured by this project",
        *tables.assumptions(),
    ]
    return "\n\n".join(parts)


def conclusions() -> str:
    """Say what the tables come to."""
    small, large = MODELS[0], MODELS[-1]
    spread = [fsdp2(model, MOST) for model in MODELS]
    worst = max(s.seconds / s.training for s in spread)
    slow = [first(m, _host_is_longer) for m in (small, large)]
    norm, ring = spread[-1].norm, by_tensor(spread[-1]).latency
    shared = by_tensor(Step(large, Layout(MOST, 512))).latency
    each = norm * len(large.shapes)
    return (
        "Nothing in clipping and update gives: with every parameter cut over"
        f" {MOST:,} GPUs a step takes at most {100 * worst:.2f} % of the arithmetic of a training"
        " step of one sequence a GPU. Of its parts **the host's time gives first**: it does not"
        f" shrink with the shards, and is more than the memory's from {slow[0]:,} GPUs on for"
        f" {small.name} and from {slow[1]:,} on for {large.name}; against it there are one launch"
        " for all tensors and at most one call of Python's a tensor. The norm takes"
        f" {norm / MICRO:.0f} µs on {MOST:,} GPUs, because it is one collective of one number; one"
        f" for each tensor of {large.name} would take {each / MILLI:.0f} ms. **What does give are"
        f" per-sample squares over a long ring**: cut over {MOST:,} GPUs, the hops of their"
        f" reduce-scatters take {ring:.0f} s for {large.name}; with HSDP over 512 it is"
        f" {shared:.1f} s. Memory gives at the other end, where there are few GPUs. All of it is"
        " arithmetic: nothing here has run on more than one GPU."
    )


def _host_is_longer(step: Step) -> bool:
    return step.host > step.passes


def gives() -> Iterator[str]:
    """From how many GPUs on each part is the larger one."""
    questions: tuple[tuple[str, Callable[[Step], bool], str], ...] = (
        (
            "memory is enough: without squares",
            lambda s: s.peak(squares=False) < memory(),
            "no copy of a gradient is made for clipping",
        ),
        (
            "memory is enough: with squares",
            lambda s: s.peak(squares=True) < memory(),
            "4 bytes a local parameter; whole squares exist for one unit at a time",
        ),
        (
            "the host takes longer than the memory",
            _host_is_longer,
            "[at most one call of Python's a tensor](bench/baselines/host.json), for gradients that"
            " have moved; it runs ahead during the backward pass",
        ),
        (
            "the same with torch's fused step",
            lambda s: host(s.model, FUSED) > s.passes,
            "for comparison; without its clipping",
        ),
        (
            "the norm's collective takes longer than the memory",
            lambda s: s.norm > s.passes,
            "one all-reduce of one float64 for all tensors and meshes, on which no host waits",
        ),
        (
            "launches take longer than the memory",
            lambda s: s.launching > s.passes,
            "one update for all tensors; CUDA graphs",
        ),
        (
            "squares: hops take longer than bytes",
            lambda s: by_tensor(s).latency > by_tensor(s).transfer,
            "HSDP bounds the ring. **Not done**: one collective a unit and not a tensor",
        ),
        (
            "squares take longer than the training step",
            lambda s: by_tensor(s).seconds > s.training,
            "the same; one synchronisation a step with several micro-batches",
        ),
        (
            "the whole step is over 1 % of the training step",
            lambda s: s.seconds > 0.01 * s.training,
            "-",
        ),
    )
    rows = []
    for what, holds, done in questions:
        found = [first(m, holds) for m in MODELS]
        rows.append([what, *("never" if n is None else f"{n:,}" for n in found), done])
    names = [model.name for model in MODELS]
    yield f"From how many GPUs on, of {GPUS[0]} to {MOST:,} in powers of two:"
    yield tables.table(["", *names, "what was done about it"], rows, (0, 4))
