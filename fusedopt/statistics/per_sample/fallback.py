"""Modules whose squares are not known: per-sample gradients through torch.func, module by module.

The module alone is run again on each sample, and differentiated with the error that arrived at its
output. That costs another forward and backward pass of the module, and memory for the gradients of
a few samples at a time; only the module's own parameters are concerned, not those of its children.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...memory.dtypes import compute_dtype
from ...memory.layout import real_view
from . import batch_dims
from .autograd import observe
from .layer_call import LayerCall
from .ownership import every_name, own_parameters
from .reduce import pieces
from .replay import Call, Replayed, sketch_of
from .unknown import check_arguments, check_bags
from .uses import FallbackUse

# How far the sum of contributions may be from what autograd has made of the batch, in roots of the
# number of samples times their squares: a few roundings; on a GPU products may be of tf32.
SUMS = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUGH = 1e-2
# Share of an output's norm by which it may differ between a sample alone and in the batch: a few
# roundings of bfloat16. Other samples or other random numbers change it by more.
TOLERANCE = 3e-2


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return those of a module's own parameters that are not frozen."""
    return {name: p for name, p in own_parameters(module).items() if p.requires_grad}


def warning(name: str, module: nn.Module) -> str:
    """Say what the fallback costs."""
    own = ", ".join(trained_parameters(module))
    return (
        f"{name} ({type(module).__name__}) is not a layer whose per-sample squares are known:"
        f" those of its own parameters ({own}) go through torch.func, which runs this module"
        " (with everything inside it) forward and backward once more for every sample. If they are"
        " used by a part of it only, move them into a module of their own"
    )


