"""Trainings whose optimizer's states are coded after every step, and gradients without a training.

All states of a model are one vector, in which every parameter begins at a multiple of 256 elements,
so that no group has elements of two parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fusedopt.examples import char_gpt

from .char_gpt import Windows
from .digits_task import IMAGES, Digits
from .eight_bits import Pair

ALIGNMENT = 256


class Adam(torch.optim.Optimizer):
    """AdamW whose states are what a pair of codes leaves of them after every step.

    Attributes:
        gradient: the last one as a vector with gaps.
    """

    def __init__(self, groups: Any, hyper: dict[str, Any], pair: Pair | None = None) -> None:
        super().__init__(groups, {"weight_decay": 0.0, "eps": 1e-8, **hyper})
        self._pair, self._steps = pair, 0
        self._places: list[tuple[nn.Parameter, dict[str, Any], slice]] = []
        end = 0
        for group in self.param_groups:
            for p in group["params"]:
                self._places.append((p, group, slice(end, end + p.numel())))
                end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.gradient, self._m, self._v = torch.zeros(3, end)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update, then encode and decode the states."""
        self._steps += 1
        (beta1, beta2), eps = (self.param_groups[0][key] for key in ("betas", "eps"))
        for p, _, place in self._places:
            self.gradient[place] = p.grad.flatten()
        g = self.gradient
        self._m.lerp_(g, 1 - beta1)
        self._v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (self._v / (1 - beta2**self._steps)).sqrt_().add_(eps)
        update = self._m / (1 - beta1**self._steps) / root
        for p, group, place in self._places:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update[place].view_as(p), alpha=group["lr"])
        if self._pair is not None:
            self._m, self._v = self._pair(self._m, self._v, self._steps)


class RareRows:
    """Bags of tokens drawn by Zipf's law, and classes drawn from a teacher's logits.

    The table's rows are no multiple of a group long: rows of frequent and rare tokens share scales.
    """

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        self.settings, self.seed = settings, seed
        generator = torch.Generator().manual_seed(seed)
        tokens, classes = settings["tokens"], settings["classes"]
        # Frequent and rare tokens lie beside each other.
        order = torch.randperm(tokens, generator=generator)
        chances = 1.0 / (1 + torch.arange(tokens, dtype=torch.float64))[order]
        teacher = 6.0 * torch.randn(tokens, classes, generator=generator)
        count = (settings["steps"] + 1) * settings["batch"] + settings["held_out"]
        bag = settings["bag"]
        drawn = torch.multinomial(chances, count * bag, True, generator=generator)
        self.bags = drawn.view(count, bag)
        logits = teacher[self.bags].mean(1)
        self.labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            width = self.settings["width"]
            table = nn.EmbeddingBag(self.settings["tokens"], width)
            return nn.Sequential(table, nn.Linear(width, self.settings["classes"]))

    def loss(self, model: nn.Module, samples: Tensor | slice) -> Tensor:
        return F.cross_entropy(model(self.bags[samples]), self.labels[samples])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        return self.loss(model, slice(-self.settings["held_out"], None)).item()


def train(
    name: str, settings: dict[str, Any], seed: int, pair: Pair | None = None
) -> Iterator[tuple[Tensor, float | None]]:
    """Train a task; yield each step's gradient, and the loss after the last of ``steps``.

    One more step follows, for its gradient.
    """
    steps = settings["steps"]
    model, batches, loss, evaluate = TASKS[name](settings, seed)
    groups: Any = char_gpt.decay_groups(model) if name == "gpt" else model.parameters()
    optimizer = Adam(groups, settings["hyper"], pair)
    rise, fall = max(1, steps // 20), math.pi / steps
    base = settings["hyper"]["lr"]
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            # As the demo's schedule: up, then down to 4 %.
            group["lr"] = base * min((i + 1) / rise, 0.52 + 0.48 * math.cos(fall * i))
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        yield optimizer.gradient, evaluate() if i + 1 == steps else None


def _batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    return iter(torch.arange(count).split(size)[: steps + 1])


def _digits(settings: dict[str, Any], seed: int) -> Any:
    steps, batch = settings["steps"], settings["batch"]
    task = Digits((steps + 1) * batch // IMAGES + 1, seed, "cpu")
    task.images = task.images.float()
    model = task.model()
    batches = iter(task.order.split(batch)[: steps + 1])
    return model, batches, lambda b: task.loss(model, b), lambda: task.evaluate(model)


def _gpt(settings: dict[str, Any], seed: int) -> Any:
    count = (settings["steps"] + 1) * settings["batch"]
    task = Windows({**settings, "windows": count, "evaluations": 1, "device": "cpu"}, seed)
    model = task.model()
    batches = _batches(count, settings["batch"], settings["steps"])
    return model, batches, lambda b: task.loss(model, b), lambda: task.evaluate(model)


def _embedding(settings: dict[str, Any], seed: int) -> Any:
    task = RareRows(settings, seed)
    model = task.model()
    batches = _batches(len(task.bags), settings["batch"], settings["steps"])
    return model, batches, lambda b: task.loss(model, b), lambda: task.evaluate(model)


TASKS = {"digits": _digits, "gpt": _gpt, "embedding": _embedding}


def synthetic(settings: dict[str, Any], seed: int) -> Iterator[tuple[Tensor, None]]:
    """Yield gradients with log-normal scales of rows and columns, for ever.

    Noise is Student's t with 4 degrees of freedom, or normal. From step ``shift`` on, gradients of
    every second column are multiplied by ``factor``. With ``still``, all others are then constant,
    so that no scale of theirs moves.
    """
    generator = torch.Generator().manual_seed(seed)
    n = settings["rows"]
    rows = (2 * torch.randn(n, 1, generator=generator)).exp()
    scales = rows * torch.randn(1, n, generator=generator).exp()
    noise = student if settings["noise"] == "student" else normal
    step = 0
    while True:
        step += 1
        if step == settings.get("shift"):
            scales[:, 1::2] *= settings["factor"]
        drawn = scales * noise(n, generator)
        if settings.get("still") and step >= settings["shift"]:
            drawn[:, ::2] = scales[:, ::2]
        yield drawn.view(-1), None


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Return [n, n] normal numbers."""
    return torch.randn(n, n, generator=generator)


def student(n: int, generator: torch.Generator) -> Tensor:
    """Return [n, n] numbers of Student's t, 4 degrees of freedom, by its quantile (Shaw 2006)."""
    p = torch.rand(n, n, generator=generator).clamp_(1e-7, 1 - 1e-7)
    root = (4 * p * (1 - p)).clamp_(max=1.0).sqrt_()
    tail = ((root.arccos() / 3).cos_() / root - 1).clamp_(min=0.0)
    return 2 * tail.sqrt_() * (p - 0.5).sign_()
