"""Ways to the weight gradient of a linear layer and its per-sample squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bench.harness.contenders import backend_of, load
from fusedopt import backends
from fusedopt.statistics.ops import reference
from fusedopt.statistics.ops.samples import Samples

from .cases import Shape

# Gradient, and the sum over samples of squared contributions to it.
Result = tuple[Tensor, Tensor | None]
Run = Callable[[], Result]

OURS, BASE = "fused", "plain"
FORMULA = "its formula"


@dataclass(frozen=True)
class Operands:
    """Input ``[batch, length, inputs]``, errors ``[batch, length, outputs]``, and the weight."""

    a: Tensor
    e: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Contender:
    """One way.

    Attributes:
        title: for tables.
        prepare: from the operands to the function that is timed.
        applies: whether the way exists for a shape, and is not another one's.
        source: whose code runs: a library's, ``"torch"``, ``"fusedopt"``, or ``"its formula"``
            where the library is missing.
    """

    title: str
    prepare: Callable[[Operands], Run]
    applies: Callable[[Shape], bool] = lambda _: True
    source: str = "torch"

    @property
    def foreign(self) -> bool:
        """Whether another library's code runs, which may fail in its own ways."""
        return self.source not in ("torch", "fusedopt", FORMULA)


def plain(x: Operands) -> Run:
    """Return the gradient alone, as autograd forms it."""
    a, e = x.a.flatten(0, 1), x.e.flatten(0, 1)
    return lambda: (e.t() @ a, None)


def fused(x: Operands) -> Run:
    """Return the kernel under test; without a GPU its reference."""
    if x.a.device.type == "cpu":
        linear = reference.linear
    else:
        from fusedopt.statistics.ops.triton_linear import linear
    samples = Samples(len(x.a))
    return lambda: linear(x.a, x.e, samples, x.e.dtype)


def _reduce(rows: Tensor) -> Result:
    return rows.sum(0), rows.square().sum(0, dtype=torch.float32)


def materialised(x: Operands) -> Run:
    """Return a batched product, its square and two sums."""
    return lambda: _reduce(torch.bmm(x.e.transpose(1, 2), x.a))


def _loss(weight: Tensor, a: Tensor, e: Tensor) -> Tensor:
    """Return what has errors ``e``."""
    return (F.linear(a, weight) * e).sum()


def vmap(x: Operands) -> Run:
    """Return per-sample gradients as torch.func is asked for them: the forward runs, too."""
    gradients = torch.func.vmap(torch.func.grad(_loss), in_dims=(None, 0, 0))
    return lambda: _reduce(gradients(x.weight, x.a, x.e))


def vmap_backward(x: Operands) -> Run:
    """Return the backward half of ``vmap``, which is what the others are compared in."""
    weights = x.weight.expand(len(x.a), *x.weight.shape)
    _, pull = torch.func.vjp(lambda w: torch.func.vmap(F.linear)(x.a, w), weights)
    return lambda: _reduce(pull(x.e)[0])


def missing() -> list[dict[str, str]]:
    """List the libraries whose formula is measured in their place."""
    reason = "not installed, or not for this torch; its formula is measured instead"
    known = (("opacus", _OPACUS), ("backpack", _BACKPACK))
    return [{"contender": name, "reason": reason} for name, found in known if found is None]


_OPACUS, _ = load("opacus.grad_sample.linear")
_BACKPACK, _ = load("backpack.extensions.firstorder.sum_grad_squared.linear")


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _grad_sample(x: Operands) -> Callable[[], Tensor]:
    """Return Opacus's sampler of a linear layer's gradients."""
    if _OPACUS is None:
        return lambda: torch.einsum("n...i,n...j->nij", x.e, x.a)
    layer, sampler = _layer(x.weight), _OPACUS.compute_linear_grad_sample
    return lambda: sampler(layer, [x.a], x.e)[layer.weight]


def opacus(x: Operands) -> Run:
    """Return Opacus's samples, reduced by torch."""
    rows = _grad_sample(x)
    return lambda: _reduce(rows())


def opacus_fused(x: Operands) -> Run:
    """Return Opacus's samples, reduced in one pass by this library."""
    rows = _grad_sample(x)
    backend = backend_of(x.a.device)

    def run() -> Result:
        gradients, squares = backends.reduce_samples([x.weight], [[rows()]], backend)
        return gradients[0], squares[0]

    return run


def _sum_grad_squared(e: Tensor, a: Tensor) -> Tensor:
    """BackPACK's formula (arXiv 1912.10985), contracted in the order that torch.einsum takes."""
    if e.dim() == 2:
        return torch.einsum("ni,nj->ij", e**2, a**2)
    return torch.einsum("nmi,nmj,nki,nkj->ij", e, a, e, a)


def backpack(x: Operands) -> Run:
    """Return the gradient, and squares as BackPACK's SumGradSquared forms them."""
    gradient = plain(x)
    # A layer whose input has no sequence has two dimensions, for which the formula is cheaper.
    a, e = (t.squeeze(1) if t.shape[1] == 1 else t for t in (x.a, x.e))
    if _BACKPACK is None:
        return lambda: (gradient()[0], _sum_grad_squared(e, a))
    extension, layer = _BACKPACK.SGSLinear(), _layer(x.weight)
    layer.input0 = a
    return lambda: (gradient()[0], extension.weight(None, layer, None, (e,), None))


def backpack_ordered(x: Operands) -> Run:
    """Return BackPACK's formula in the order that opt_einsum finds, which torch may lack."""
    gradient = plain(x)

    def run() -> Result:
        left = torch.einsum("nmi,nmj->nij", x.e, x.a)
        right = torch.einsum("nki,nkj->nij", x.e, x.a)
        return gradient()[0], torch.einsum("nij,nij->ij", left, right)

    return run


_OPACUS_SOURCE = FORMULA if _OPACUS is None else "opacus"
_BACKPACK_SOURCE = FORMULA if _BACKPACK is None else "backpack"

CONTENDERS = {
    BASE: Contender("plain gradient", plain),
    OURS: Contender("fusedopt", fused, source="fusedopt"),
    "materialised": Contender("bmm, square, sum", materialised),
    "vmap": Contender("vmap(grad), forward included", vmap),
    "vmap_backward": Contender("vmap(grad), backward", vmap_backward),
    "opacus": Contender("Opacus, torch reduces", opacus, source=_OPACUS_SOURCE),
    "opacus_fused": Contender("Opacus, fusedopt reduces", opacus_fused, source=_OPACUS_SOURCE),
    "backpack": Contender("BackPACK", backpack, source=_BACKPACK_SOURCE),
    "backpack_ordered": Contender(
        "BackPACK, best order", backpack_ordered, lambda s: s.length > 1, FORMULA
    ),
}