def functional(
    layer: LayerCall, module: nn.Module, plain: Any, arguments: Any, keywords: Any
) -> Any:
    """Run a module of any kind, and note what its own parameters' squares need."""
    check_arguments(layer.name, (arguments, keywords))
    check_bags(layer.name, module, arguments, keywords)
    leaves, structure = tree_flatten((arguments, keywords))
    # As the call finds them: running statistics, vectors of a power iteration.
    buffers = {name: b.detach().clone() for name, b in module.named_buffers(remove_duplicate=False)}
    outputs = plain(*arguments, **keywords)
    flat, out_structure = tree_flatten(outputs)
    places = [i for i, y in enumerate(flat) if isinstance(y, Tensor) and y.requires_grad]
    taps = {name: layer.tap_beside(p) for name, p in trained_parameters(module).items()}
    if not places or not taps:
        return outputs
    sources = layer.call.fallbacks
    source = sources.setdefault(id(module), Module(layer, module))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    rest = [None if isinstance(x, Tensor) else x for x in leaves]
    ys = [flat[i] for i in places]
    fixed = batch_dims.recurrent_inputs(module, leaves, arguments, keywords)
    dims = [batch_dims.output_dims(layer, module, i, y) for i, y in zip(places, ys, strict=True)]
    device = ys[0].device.type
    narrow, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    autocast = torch.autocast(device, narrow, enabled, cache_enabled=False)

    def on_grad(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        inputs = dict(zip(tensors, saved, strict=False))
        rest_of = iter(saved[len(tensors) :])
        sketches = [[(dim, next(rest_of)) for dim in own] for own in dims]
        source.add(
            Call(
                source.replayed,
                structure,
                rest,
                inputs,
                buffers,
                fixed,
                places,
                autocast,
                errors,
                sketches,
            )
        )
        use = FallbackUse(
            source, tolerance_of(errors, enabled or torch.is_autocast_enabled(device))
        )
        for tap in taps.values():
            tap.add(use)

    # Not the outputs: the next layer may write to them.
    kept = [leaves[i].detach() for i in tensors]
    kept += [sketch_of(y, dim) for y, own in zip(ys, dims, strict=True) for dim in own]
    observed = observe(ys, on_grad, list(taps.values()), kept)
    for i, y in zip(places, observed, strict=True):
        flat[i] = y
    return tree_unflatten(flat, out_structure)


def tolerance_of(errors: Sequence[Tensor], autocast: bool) -> float:
    """Return how far contributions may be from adding up to autograd's gradient."""
    rough = autocast or any(e.device.type != "cpu" for e in errors)
    return ROUGH if rough else max(SUMS.get(real_view(e).dtype, ROUGH) for e in errors)


class Module:
    """The calls of one module within one call of the model: see ``uses.Fallback``."""

    def __init__(self, layer: LayerCall, module: nn.Module) -> None:
        named = {name: id(p) for name, p in every_name(module)}
        self.replayed = Replayed(layer, module, named)
        self.parameters = list(trained_parameters(module).values())
        self._left = {id(p) for p in self.parameters}
        self.calls: list[Call] = []
        self._backward = -1
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, call: Call) -> None:
        """Note a call of the module whose gradients have arrived."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            # What is there was left by a backward pass that did not reach the parameters.
            self._backward, self.calls, self._made = backward, [], {}
        self.calls.append(call)

    def squares_of(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of contributions to a parameter, and of their squares.

        Those of all parameters are made at the first request.
        """
        if id(parameter) not in self._made:
            self._made = self._make([p for p in self.parameters if id(p) in self._left])
        made = self._made.pop(id(parameter))
        self.done(parameter)
        return made

    def rows_of(self, parameter: Tensor, samples: slice) -> Tensor:
        """Return what some samples contribute to one parameter."""
        return self._rows(samples, [parameter])[0]

    def done(self, parameter: Tensor) -> None:
        """Let go of the calls once the last parameter has been asked for."""
        self._made.pop(id(parameter), None)
        self._left.discard(id(parameter))
        if not self._left:
            self.calls = []

    def _make(self, parameters: list[nn.Parameter]) -> dict[int, tuple[Tensor, Tensor]]:
        count = self.replayed.layer.call.samples.count

        def zeros(p: Tensor) -> Tensor:
            return torch.zeros(p.shape, dtype=compute_dtype([p.dtype]), device=p.device)

        made = {id(p): (zeros(p), zeros(p)) for p in parameters}
        for piece in pieces(count, sum(p.numel() for p in parameters)):
            rows = self._rows(piece, parameters)
            for (total, squares), row in zip(made.values(), rows, strict=True):
                # Not in place: the gradients of two parameters may be views of one tensor.
                wide = row.to(squares.dtype)
                total.add_(wide.sum(0))
                squares.add_(wide.square().sum(0))
        return made

    def _rows(self, samples: slice, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the contributions of some samples, summed over the module's calls."""
        sums: list[Tensor] | None = None
        for call in self.calls:
            rows = self._rows_through(call, samples, parameters)
            sums = rows if sums is None else [a + b for a, b in zip(sums, rows, strict=True)]
        assert sums is not None
        return sums

    def _rows_through(
        self, call: Call, samples: slice, parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return contributions by one call: by the first reading of it that gives its outputs."""
        first: Exception | None = None
        while True:
            try:
                rows = self._checked(call, samples, parameters)
            except Exception as error:
                first = first or error
                if not call.read_otherwise():
                    raise first from first.__cause__
            else:
                del call.ways[1:]
                return rows

    def _checked(self, call: Call, samples: slice, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the contributions of some samples through one call of the module."""
        inputs, errors = call.cut(samples)
        contribution = partial(call.contribution, parameters)
        try:
            with warnings.catch_warnings():
                # That vmap is slow for some operation is the fallback's own warning.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                rows, ys = torch.func.vmap(contribution)(inputs, errors)
        except RuntimeError:
            # An operation that vmap has no rule for: sample by sample then.
            rows, ys = call.one_by_one(parameters, inputs, errors)
        for own, of_batch in call.sketches_of(samples, ys):
            expected, norm = of_batch.unbind(1)
            near = (own[:, 0] - expected).abs() <= TOLERANCE * norm
            # What was not finite in the batch either says nothing.
            if not bool((near | ~expected.isfinite()).all()):
                raise RuntimeError(
                    f"{self.replayed.layer.name} ({type(self.replayed.module).__name__}) gives"
                    " another output for a sample alone than within the batch: it mixes samples,"
                    " draws random numbers, or was changed between forward and backward (its"
                    " weights, train() or eval())."
                    " Its per-sample squares are not defined; use MicroBatchSquares"
                )
        return list(rows)
