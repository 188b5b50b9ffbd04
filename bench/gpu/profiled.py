"""What a profiler is to look at: the update, the per-sample linear kernel, and cuBLAS beside it.

``python -m bench.gpu.profiled`` runs each twice: the first time compiles, or chooses an algorithm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import fusedopt
from fusedopt.statistics import ops
from fusedopt.statistics.ops.samples import Samples

# Elements of the update; samples, rows of each, and widths of the layer.
UPDATE, LAYER = 2**28, (32, 512, 4096, 4096)
SMALL_UPDATE, SMALL_LAYER = 2**11, (2, 8, 16, 16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all three twice."""
    parser = argparse.ArgumentParser("python -m bench.gpu.profiled", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny tensors, to try the command")
    options = parser.parse_args(arguments)
    elements, layer = (SMALL_UPDATE, SMALL_LAYER) if options.small else (UPDATE, LAYER)
    device = torch.device(options.device)
    for _ in range(2):
        update(elements, device)
        weight_gradients(layer, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print("update, per-sample linear and the plain weight gradient have run twice")
    return 0


def update(elements: int, device: torch.device) -> None:
    """Take one step of AdamW in float32."""
    p = torch.nn.Parameter(torch.ones(elements, device=device))
    p.grad = torch.full_like(p, 0.5)
    fusedopt.AdamW([p], lr=1e-3, backend="triton").step()


def weight_gradients(layer: tuple[int, int, int, int], device: torch.device) -> None:
    """Form the gradient of a linear layer with squares by the kernel, and without by cuBLAS."""
    samples, rows, width, out = layer
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(samples, rows, width, device=device).to(dtype)
    e = torch.randn(samples, rows, out, device=device).to(dtype)
    ops.choose("triton", {dtype}).linear(a, e, Samples(samples, None), dtype, None)
    torch.mm(e.flatten(0, 1).t(), a.flatten(0, 1))


if __name__ == "__main__":
    sys.exit(main())
