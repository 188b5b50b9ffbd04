"""Bandwidth of AdamW's traffic without its arithmetic: four reads and three writes an element.

``python -m bench.gpu.streams --out FILE`` times it in turn with a copy, one read and one write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import clock
from bench.harness.output import write_json
from fusedopt.kernels.lang import jit, tl

BLOCK = 1024
# As many as the shard of Llama-3-8B has: 16 GiB in four tensors of float32.
ELEMENTS = 2**30


@jit
def four_to_three(p, g, m, v, BLOCK: tl.constexpr):  # noqa: N803
    """Read four tensors and write three of them in place; sizes are multiples of the block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(g + at)
    first, second, parameter = tl.load(m + at), tl.load(v + at), tl.load(p + at)
    tl.store(p + at, parameter + gradient)
    tl.store(m + at, first + gradient)
    tl.store(v + at, second + gradient)


def runs(elements: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return both functions, on tensors that they share; gradients are zero, so values stay."""
    p, g, m, v = (torch.zeros(elements, device=device) for _ in range(4))
    p.fill_(1.0)
    grid = (elements // BLOCK,)

    def stream(tensors: Sequence[Tensor]) -> None:
        four_to_three[grid](*tensors, BLOCK=BLOCK, num_warps=4)

    return {"copy": lambda: g.copy_(v), "four to three": partial(stream, (p, g, m, v))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser("python -m bench.gpu.streams", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="a multiple of 1024")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.elements < BLOCK or options.elements % BLOCK:
        parser.error(f"--elements {options.elements}: a multiple of {BLOCK}")
    device = torch.device(options.device)
    times = clock.in_turn(runs(options.elements, device), clock.Clock(device), 20, 2.0)
    moved = {"copy": 2 * 4 * options.elements, "four to three": 7 * 4 * options.elements}
    found = {
        name: clock.percentiles([moved[name] / (1e6 * on_device) for on_device, _ in measured])
        for name, measured in times.items()
    }
    write_json(options.out, {"elements": options.elements, "gbps": found})
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
