"""A plain training loop, with clipping in the step: ``python examples/plain_loop.py``."""

import argparse

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fusedopt


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points of the plane (size, 2), and which of two spirals each is on (size,)."""
    turns = torch.rand(size, generator=generator) * 2
    spiral = torch.randint(2, (size,), generator=generator)
    angle = torch.pi * (turns + spiral)
    return torch.stack((turns * angle.cos(), turns * angle.sin()), 1), spiral


def main() -> None:
    """Train a small network to tell two spirals apart."""
    parser = argparse.ArgumentParser(description="A plain loop with fusedopt.AdamW.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 2)).to(device)
    clip = fusedopt.GlobalNorm(1.0)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, clip=clip)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        points, spiral = (x.to(device) for x in batch(64, generator))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(points), spiral)
        loss.backward()
        optimizer.step()  # clips, too: no clip_grad_norm_
        schedule.step()
        if step % max(1, steps // 5) == 0 and clip.last is not None:
            print(f"step {step:4d}  loss {loss.item():.4f}  norm {clip.last.item():.3f}")


if __name__ == "__main__":
    main()
