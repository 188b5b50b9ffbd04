"""Modules whose squares are not known: per-sample gradients through torch.func, module by module.

The module alone is run again on each sample, and differentiated with the error that arrived at its
output. That costs another forward and backward pass of the module, and memory for the gradients of
a few samples at a time; only the module's own parameters are concerned, not those of its children.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .gates import Mode, observe
from .layers import Site
from .uses import FallbackUse

# Gradient elements formed at once.
CHUNK_ELEMENTS = 1 << 20


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters, those that parametrise them included."""
    own = dict(module.named_parameters(recurse=False))
    if nn.utils.parametrize.is_parametrized(module):
        inner: Any = module.parametrizations
        own |= {f"parametrizations.{name}": p for name, p in inner.named_parameters()}
    return own


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


def functional(site: Site, module: nn.Module, plain: Any, arguments: Any, keywords: Any) -> Any:
    """Run a module of any kind, and note what its own parameters' squares need."""
    leaves, structure = tree_flatten((arguments, keywords))
    outputs = plain(*arguments, **keywords)
    flat, out_structure = tree_flatten(outputs)
    places = [i for i, y in enumerate(flat) if isinstance(y, Tensor) and y.requires_grad]
    gates = {
        name: site.call.gate(site.statistics.record_of(p), Mode.BESIDE)
        for name, p in trained_parameters(module).items()
    }
    if not places or not gates:
        return outputs
    sources = site.call.fallbacks
    source = sources.setdefault(id(module), _Module(site, module))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    rest = [None if isinstance(x, Tensor) else x for x in leaves]

    def arrive(errors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        inputs = dict(zip(tensors, saved, strict=False))
        ys = saved[len(tensors) :]
        source.calls.append(_Call(structure, rest, inputs, places, ys, errors))
        for gate in gates.values():
            gate.add(FallbackUse(source))

    kept = [leaves[i].detach() for i in tensors] + [flat[i].detach() for i in places]
    observed = observe([flat[i] for i in places], arrive, list(gates.values()), kept)
    for i, y in zip(places, observed, strict=True):
        flat[i] = y
    return tree_unflatten(flat, out_structure)


class _Call:
    """One call of the module: inputs, outputs and the errors at them."""

    def __init__(
        self,
        structure: TreeSpec,
        rest: list[Any],
        inputs: dict[int, Tensor],
        places: list[int],
        outputs: Sequence[Tensor],
        errors: Sequence[Tensor],
    ) -> None:
        self.structure = structure
        self.rest = rest
        self.inputs = inputs
        self.places = places
        self.outputs = outputs
        self.errors = errors

    def arguments(self, own: dict[int, Tensor]) -> Any:
        """Put tensors back to where they stood among the arguments."""
        leaves = [own.get(i, self.inputs.get(i, x)) for i, x in enumerate(self.rest)]
        return tree_unflatten(leaves, self.structure)


class _Module:
    """The calls of one module within one call of the model: see ``uses.Fallback``."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        self.site = site
        self.module = module
        own = trained_parameters(module)
        self.names = list(own)
        self.parameters = list(own.values())
        self.calls: list[_Call] = []
        self._made: dict[int, Tensor] = {}

    def squares_of(self, parameter: Tensor) -> Tensor:
        """Return the squares of one parameter; those of all are made at the first request."""
        if not self._made:
            self._made = self._make()
            self.calls = []
        return self._made.pop(id(parameter))

    def _make(self) -> dict[int, Tensor]:
        count = self.site.call.samples.count
        size = max(1, CHUNK_ELEMENTS // max(1, sum(p.numel() for p in self.parameters)))
        size = min(size, max(1, count // 2))
        totals = [
            torch.zeros(
                p.shape,
                dtype=torch.float64 if p.dtype == torch.float64 else torch.float32,
                device=p.device,
            )
            for p in self.parameters
        ]
        for start in range(0, count, size):
            rows = self._rows(slice(start, min(start + size, count)))
            for total, row in zip(totals, rows, strict=True):
                # Not in place: the gradients of two parameters may be views of one tensor.
                total.add_(row.to(total.dtype).square().sum(0))
        return {id(p): total for p, total in zip(self.parameters, totals, strict=True)}

    def _rows(self, samples: slice) -> list[Tensor]:
        """Return the contributions of some samples, summed over the module's calls."""
        sums: list[Tensor] | None = None
        for call in self.calls:
            rows = self._rows_of(call, samples)
            sums = rows if sums is None else [a + b for a, b in zip(sums, rows, strict=True)]
        assert sums is not None
        return sums

    def _rows_of(self, call: _Call, samples: slice) -> list[Tensor]:
        """Return the contributions of some samples through one call of the module."""
        replay = _Replay(self, call)
        inputs, errors, outputs = replay.cut(samples)
        try:
            with warnings.catch_warnings():
                # That vmap is slow for some operation is the fallback's own warning.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                rows, ys = torch.func.vmap(replay.contribution)(inputs, errors)
        except RuntimeError:
            # An operation that vmap has no rule for: sample by sample then.
            rows, ys = replay.one_by_one(inputs, errors)
        for y, expected in zip(ys, outputs, strict=True):
            if not torch.allclose(y, expected.to(y.dtype), rtol=1e-2, atol=1e-2):
                raise RuntimeError(
                    f"{self.site.name} ({type(self.module).__name__}) gives another output for a"
                    " sample alone than within the batch: it mixes samples, or draws random"
                    " numbers. Its per-sample squares are not defined; use MicroBatchSquares"
                )
        return list(rows)


class _Replay:
    """Runs the module again on single samples of one of its calls."""

    def __init__(self, source: _Module, call: _Call) -> None:
        self.source = source
        self.call = call
        site = source.site
        dims = {i: _batch_dim(site, x) for i, x in call.inputs.items()}
        self.input_dims = {i: dim for i, dim in dims.items() if dim is not None}
        output_dims = [_batch_dim(site, y) for y in call.outputs]
        self.output_dims = [dim for dim in output_dims if dim is not None]
        if not self.input_dims or None in output_dims:
            shapes = [tuple(t.shape) for t in (*call.inputs.values(), *call.outputs)]
            raise RuntimeError(
                f"{site.name}: its inputs and outputs, of shapes {shapes}, do not all have a batch"
                f" dimension of size {site.call.samples.count}"
            )

    def cut(self, samples: slice) -> tuple[list[Tensor], ...]:
        """Return inputs, errors and outputs of some samples, the batch in front."""
        inputs = [
            self.call.inputs[i].movedim(dim, 0)[samples] for i, dim in self.input_dims.items()
        ]
        errors, outputs = (
            [t.movedim(dim, 0)[samples] for t, dim in zip(tensors, self.output_dims, strict=True)]
            for tensors in (self.call.errors, self.call.outputs)
        )
        return inputs, errors, outputs

    def contribution(
        self, inputs: list[Tensor], errors: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return one sample's contribution to each parameter, and the outputs for it."""
        source = self.source
        own = {
            i: x.unsqueeze(dim) for (i, dim), x in zip(self.input_dims.items(), inputs, strict=True)
        }

        def run(parameters: list[Tensor]) -> list[Tensor]:
            named = dict(zip(source.names, parameters, strict=True))
            arguments, keywords = self.call.arguments(own)
            with source.site.statistics.paused():
                result = torch.func.functional_call(source.module, named, arguments, keywords)
            flat, _ = tree_flatten(result)
            places = zip(self.call.places, self.output_dims, strict=True)
            return [flat[i].squeeze(dim) for i, dim in places]

        made: Any = torch.func.vjp(run, [p.detach() for p in source.parameters])
        outputs, pull = made
        return pull(errors)[0], outputs

    def one_by_one(self, inputs: list[Tensor], errors: list[Tensor]) -> tuple[Any, Any]:
        """Do what vmap of ``contribution`` does, for modules that it cannot transform."""
        site, kind = self.source.site, type(self.source.module).__name__
        try:
            made = [
                self.contribution([x[b] for x in inputs], [e[b] for e in errors])
                for b in range(len(inputs[0]))
            ]
        except Exception as error:
            raise RuntimeError(
                f"{site.name} ({kind}): its per-sample squares are not known, and torch.func cannot"
                f" run it on one sample ({error}). Freeze its parameters, replace it, or use"
                " MicroBatchSquares"
            ) from error
        rows, outputs = zip(*made, strict=True)
        return _stacked(rows), _stacked(outputs)


def _stacked(samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*samples, strict=True)]


def _batch_dim(site: Site, x: Tensor) -> int | None:
    """Find the dimension of the batch: where it is expected, or else the only one of its size."""
    count = site.call.samples.count
    expected = 0 if site.batch_first or x.dim() < 3 else 1
    if x.dim() > expected and x.shape[expected] == count:
        return expected
    found = [dim for dim, size in enumerate(x.shape) if size == count]
    return found[0] if len(found) == 1 else None
