"""Per-sample gradients the slow way, and the comparison of gathered squares with them.

Sample i's *row* is its contribution to ``p.grad``: the gradient of its share of the loss. The
shares of a batch add up to the loss, so the rows add up to the gradient. One call of
``torch.autograd.grad`` a sample, on the untouched copy of a model: nothing is shared with the code
under test, and whatever a share depends on (a normaliser counted over the whole batch, a mask of
dropout) is what it was in the batch.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree
from marks import BACKENDS as BACKENDS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# The oracle's products in full float32, also on a GPU.
torch.backends.cudnn.allow_tf32 = False

DEVICE = torch.device(os.environ.get("FUSEDOPT_TEST_DEVICE", "cpu"))

# Rounding of sums of some hundred products; mistakes give squares that are off by tens of per cent.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
# The type that a backend is tested in: Triton has no float64 here.
DTYPES = {"reference": torch.float64, "triton": torch.float32}

Loss = Callable[[Tensor], Tensor]


def rows_of(shares: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """``[N, *p]`` for every parameter: the gradient of each sample's share of the loss."""
    rows: list[list[Tensor]] = []
    for share in shares:
        parts = torch.autograd.grad(share, params, retain_graph=True, allow_unused=True)
        pairs = zip(params, parts, strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in pairs])
    return [torch.stack(of_one) for of_one in zip(*rows, strict=True)]


def rows_by_func(model: nn.Module, inputs: Sequence[Tensor], reduction: str) -> dict[str, Tensor]:
    """The same by ``torch.func``, vmap of grad, for ``squared_error`` and batch-first models."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    out = model(*inputs)
    targets = target_of(out)
    scale = 1 / len(out) if reduction == "mean" else 1.0

    def share(values: dict[str, Tensor], target: Tensor, *sample: Tensor) -> Tensor:
        alone = [x.unsqueeze(0) for x in sample]
        out = torch.func.functional_call(model, values, tuple(alone))
        return (out.squeeze(0) - target).square().sum() * scale

    axes = (None, 0, *(0 for _ in inputs))
    return torch.func.vmap(torch.func.grad(share), axes)(values, targets, *inputs)


def target_of(out: Tensor) -> Tensor:
    """Something to regress on, the same for equal shapes."""
    generator = torch.Generator().manual_seed(out.numel())
    target = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return target.to(out.device, out.dtype)


def squared_error(reduction: str = "mean", batch_dim: int = 0) -> Loss:
    """Shares of the summed squared error, divided by the number of samples for ``"mean"``."""

    def shares(out: Tensor) -> Tensor:
        errors = (out - target_of(out)).square().movedim(batch_dim, 0)
        errors = errors.flatten(1).sum(1) if errors.dim() > 1 else errors
        return errors / len(errors) if reduction == "mean" else errors

    return shares


def mean_square_of(rows: Tensor, reduction: str = "mean") -> Tensor:
    """The mean of the squared per-sample gradients that belongs to rows ``[N, *p]``."""
    n = len(rows)
    return rows.square().sum(0) * n if reduction == "mean" else rows.square().sum(0) / n


def virtual_square(gradients: Tensor, b: int) -> Tensor:
    """Mean over all subsets of ``b`` samples of the square of the subset's mean gradient."""
    subsets = itertools.combinations(range(len(gradients)), b)
    return torch.stack([gradients[list(s)].mean(0).square() for s in subsets]).mean(0)


