"""The kernels of per-sample squares, for layers of usual shapes.

Their tiles and strides follow the shapes of a model, so that no list of them is complete. What is
run here: linear layers, biases, normalisations and embeddings whose widths are multiples of 16, on
contiguous tensors with one gradient in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.aot.samples import WIDTHS
from ..kernels.per_sample import vectors
from ..statistics.ops import triton_embedding, triton_linear, triton_vectors
from ..statistics.ops.samples import Samples
from .cases import TORCH_DTYPES, Case

# Type of errors and inputs, and type of the gradient; they differ under autocast.
TYPES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))

# Samples and positions of each: whole row blocks, and enough for a sum to be split.
SAMPLES, LENGTH = 32, 128
VOCABULARY = 4096
# More than a weight of the widths has tiles.
PROCESSORS = 8192
# Columns of which a device is full of programs when 128 share a sample, and positions that one
# program takes of a sample that is shared.
VECTOR_WIDTH = 1024
SHARE = triton_vectors.MIN_TILES * vectors.TILE // vectors.BLOCK

Operation = Callable[[Tensor, torch.dtype, bool], None]


def cases() -> Iterator[Case]:
    """Every operation on every mix of types."""
    for operands, gradient in TYPES:
        for name, operation in _operations():
            yield _case(name, operation, operands, gradient)


def _case(name: str, operation: Operation, operands: str, gradient: str) -> Case:
    types = operands if operands == gradient else f"{operands}/{gradient} gradient"

    def run() -> None:
        # Without pages of its own until it is written, which it never is.
        memory = torch.empty(SAMPLES, LENGTH, max(WIDTHS), dtype=TORCH_DTYPES[operands])
        # The second pass of an accumulation adds to the squares of the first.
        for accumulate in (False, True):
            operation(memory, TORCH_DTYPES[gradient], accumulate)

    return Case(f"{name} {types}", None, frozenset((operands, gradient)), run)


def _operations() -> Iterator[tuple[str, Operation]]:
    for width in WIDTHS:
        for form in ("sequences", "rows", "segments"):
            # One processor has whole tiles alone; of many, each has a share.
            for processors in (1, PROCESSORS):
                name = f"linear {width} {form} on {processors}"
                yield name, _linear(width, processors, form)
    yield "bias", _bias
    yield "gain", _gain
    yield "RMSNorm gain", _rms_gain
    yield "gain and bias", _gain_and_bias
    yield "embedding", _embedding


def _linear(width: int, processors: int, form: str) -> Operation:
    def run(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
        x = memory[..., :width].contiguous() if width < memory.shape[-1] else memory
        samples = Samples(SAMPLES)
        if form == "rows":
            x = x[:, :1].contiguous()
        elif form == "segments":
            x = x.flatten(0, 1)
            samples = Samples(SAMPLES, torch.zeros(SAMPLES + 1, dtype=torch.int32))
        squares = _squares(accumulate, width, width)
        forced = processors, False
        triton_linear.linear_in_tiles(x, x, samples, dtype, squares, forced=forced)

    return run


def _squares(accumulate: bool, *shape: int) -> Tensor | None:
    return torch.empty(shape, dtype=torch.float32) if accumulate else None


def _batches(memory: Tensor, accumulate: bool) -> Iterator[Tensor]:
    """Yield errors in the forms between which a sum over positions chooses."""
    rows = memory.view(-1, VECTOR_WIDTH)
    yield rows[:SAMPLES].view(SAMPLES, 1, -1)
    # One sample: the longer it is, the more programs share it, and for each power of two of them
    # their sums are joined by another variant. Sums are seldom added to what is there.
    length = SHARE
    while length <= (SHARE if accumulate else SHARE * vectors.FINISH_ROWS):
        yield rows[:length].view(1, length, -1)
        length *= 2


def _norms(e: Tensor) -> Tensor:
    return torch.empty(e.shape[:-1], dtype=torch.float32)


def _bias(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    for e in _batches(memory, accumulate):
        squares = _squares(accumulate, e.shape[-1])
        triton_vectors.vector(e, Samples(len(e)), dtype, squares)


def _gain(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    for e in _batches(memory, accumulate):
        norms, squares = _norms(e), _squares(accumulate, e.shape[-1])
        triton_vectors.affine(e, e, norms, norms, Samples(len(e)), dtype, squares)


def _rms_gain(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    for e in _batches(memory, accumulate):
        squares = _squares(accumulate, e.shape[-1])
        triton_vectors.affine(e, e, None, _norms(e), Samples(len(e)), dtype, squares)


def _gain_and_bias(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    for e in _batches(memory, accumulate):
        norms, width = _norms(e), e.shape[-1]
        squares = _squares(accumulate, width), _squares(accumulate, width)
        triton_vectors.affine_and_bias(e, e, norms, norms, Samples(len(e)), dtype, *squares)


def _embedding(memory: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    ids = torch.zeros(memory.shape[:2], dtype=torch.int64)
    squares = _squares(accumulate, VOCABULARY, memory.shape[-1])
    triton_embedding.embedding(ids, memory, Samples(len(memory)), VOCABULARY, None, dtype, squares)
