"""Host time of clipping and step() over sharded parameters: ``python -m bench.step.sharded``.

Launch and collective are left out: ranks are those of torch's fake process group, whose collectives
do nothing, and the Triton backend's launch is. So the figures are what the host does before the
device has work, which is what a step of thousands of small shards waits for.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fusedopt
from bench.harness.contenders import first_line

from . import OURS
from .host import stub

WORLD = 8
SHAPE = (8, 8)
COUNTS = (10, 100, 1000, 20_000)
# Above it, torch's first clipping takes minutes: its time grows faster than the number of tensors.
THEIRS = 1000
TORCH = "torch-fused"
PLAIN, ONE, THREE = "plain", "one mesh", "three meshes and plain"
Make = Callable[[int], torch.Tensor]
Step = Callable[[], object]


def placements() -> dict[str, Make]:
    """Return for each way to place parameters what makes the i-th one, or its gradient."""
    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("replicate", "shard"))
    meshes = [line, square, square["shard"], None]

    def place(mesh: Any) -> torch.Tensor:
        local = torch.randn(SHAPE)
        if mesh is None:
            return local
        return DTensor.from_local(local, mesh, [Shard(0)] * mesh.ndim, run_check=False)

    return {
        PLAIN: lambda i: place(None),
        ONE: lambda i: place(line),
        THREE: lambda i: place(meshes[i % len(meshes)]),
    }


def parameters(count: int, make: Make) -> list[nn.Parameter]:
    """Make parameters with gradients."""
    params = [nn.Parameter(make(i)) for i in range(count)]
    for i, p in enumerate(params):
        p.grad = make(i)
    return params


def ours(params: Sequence[nn.Parameter]) -> Step:
    """Clip and step within one pass."""
    clip = fusedopt.GlobalNorm(1.0)
    return fusedopt.AdamW(params, clip=clip, backend="triton").step


def theirs(params: Sequence[nn.Parameter]) -> Step:
    """Clip and step as torch does."""
    optimizer = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[Sequence[nn.Parameter]], Step]] = {OURS: ours, TORCH: theirs}


def row(contender: str, placement: str, count: int, make: Make, rounds: int) -> dict[str, Any]:
    """Time the first call and later ones, in microseconds a parameter."""
    found: dict[str, Any] = {"contender": contender, "placement": placement, "tensors": count}
    found |= {"first_us": None, "later_us": None, "launches": None, "reason": None}
    calls = stub()
    try:
        # What is made once a process: imports, and what DTensor remembers of kinds of calls.
        CONTENDERS[contender](parameters(8, make))()
        step = CONTENDERS[contender](parameters(count, make))
        gc.collect()
        calls.clear()
        times = [_seconds(step) for _ in range(1 + rounds)]
    except RuntimeError as error:
        return found | {"reason": first_line(error)}
    found["first_us"] = 1e6 * times[0] / count
    found["later_us"] = 1e6 * statistics.median(times[1:]) / count
    if contender == OURS:
        found["launches"] = len(calls) / len(times)
    return found


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _rows(placement: str, count: int, quick: bool) -> list[dict[str, Any]]:
    # Registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    make = placements()[placement]
    names = [name for name in CONTENDERS if name == OURS or count <= THEIRS]
    return [row(name, placement, count, make, 2 if quick else 15) for name in names]


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """Time both over every placement and number of tensors, each in a process of its own.

    What was freed before decides where thousands of small tensors lie, and how many caches miss.
    """
    spawn = multiprocessing.get_context("spawn")
    for count in (4, 12) if quick else COUNTS:
        for placement in (PLAIN, ONE, THREE):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                yield from pool.submit(_rows, placement, count, quick).result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row a line."""
    parser = argparse.ArgumentParser("python -m bench.step.sharded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tensors; no measurement")
    options = parser.parse_args(arguments)
    for found in measure(options.quick):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