def first_tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@dataclass
class Expected:
    """What plain autograd says about a model's parameters, by name."""

    rows: dict[str, Tensor]
    reduction: str = "mean"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Sequence[Any]],
        loss: Loss,
        reduction: str = "mean",
        seed: int = 7,
    ) -> Expected:
        """Rows of all samples of all batches, one after the other."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        collected: dict[str, list[Tensor]] = {name: [] for name in named}
        torch.manual_seed(seed)
        for inputs in batches:
            shares = loss(first_tensor(model(*inputs)))
            for name, rows in zip(named, rows_of(shares, list(named.values())), strict=True):
                collected[name].append(rows)
        return cls({name: torch.cat(parts) for name, parts in collected.items()}, reduction)

    @property
    def samples(self) -> int:
        return len(next(iter(self.rows.values())))

    def mean_square(self, name: str) -> Tensor:
        return mean_square_of(self.rows[name], self.reduction)

    def mean(self, name: str) -> Tensor:
        total = self.rows[name].sum(0)
        return total if self.reduction == "mean" else total / self.samples


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Within the share ``tolerance`` of each element or of the largest one."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    if expected.numel() == 0:
        return
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    apart = (a - e).abs()
    allowed = tolerance * torch.maximum(e.abs(), e.abs().max())
    worst = int((apart - allowed).nan_to_num(nan=torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), e.shape))
    assert bool((apart <= allowed).all()), (
        f"{name}{list(index)}: got {a[index].item()!r}, expected {e[index].item()!r}"
    )


def check_squares(
    statistics: Any, model: nn.Module, expected: Expected, tolerance: float | None = None
) -> None:
    """Gradients, squares and the count of ``model`` against the rows of its untouched copy.

    A source that returned the square of the mean gradient would fail, except where that is right.
    """
    assert statistics.samples == expected.samples
    named = dict(model.named_parameters())
    seen = False
    for name, rows in expected.rows.items():
        p = named[name]
        allowed = TOLERANCES[p.dtype] if tolerance is None else tolerance
        assert p.grad is not None, name
        assert p.grad.dtype == p.dtype, name
        assert_near(p.grad, rows.sum(0), allowed, f"gradient of {name}")
        q = expected.mean_square(name)
        actual = statistics.mean_square(p)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert actual.dtype == wide, f"{name}: {actual.dtype}"
        assert_near(actual, q, allowed, f"mean square of {name}")
        if q.numel() > 0 and q.max() > 0:
            spread = (q - expected.mean(name).square()).abs().max()
            seen = seen or bool(spread > 3 * allowed * q.max())
    several = expected.samples > 1 and any(r.numel() and r.any() for r in expected.rows.values())
    assert seen or not several, "the square of the mean gradient would pass: no test at all"


def backward(model: nn.Module, batches: Iterable[Sequence[Any]], loss: Loss, seed: int = 7) -> None:
    """Forward and backward over every batch, with the random numbers of ``Expected.of``."""
    torch.manual_seed(seed)
    for inputs in batches:
        loss(first_tensor(model(*inputs))).sum().backward()


def gather(
    model: nn.Module,
    *inputs: Any,
    reduction: str = "mean",
    loss: Loss | None = None,
    batches: Sequence[Sequence[Any]] | None = None,
    tolerance: float | None = None,
    batch_first: bool = True,
    **options: Any,
) -> Any:
    """Attach ``PerSampleSquares``, run forward and backward, compare; return the statistics.

    Args:
        model: is left with gradients and with the statistics attached.
        inputs: of one batch.
        reduction: of the loss.
        loss: output -> shares of the samples; squared error without it.
        batches: instead of ``inputs``, several for gradient accumulation.
        tolerance: relative, instead of the table's.
        batch_first: where the batch dimension of inputs and output is.
        options: of ``PerSampleSquares``.
    """
    from fusedopt import PerSampleSquares

    loss = loss or squared_error(reduction, 0 if batch_first else 1)
    batches = [inputs] if batches is None else batches
    expected = Expected.of(copy.deepcopy(model), batches, loss, reduction)
    model.zero_grad()
    statistics = PerSampleSquares(model, reduction, batch_first=batch_first, **options)
    backward(model, batches, loss)
    check_squares(statistics, model, expected, tolerance)
    return statistics


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def randint(high: int, *shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(DEVICE)


def to(dtype: torch.dtype, *values: Any) -> tuple[Any, ...]:
    """Modules and floating point tensors in ``dtype``, on the device under test."""
    moved = []
    for value in values:
        floating = isinstance(value, nn.Module) or value.is_floating_point()
        moved.append(value.to(DEVICE, dtype) if floating else value.to(DEVICE))
    return tuple(moved)


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE, dtype)


class LanguageModel(nn.Module):
    """Embedding, a nonlinearity, head; the head's weight is the embedding's where tied."""

    def __init__(self, vocabulary: int = 7, width: int = 5, tied: bool = False, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, **options)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(ids))))


def token_mean(targets: Tensor, ignore_index: int = -100) -> Loss:
    """Shares of ``cross_entropy(..., ignore_index)`` with its mean over the valid tokens."""
    valid = (targets != ignore_index).sum()

    def shares(logits: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none"
        )
        return losses.view(targets.shape).sum(1) / valid

    return shares


class Allocations(TorchDispatchMode):
    """Records the largest tensor (in elements of its storage) that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.what = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                numel = value.untyped_storage().nbytes() // value.element_size()
                if numel > self.largest:
                    self.largest, self.what = numel, f"{func} -> {tuple(value.shape)}"
        return out
