"""What rounding the squares of one-row samples costs, against float64: on any machine.

``python -m bench.per_sample.rounding`` trains a small network on clusters, in bfloat16 and in
float16, and sums the squares of its layers' per-sample gradients: with squares in bfloat16, as
``linear_rows`` forms them; in tf32, cut off as hardware does, as it formed them before. Errors are
relative to the exact sum, of each element, over all layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

BATCHES = (8, 64, 1024)
SEEDS = 5


def in_bfloat16(x: Tensor) -> Tensor:
    """Square in float32, and round to bfloat16."""
    return x.float().square().bfloat16().double()


def in_tf32(x: Tensor) -> Tensor:
    """Square in float32, and cut off behind the 10 bits of a mantissa in tf32."""
    bits = x.float().square().view(torch.int32)
    return (bits & ~0x1FFF).view(torch.float32).double()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"bfloat16": in_bfloat16, "tf32, cut off": in_tf32}


def operands(seed: int, batch: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs and output gradients of a network's layers, in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 64, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.ReLU())
    model.append(nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(size: int) -> Tensor:
        labels = torch.randint(10, (size,), generator=generator)
        x = centres[labels] + 1.5 * torch.randn(size, 64, generator=generator)
        return F.cross_entropy(model(x), labels, reduction="sum")

    for _ in range(50):
        optimizer.zero_grad()
        (loss(64) / 64).backward()
        optimizer.step()
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a = inputs[0].detach().to(dtype)
        output.register_hook(lambda e: seen.append((a, e.to(dtype))))

    hooks = [x.register_forward_hook(note) for x in model if isinstance(x, nn.Linear)]
    loss(batch).backward()
    for hook in hooks:
        hook.remove()
    yield from seen


def errors(batch: int, dtype: torch.dtype, seeds: int = SEEDS) -> dict[str, Tensor]:
    """Return the relative errors of all elements, by the way that squares are formed."""
    found: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        for a, e in operands(seed, batch, dtype):
            exact = e.double().square().t() @ a.double().square()
            held = exact > 0
            for name, square in WAYS.items():
                result = square(e).t() @ square(a)
                found[name].append(((result - exact) / exact)[held])
    return {name: torch.cat(parts) for name, parts in found.items()}


def table(seeds: int) -> Table:
    """Tabulate mean, root mean square and largest error."""
    title = f"Relative error of squares of one-row samples, {seeds} seeds"
    result = Table("operands", "samples", "squares in", "mean", "rms", "largest", title=title)
    for dtype in (torch.bfloat16, torch.float16):
        for batch in BATCHES:
            for name, error in errors(batch, dtype, seeds).items():
                values = error.mean(), error.square().mean().sqrt(), error.abs().max()
                cells = [f"{value.item():.1e}" for value in values]
                result.add_row(str(dtype).removeprefix("torch."), str(batch), name, *cells)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m bench.per_sample.rounding", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"({SEEDS})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Console(width=120).print(table(options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
