"""Parameter sets to step: shapes of published models, and sets that are hard for other reasons."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A set of tensors.

    Attributes:
        name: on the command line and in results.
        source: where the shapes are from.
        shapes: of every tensor.
        channels_last: whether tensors of four dimensions are stored that way.
        shift: elements that parameters and gradients start behind an aligned address.
    """

    name: str
    source: str
    shapes: tuple[Shape, ...]
    channels_last: bool = False
    shift: int = 0

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(map(math.prod, self.shapes))


def _gpt2() -> Iterator[Shape]:
    width = 768
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from ((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (width, 4 * width), (4 * width,))
        yield from ((4 * width, width), (width,))
    yield from ((width,), (width,))


def llama(width: int, layers: int, kv: int, hidden: int, head: bool) -> Iterator[Shape]:
    """Yield what a Llama 3 has.

    Args:
        width: of the model.
        layers: number of blocks.
        kv: outputs of keys, and of values: of all their heads together.
        hidden: width of the feed-forward network.
        head: whether the output has a matrix of its own.
    """
    vocabulary = 128256
    yield vocabulary, width
    for _ in range(layers):
        yield from ((width, width), (kv, width), (kv, width), (width, width))
        yield from ((hidden, width), (hidden, width), (width, hidden), (width,), (width,))
    yield (width,)
    if head:
        yield vocabulary, width


def _shard(shapes: Iterator[Shape], processes: int) -> Iterator[Shape]:
    for first, *rest in shapes:
        assert first % processes == 0
        yield first // processes, *rest


def _many() -> Iterator[Shape]:
    sizes = random.Random(0)
    for _ in range(10_000):
        # Of every order of magnitude alike, as biases, norms and small matrices are.
        yield (round(64_000 ** sizes.random()),)


def _odd() -> Iterator[Shape]:
    for _ in range(12):
        yield from ((1,), (3,), (127,), (1023,), (1025,), (257, 129), (65537,), (2_000_003,))


def _bottleneck(inputs: int, width: int, outputs: int, projects: bool) -> Iterator[Shape]:
    yield from ((width, inputs, 1, 1), (width,), (width,))
    yield from ((width, width, 3, 3), (width,), (width,))
    yield from ((outputs, width, 1, 1), (outputs,), (outputs,))
    if projects:
        yield from ((outputs, inputs, 1, 1), (outputs,), (outputs,))


def _resnet50() -> Iterator[Shape]:
    yield from ((64, 3, 7, 7), (64,), (64,))
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _bottleneck(inputs, width, 4 * width, projects=block == 0)
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


_BUILDERS: dict[str, tuple[str, Callable[[], Iterator[Shape]]]] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", the released 124M:
    # n_layer 12, n_embd 768, n_ctx 1024, n_vocab 50257; the head's weight is the embedding's.
    "gpt2": ("GPT-2 124M, Radford et al. 2019", _gpt2),
    # meta-llama/Llama-3.2-1B, config.json: hidden_size 2048, 16 layers, 32 heads of 64, 8 of keys
    # and values, intermediate_size 8192, vocab_size 128256, tie_word_embeddings true.
    "llama-3.2-1b": ("Llama-3.2-1B, config.json", lambda: llama(2048, 16, 512, 8192, head=False)),
    # meta-llama/Meta-Llama-3-8B, config.json, and arXiv 2407.21783, table 3: hidden_size 4096, 32
    # layers, 32 heads of 128, 8 of keys and values, intermediate_size 14336. FSDP2 gives each of
    # eight processes an eighth of every tensor's first dimension.
    "llama-3-8b-shard": (
        "Llama-3-8B, arXiv 2407.21783 table 3, one of eight FSDP2 shards",
        lambda: _shard(llama(4096, 32, 1024, 14336, head=True), 8),
    ),
    "many": ("10,000 tensors of 1 to 64 thousand elements, seed 0", _many),
    # Behind 2^31 a 32-bit index has wrapped; whole and ragged chunks are on either side.
    "huge": ("one tensor just above 2^31 elements", lambda: iter([(2**31 + 4099,)])),
    "odd": ("odd sizes at addresses that are no multiples of 16 bytes", _odd),
    # He et al., arXiv 1512.03385, table 1, as torchvision's resnet50 has it.
    "conv": ("ResNet-50, arXiv 1512.03385 table 1, channels_last", _resnet50),
}
CASES = tuple(_BUILDERS)


@cache
def case(name: str) -> Case:
    """Return the set of tensors of a name in ``CASES``."""
    source, build = _BUILDERS[name]
    shift = 1 if name == "odd" else 0
    return Case(name, source, tuple(build()), channels_last=name == "conv", shift=shift)


def tiny(name: str, tensors: int = 8, side: int = 12) -> Case:
    """Return the first few tensors of a case, cut down: to check the benchmark, not to measure."""
    whole = case(name)
    long = {"huge": 5000, "odd": 1100}.get(name, side)
    shapes = tuple(_cut(shape, long if len(shape) == 1 else side) for shape in whole.shapes)
    return Case(name, whole.source, shapes[:tensors], whole.channels_last, whole.shift)


def _cut(shape: Sequence[int], side: int) -> Shape:
    return tuple(min(n, side) for n in shape)
