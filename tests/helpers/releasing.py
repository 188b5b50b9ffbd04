"""Training with and without gradient release, side by side: bits are to be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt

TOKENS, WIDTH, BATCH = 9, 8, 6


class Various(nn.Module):
    """Parameters of every kind: tied, used twice, frozen, unused, scalar, not contiguous, large."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(3, 3)
        self.wide = nn.Linear(WIDTH, 140)
        self.narrow = nn.Linear(140, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.wide.weight.set_(self.wide.weight.t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(self.embedding(x)))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        h = h + self.narrow(torch.tanh(self.wide(h)))
        logits: Tensor = self.head(self.norm(h)) * self.gain
        return logits


def various(dtype: torch.dtype = torch.float32, device: Any = None, seed: int = 0) -> Various:
    """The model, the same for a seed."""
    torch.manual_seed(seed)
    return Various().to(device=device, dtype=dtype)


def tokens(steps: int, device: Any = None, seed: int = 1) -> list[Tensor]:
    """A batch for every step."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(TOKENS, (steps, BATCH, 2), generator=generator).to(device))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    x, y = batch.unbind(1)
    return nn.functional.cross_entropy(model(x).float(), y)


def two_groups(model: Various) -> list[dict[str, Any]]:
    """Parameters in two groups, out of the model's order, each with an lr of its own."""
    some = list(model.parameters())
    return [{"params": some[5:], "lr": 3e-2}, {"params": some[:5], "lr": 1e-2}]


Loop = Callable[[nn.Module, torch.optim.Optimizer, Any, Tensor], None]


def step_after_backward(model: nn.Module, optimizer: Any, _: Any, batch: Tensor) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def run(
    make: Callable[[Various], Any],
    released: bool,
    *,
    steps: int = 4,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    loop: Loop = step_after_backward,
    **options: Any,
) -> tuple[Various, Any]:
    """Train, with an optimizer of ``make(model)``; return the model and the optimizer."""
    model = various(dtype, device)
    optimizer = make(model)
    release = fusedopt.gradient_release(model, optimizer, **options) if released else None
    for batch in tokens(steps, device):
        loop(model, optimizer, release, batch)
        if released:
            assert all(p.grad is None for p in model.parameters())
    return model, optimizer


def bits(x: Any) -> Any:
    return x.detach().contiguous().view(-1).view(torch.uint8) if isinstance(x, Tensor) else x


def assert_same_run(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    """Assert that parameters and states are equal to the bit, and that training has moved them."""
    (model, optimizer), (other, reference) = ours, theirs
    start = dict(various(model.gain.dtype, model.gain.device).named_parameters())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(p), bits(q)), name
        still = name.startswith(("frozen", "unused"))
        assert torch.equal(p, start[name]) == still, f"{name} is to {'stay' if still else 'move'}"
        state, twin = optimizer.state.get(p, {}), reference.state.get(q, {})
        assert state.keys() == twin.keys(), name
        for key, value in state.items():
            assert torch.equal(bits(value), bits(twin[key])), f"{key} of {name}"
