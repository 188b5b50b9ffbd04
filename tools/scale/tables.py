"""The tables of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

from bench.gpu.result import OURS

from . import measured
from .cluster import ASSUMPTIONS, GIGA, MICRO, Cost
from .costs import FLOAT, UNSHARDED, Layout, Step, kept_bytes, kernel_bytes
from .models import MODELS, Model

MILLI = 1e-3
# Of GPUs, the most.
MOST = 2**14
LAYOUTS = (
    *(Layout(n, n) for n in (8, 64, 512, 4096, MOST)),
    *(Layout(MOST, shards) for shards in (8, 64, 512)),
)


@cache
def by_tensor(step: Step) -> Cost:
    """Return what squares take that are reduced a tensor at a time, as they become ready."""
    return step.squares(map(math.prod, step.model.shapes))


def by_unit(step: Step) -> Cost:
    """Return the same for a unit at a time, as FSDP2 reduces gradients."""
    return step.squares(step.model.units)


def memory() -> float:
    """Return the bytes of a GPU."""
    return measured.device(measured.read(measured.GPU)).memory


def host(model: Model, contender: str = OURS) -> float:
    """Return the host's seconds for a model."""
    return measured.host_seconds(measured.read(measured.HOST), len(model.shapes), contender)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """Return a table.

    Args:
        headings: of the columns.
        rows: below.
        text: columns that are no numbers.
    """
    marks = ["---" if i in text else "---:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, marks, *rows])


def steps() -> Iterator[str]:
    """Bytes, launches, latencies and times."""
    yield (
        "AdamW in float32 with `GlobalNorm`. FSDP2 cuts over all GPUs, HSDP over as many as are"
        " named. *Uneven*: elements of the first process over the mean, since rows are dealt out"
        " whole. *Memory*: the pass over everything at the measured bandwidth. *Resident*:"
        " parameter, gradient, states and tables; in brackets the peak while the largest unit is"
        " whole, without activations, in bold where the GPU has less. *Step*: the longer of host"
        " and device, as a share of the training step's arithmetic."
    )
    headings = (
        "model", "GPUs", "", "uneven", "moved, GB", "memory, ms", "launches", "µs of them",
        "host, ms", "norm, µs", "resident, GB", "tables, MB", "step, %",
    )  # fmt: skip
    rows = []
    for model in MODELS:
        for layout in LAYOUTS:
            s = Step(model, layout)
            peak = f"{s.peak(squares=False) / GIGA:.1f}"
            peak = f"**{peak}**" if s.peak(squares=False) > memory() else peak
            rows.append([
                model.name, f"{layout.gpus:,}", layout.name,
                f"{s.elements * layout.shards / model.parameters:.2f}", f"{s.moved / GIGA:.3g}",
                f"{s.passes / MILLI:.3g}", f"{s.launches}", f"{s.launching / MICRO:.0f}",
                f"{s.host / MILLI:.2f}", f"{s.norm / MICRO:.0f}",
                f"{s.resident(squares=False) / GIGA:.1f} ({peak})", f"{s.tables / 1e6:.3g}",
                f"{100 * s.seconds / s.training:.2g}",
            ])  # fmt: skip
    yield table(headings, rows, (0, 1, 2))
    yield (
        "The norm's payload is 8 bytes a process. Over a ring it would take a hop for each process"
        " and back; NCCL takes a tree for so few bytes."
    )


def squares() -> Iterator[str]:
    """What squares add."""
    yield (
        "Counted is a reduce-scatter of float32 squares beside the gradient's, a tensor at a time,"
        " and under HSDP an all-reduce of the shard over the replicas. They run during the backward"
        " pass; the last column is all of the training step's arithmetic. The gradient's own"
        " collectives (as many bytes in float32, half in bfloat16, a unit at a time) are there with"
        " and without."
    )
    headings = (
        "model", "GPUs", "", "sent, GB", "bytes, s", "collectives", "hops, s",
        "hops a unit at a time, s", "peak, GB", "training step, s",
    )  # fmt: skip
    rows = []
    for model in MODELS:
        for layout in LAYOUTS:
            s = Step(model, layout)
            own, units = by_tensor(s), by_unit(s)
            collectives = len(model.shapes) * (1 + (layout.shards < layout.gpus))
            peak = f"{s.peak(squares=True) / GIGA:.1f}"
            rows.append([
                model.name, f"{layout.gpus:,}", layout.name, f"{own.sent / GIGA:.4g}",
                f"{own.transfer:.3g}", f"{collectives:,}", f"{own.latency:.3g}",
                f"{units.latency:.3g}",
                f"**{peak}**" if s.peak(squares=True) > memory() else peak,
                f"{s.training:.3g}",
            ])  # fmt: skip
    yield table(headings, rows, (0, 1, 2))


def models() -> Iterator[str]:
    """What is counted."""
    rows = [
        [
            model.name,
            f"{model.layers} x {model.width} / {model.hidden}",
            f"{len(model.shapes):,}",
            f"{model.parameters:,}",
            f"{model.published:.4g}",
            f"{100 * (model.parameters / model.published - 1):+.2f} %",
            f"{len(model.units)}",
            f"{max(model.units) / GIGA:.2f}",
        ]
        for model in MODELS
    ]
    headings = (
        "model", "layers x width / hidden", "tensors", "parameters", "published", "difference",
        "units", "the largest, 10^9",
    )  # fmt: skip
    yield (
        "Llama 3 (arXiv 2407.21783, table 3): 8 heads of keys and values, 128,256 tokens, an output"
        " matrix of its own. A unit is a block, or what is outside of the blocks."
    )
    yield table(headings, rows, (0, 1))
    cases = (
        ("AdamW, float32", "Adam", "fp32"),
        ("AdamW, bfloat16", "Adam", "bf16"),
        ("BatchDecoupledAdam, float32", "BatchDecoupledAdam", "fp32"),
    )
    rows = []
    for name, rule, dtype in cases:
        update, norm = kernel_bytes(rule, dtype)
        rows.append([name, f"{update:g}", f"{norm:g}", f"{kept_bytes(rule, dtype)}"])
    yield table(("bytes a parameter", "update", "norm", "kept"), rows, (0,))
    yield (
        f"While a unit is whole it takes {UNSHARDED} bytes a parameter of it besides, and with"
        f" squares {UNSHARDED + FLOAT}: its parameters and the next unit's in bfloat16, its"
        " gradient in bfloat16 and the float32 copy that is reduced, squares in float32."
    )


def sources() -> Iterator[str]:
    """What was measured, where, and by which command."""
    gpu = measured.device(measured.read(measured.GPU))
    facts = measured.read(measured.HOST)["environment"]
    rows = [
        ["bytes of update and norm", "table above", "`make codegen`, off the machine code"],
        [
            f"{gpu.name}: bandwidth of a clipped step",
            f"{gpu.bandwidth / GIGA:.0f} GB/s",
            f"`python -m fusedopt bench step`, [{measured.SMALL} and {measured.LARGE}]"
            f"({measured.GPU}), the line through both",
        ],
        ["of that line, what size does not change", f"{gpu.fixed / MICRO:.1f} µs", "the same"],
        ["launches of a clipped step on one GPU", f"{gpu.launches}", "the same, by the profiler"],
        ["memory of the GPU", f"{gpu.memory / GIGA:.1f} GB", "the same"],
        [
            f"host, {', '.join(f'{len(m.shapes):,}' for m in MODELS)} tensors",
            " / ".join(f"{host(m) / MILLI:.2f}" for m in MODELS) + " ms",
            f"`python -m fusedopt bench host` on two cores of an {facts['device']}, Python"
            f" {facts['python']}, torch {facts['torch']} ([result]({measured.HOST})): AdamW,"
            " between its numbers of tensors, with gradients that have moved;"
            " [its ratios](bench/baselines/host.json) are held by `make regression`",
        ],
    ]
    yield table(("", "", "by"), rows, (0, 1, 2))
    yield (
        "The host was measured on plain tensors and without clipping; what DTensors take more is"
        " not in it. Below the smaller of the two cases the line is drawn on. Two launches of"
        " [norm.py](fusedopt/step/norm.py) that there are for several processes alone were counted"
        " in the interpreter (tests/tools/test_scale_launches.py)."
    )


def assumptions() -> Iterator[str]:
    """Every number of others."""
    rows = [[a.what, f"{a.value:g}{' ' + a.unit if a.unit else ''}", a.source] for a in ASSUMPTIONS]
    yield table(("", "", "source"), rows, (0, 1, 2))
    yield (
        "A collective takes a base, a time a hop, and its bytes over the bandwidth of the members'"
        " links in a node. A tree goes through the GPUs of a node in a chain and through nodes by"
        " levels, up and down; a ring of n takes n - 1 hops to reduce and scatter, one a node over"
        " the network. Taken for granted besides: nodes are filled by neighbours, shard groups lie"
        " within as few nodes as they can, nobody else is on the network, no process is late, and"
        " a training step is six operations a parameter and token. A model of these numbers of"
        " GPUs is cut by tensor and pipeline parallelism as well, which makes rings shorter."
    )
