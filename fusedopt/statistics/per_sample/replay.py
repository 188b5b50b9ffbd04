"""One call of a module of unknown kind, which is run again on single samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...memory.dtypes import compute_dtype
from ...memory.layout import real_view
from . import batch_dims
from .instrument import original_class
from .layer_call import LayerCall
from .ownership import set_by_hooks


@dataclass(frozen=True)
class Replayed:
    """A module of unknown kind in one call of the model.

    Attributes:
        layer: its call.
        module: itself.
        named: the identity of each of its parameters, by all of their names.
    """

    layer: LayerCall
    module: nn.Module
    named: Mapping[str, int]


@dataclass
class Call:
    """One call of the module, which it runs again on single samples.

    Attributes:
        source: the module.
        structure: of its arguments.
        rest: arguments that are no tensors.
        inputs: arguments that are, by their places.
        buffers: those of the module, as the call found them.
        fixed: the inputs' batch dimensions by their places, where they are known.
        places: of the differentiable outputs.
        autocast: the state that the call found.
        errors: the gradients of the outputs.
        sketches: of the outputs, for each dimension that may be the batch.
        ways: to read the dimensions, which are left to be tried; the first is in use.
    """

    source: Replayed
    structure: TreeSpec
    rest: list[Any]
    inputs: dict[int, Tensor]
    buffers: dict[str, Tensor]
    fixed: dict[int, int] | None
    places: list[int]
    autocast: torch.autocast
    errors: Sequence[Tensor]
    sketches: Sequence[Sequence[tuple[int, Tensor]]]
    ways: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        layer = self.source.layer
        count = layer.call.samples.count
        exact = list(self._exact_ways(count))
        # Only where it would be refused otherwise.
        ways = exact or list(self._folded_ways(count))
        if not ways:
            shapes = [tuple(t.shape) for t in (*self.inputs.values(), *self.errors)]
            raise RuntimeError(
                f"{layer.name}: its inputs and outputs, of shapes {shapes}, do not all have a batch"
                f" dimension of size {count}"
            )
        self.ways = ways
        self._read()

    def _exact_ways(self, count: int) -> Iterator[tuple[Any, ...]]:
        """Go through ways to read the dimensions where the batch is one of them."""
        dims = {i: self._input_dims(i, x) for i, x in self.inputs.items()}
        self._batched = [i for i, own in dims.items() if own]
        outputs = [[own for own in sketch if len(own[1]) == count] for sketch in self.sketches]
        if self._batched and all(outputs):
            ways = itertools.product(*(dims[i] for i in self._batched), *outputs)
            yield from itertools.islice(ways, batch_dims.MOST_WAYS)

    def _folded_ways(self, count: int) -> Iterator[tuple[Any, ...]]:
        """Go through the way in which samples are flattened into rows, if there is one."""
        if self.source.layer.call.is_packed or self.fixed is not None:
            return
        self._batched = [i for i, x in self.inputs.items() if batch_dims.folded(x, count)]
        # The sketches of rows, where these are in front.
        first = [dict(sketch).get(0) for sketch in self.sketches]
        outputs = [
            (None, own)
            for own, e in zip(first, self.errors, strict=True)
            if own is not None and batch_dims.folded(e, count)
        ]
        if self._batched and len(outputs) == len(first):
            yield (*(None for _ in self._batched), *outputs)

    def _input_dims(self, place: int, x: Tensor) -> list[int]:
        if self.fixed is None:
            return batch_dims.candidates(self.source.layer, x)
        return batch_dims.exactly(self.source.layer, x, self.fixed[place])

    def _read(self) -> None:
        way, n = self.ways[0], len(self._batched)
        self.input_dims: dict[int, int | None] = dict(zip(self._batched, way[:n], strict=True))
        self.output_dims: list[int | None] = [dim for dim, _ in way[n:]]
        self.expected: list[Tensor] = [sketch for _, sketch in way[n:]]

    def read_otherwise(self) -> bool:
        """Take the next way to read the dimensions, if there is one."""
        if len(self.ways) == 1:
            return False
        del self.ways[0]
        self._read()
        return True

    def cut(self, samples: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Return inputs and errors of some samples, the batch in front."""
        count, front = self.source.layer.call.samples.count, batch_dims.in_front
        inputs = [front(self.inputs[i], dim, count) for i, dim in self.input_dims.items()]
        errors = zip(self.errors, self.output_dims, strict=True)
        own = [front(e, dim, count)[samples] for e, dim in errors]
        return [x[samples] for x in inputs], own

    def sketches_of(self, samples: slice, outputs: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Give sketches of what samples alone return, beside those of the batch."""
        count = self.source.layer.call.samples.count
        for y, sketch, dim in zip(outputs, self.expected, self.output_dims, strict=True):
            if dim is None:
                # Row by row.
                expected = sketch.unflatten(0, (count, -1))[samples].flatten(0, 1)
                yield sketch_of(y.flatten(0, 1), 0), expected
            else:
                yield sketch_of(y, 0), sketch[samples]

    def contribution(
        self, chosen: Sequence[Tensor], inputs: list[Tensor], errors: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return one sample's contribution to the chosen parameters, and the outputs for it."""
        source = self.source
        own = dict(self.inputs)
        for (i, dim), x in zip(self.input_dims.items(), inputs, strict=True):
            own[i] = batch_dims.alone(x, dim)
        leaves = [own.get(i, x) for i, x in enumerate(self.rest)]
        arguments, keywords = tree_unflatten(leaves, self.structure)

        def run(parameters: list[Tensor]) -> list[Tensor]:
            values = dict(zip(map(id, chosen), parameters, strict=True))
            # A sample leaves its marks on a copy.
            named = {name: buffer.clone() for name, buffer in self.buffers.items()}
            named |= {name: values[i] for name, i in source.named.items() if i in values}
            plain = _composed(isinstance(source.module, nn.RNNBase))
            with source.layer.call.options.paused(), self.autocast, plain, uncached():
                # Children keep theirs, whose uses are their own.
                result = torch.func.functional_call(
                    Alone(source.module),
                    {f"inner.{name}": tensor for name, tensor in named.items()},
                    arguments,
                    keywords,
                    tie_weights=False,
                )
            flat, _ = tree_flatten(result)
            places = zip(self.places, self.output_dims, strict=True)
            return [batch_dims.without(flat[i], dim) for i, dim in places]

        made: Any = torch.func.vjp(run, [p.detach() for p in chosen])
        outputs, pull = made
        # Types are those of forward, whatever backward is called under.
        with torch.autocast(errors[0].device.type, enabled=False):
            return pull(errors)[0], outputs

    def one_by_one(
        self, chosen: Sequence[Tensor], inputs: list[Tensor], errors: list[Tensor]
    ) -> tuple[Any, Any]:
        """Do what vmap of ``contribution`` does, for modules that it cannot transform."""
        layer, kind = self.source.layer, type(self.source.module).__name__
        try:
            made = [
                self.contribution(chosen, [x[b] for x in inputs], [e[b] for e in errors])
                for b in range(len(inputs[0]))
            ]
        except Exception as error:
            raise RuntimeError(
                f"{layer.name} ({kind}): its per-sample squares are not known, and torch.func"
                f" cannot run it on one sample ({error}). Freeze its parameters, replace it, or use"
                " MicroBatchSquares"
            ) from error
        rows, outputs = zip(*made, strict=True)
        return _stacked(rows), _stacked(outputs)


class Alone(nn.Module):
    """Runs what a module computes, without what users have hooked to its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the module's own forward."""
        inner = self.inner
        if any(True for _ in set_by_hooks(inner)):
            # Weights are set by them.
            for key, hook in inner._forward_pre_hooks.items():
                more = (keywords,) if key in inner._forward_pre_hooks_with_kwargs else ()
                hook(inner, arguments, *more)  # type: ignore[call-arg]
        return original_class(inner).forward(inner, *arguments, **keywords)


@contextmanager
def uncached() -> Iterator[None]:
    """Compute parametrized weights, where the user caches those of the call that was observed."""
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@contextmanager
def _composed(recurrent: bool) -> Iterator[None]:
    """Let torch compose recurrent layers of ordinary operations.

    Those that oneDNN and cuDNN have fused keep workspaces of which torch.func knows nothing.
    """
    backends = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    if recurrent:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        if recurrent:
            torch._C._set_mkldnn_enabled(backends[0])
            torch._C._set_cudnn_enabled(backends[1])


def _stacked(samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*samples, strict=True)]


def sketch_of(y: Tensor, dim: int) -> Tensor:
    """Return each sample's projection on one vector, and its norm, as ``[batch, 2]``.

    The vector is as good as random: what changes the output by some share of its norm changes the
    projection by about as much, however large the output is. A plain sum would average it away.
    """
    y = real_view(y.detach().movedim(dim, 0))
    y = y.to(compute_dtype([y.dtype]))
    y = y.unsqueeze(-1).flatten(1)
    vector = torch.arange(y.shape[1], dtype=y.dtype, device=y.device).square_().cos_()
    with torch.autocast(y.device.type, enabled=False):
        return torch.stack((y.mv(vector), torch.linalg.vector_norm(y, dim=1)), 1)
