"""The models that are counted, by the shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.step.models import Shape, llama

# Eight heads of 128, in each of the three.
KV = 1024
# In a block: four matrices of attention, three of the feed-forward network, two norms.
TENSORS_A_LAYER = 9


@dataclass(frozen=True)
class Model:
    """A Llama 3 (arXiv 2407.21783, table 3).

    Attributes:
        name: what it is called.
        layers: number of blocks.
        width: of the model.
        hidden: width of the feed-forward network.
        published: number of parameters that its model card says.
    """

    name: str
    layers: int
    width: int
    hidden: int
    published: float

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every tensor, the embedding first, norm and output last."""
        return tuple(llama(self.width, self.layers, KV, self.hidden, head=True))

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return _elements(self.shapes)

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Elements of what FSDP2 gathers together: each block, and what is outside of them."""
        block = _elements(self.shapes[1 : 1 + TENSORS_A_LAYER])
        return (*[block] * self.layers, self.parameters - self.layers * block)

    def largest_shard(self, shards: int) -> int:
        """Return the elements of the process that has the most.

        FSDP2 cuts the first dimension of every tensor as ``torch.chunk`` does: the first process
        has a whole share of each, and where there are more processes than rows, the last have none.
        """
        return sum(-(-first // shards) * math.prod(rest) for first, *rest in self.shapes)


def _elements(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


MODELS = (
    Model("8 B", 32, 4096, 14336, 8.03e9),
    Model("70 B", 80, 8192, 28672, 70.6e9),
    Model("405 B", 126, 16384, 53248, 406e9),
)
