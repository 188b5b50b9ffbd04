"""Transfer of a batch size: ``python examples/batch_size.py``.

Tuned at a batch of 8, trained at 64: the same samples in the same order, an eighth of the steps.
With AdamW and the square-root rule the two runs part; with the squares of single samples, and 8 as
the virtual batch, they stay together.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fusedopt
from fusedopt.examples.plain_loop import batch

TUNED, LARGE = 8, 64
LR = 1e-3


def train(size: int, samples: int, decoupled: bool) -> list[float]:
    """Return the loss on held-out samples after each fifth of the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer: fusedopt.FusedOptimizer
    if decoupled:
        statistics = fusedopt.PerSampleSquares(model)
        optimizer = fusedopt.BatchDecoupledAdam(
            model.parameters(), lr=LR, statistics=statistics, virtual_batch_size=TUNED
        )
    else:
        optimizer = fusedopt.AdamW(model.parameters(), lr=LR)
    if size != TUNED:
        rule = "decoupled" if decoupled else "sqrt"
        fusedopt.scaling.rescale_(
            optimizer, from_batch=TUNED, to_batch=size, rule=rule, beta_form="power"
        )
    points, spiral = batch(samples, torch.Generator().manual_seed(0))
    held_out = batch(1000, torch.Generator().manual_seed(1))
    losses = []
    for i, (x, y) in enumerate(zip(points.split(size), spiral.split(size), strict=True), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i % (samples // size // 5) == 0:
            with torch.no_grad():
                x, y = held_out
                losses.append(F.cross_entropy(model(x), y).item())
    return losses


def main() -> None:
    """Print how far the losses at the two batch sizes are apart."""
    parser = argparse.ArgumentParser(description="Transfer of a batch size.")
    parser.add_argument("--samples", type=int, default=6400)
    samples = parser.parse_args().samples
    for name, decoupled in (("AdamW, square-root rule", False), ("batch-decoupled", True)):
        tuned, large = (train(size, samples, decoupled) for size in (TUNED, LARGE))
        apart = max(abs(a / b - 1) for a, b in zip(large, tuned, strict=True))
        print(f"{name:24}  loss {tuned[-1]:.4f} and {large[-1]:.4f}, at most {apart:.1%} apart")


if __name__ == "__main__":
    main()
