"""Normalisations of models' own, recognised by what they compute.

Every family of models has an RMSNorm class of its own. A module with one vector of weights (and
perhaps one of biases) is tried on numbers: where it is ``n(x) w`` plus what weights have no part
in, with n the root mean square or the standard normalisation, its weight's squares are a known
reduction. The module runs as it is and autograd makes the gradient, which what is reduced has to
add up to at every step: what holds for the numbers tried and not for others is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...memory.dtypes import compute_dtype
from .autograd import observe
from .fallback import functional, tolerance_of
from .layer_call import LayerCall
from .replay import Alone
from .uses import GainUse, VectorUse

Moments = Callable[[Tensor], tuple[Tensor | None, Tensor]]

# How far a module may be from the formula on the numbers that are tried, relative to the largest.
_EXACT = 1e-5


class OwnNorm:
    """Runs a normalisation as it is, and notes what its parameters' squares need.

    Args:
        moments: mean (or None) and reciprocal deviation of each row of ``[..., width]``.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def __call__(
        self, layer: LayerCall, module: nn.Module, plain: Any, arguments: Any, keywords: Any
    ) -> Any:
        """Run the module."""
        inputs = [*arguments, *keywords.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            return functional(layer, module, plain, arguments, keywords)
        (x,) = inputs
        y = plain(*arguments, **keywords)
        placed = layer.place(x)
        weight, *rest = _vectors(module)
        chosen = layer.ops(x, weight)
        w = layer.tap_beside(weight) if weight.requires_grad else None
        b = layer.tap_beside(rest[0]) if rest and rest[0].requires_grad else None
        device = x.device.type
        autocast, moments = torch.is_autocast_enabled(device), self._moments

        def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
            e = placed.rows(errors[0])
            tolerance = tolerance_of([e, *saved], autocast)
            if w is not None:
                own = placed.rows(saved[0])
                mean, rstd = moments(own.to(compute_dtype([own.dtype])))
                w.add(GainUse(chosen, e, own, mean, rstd, placed.samples, tolerance))
            if b is not None:
                b.add(VectorUse(chosen, e, None, placed.samples, tolerance))

        taps = [tap for tap in (w, b) if tap is not None]
        y = observe([y], on_grad, taps, [] if w is None else [x.detach()])[0]
        placed.note(y)
        return y


def own_norm(module: nn.Module) -> OwnNorm | None:
    """Return how a module is run that is a normalisation of the last dimension; None for others."""
    vectors = _vectors(module)
    plain_vectors = all(v.dim() == 1 and v.shape == vectors[0].shape for v in vectors)
    if not 1 <= len(vectors) <= 2 or not plain_vectors or len(vectors[0]) < 2:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    try:
        found = _tried(module, len(vectors[0]))
    except Exception:
        # It takes other inputs, or more of them: another layer.
        return None
    return None if found is None else OwnNorm(found)


def _vectors(module: nn.Module) -> list[Tensor]:
    return list(module._parameters[name] for name in _names(module))  # type: ignore[misc]


def _names(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None]


def _tried(module: nn.Module, width: int) -> Moments | None:
    """Compare a module with the formulas, on numbers large and small beside any epsilon."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tried = [draw(2, 3, width) * 2 + 0.5, draw(3, width) * 1e-3, draw(1, 2, width)]
    weights = [draw(width) for _ in _names(module)]
    zeros = [torch.zeros(width) for _ in weights]
    # Whatever its type and device are: what is tried is of float32, on the host.
    outputs = [[_run(module, x, v) for v in (weights, zeros, weights)] for x in tried]
    if not all(torch.equal(first, again) for first, _, again in outputs):
        return None
    for moments in _candidates(module):
        if all(
            _fits(x, first, zero, weights, moments)
            for x, (first, zero, _) in zip(tried, outputs, strict=True)
        ):
            return moments
    return None


def _run(module: nn.Module, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    values = {f"inner.{name}": v for name, v in zip(_names(module), vectors, strict=True)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y: Tensor = torch.func.functional_call(Alone(module), values, (x.clone(),))
    return y


def _fits(
    x: Tensor, y: Tensor, at_zero: Tensor, vectors: Sequence[Tensor], moments: Moments
) -> bool:
    mean, rstd = moments(x)
    normal = (x if mean is None else x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    # What weights have no part in: the normal itself where they count from one.
    expected = normal * vectors[0] + at_zero
    if len(vectors) == 2:
        expected = expected + vectors[1]
    if y.shape != x.shape or y.dtype != x.dtype:
        return False
    return bool((y - expected).abs().max() <= _EXACT * expected.abs().max())


def _candidates(module: nn.Module) -> list[Moments]:
    """Return the formulas, with each number that the module keeps for epsilon."""
    kept = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1}
    return [form(eps) for eps in sorted(kept) for form in (_root_mean_square, _deviation)]


def _root_mean_square(eps: float) -> Moments:
    return lambda x: (None, (x.square().mean(-1) + eps).rsqrt())


def _deviation(eps: float) -> Moments:
    def moments(x: Tensor) -> tuple[Tensor | None, Tensor]:
        if x.numel() == 0:
            return x.new_zeros(x.shape[:-1]), x.new_zeros(x.shape[:-1])
        variance, mean = torch.var_mean(x, -1, correction=0)
        return mean, (variance + eps).rsqrt()

    return moments
