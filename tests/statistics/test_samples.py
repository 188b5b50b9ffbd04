"""What a sample is: a token, a segment of a packed sequence, or one of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_parts import even_kernels
from marks import both_backends, each_reduction
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    check_squares,
    mean_square_of,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = even_kernels


@each_reduction
@both_backends
def test_tokens_as_samples(backend: str, reduction: str) -> None:
    """Every position is a sample: the same as a batch of B T samples without time."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, 4, 4))
    plain = copy.deepcopy(model)
    factor = 12 if reduction == "mean" else 1

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 3)) / factor

    expected = Expected.of(plain, [(x.reshape(12, 4),)], loss, reduction)
    statistics = PerSampleSquares(model, reduction, sample="token", backend=backend)
    backward(model, [(x,)], loss)
    check_squares(statistics, model, expected)


@both_backends
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_of_a_language_model(backend: str, tied: bool) -> None:
    (model,) = to(DTYPES[backend], LanguageModel(tied=tied))
    ids = randint(3, 3, 4)
    plain = copy.deepcopy(model)

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 7)) / 12

    expected = Expected.of(plain, [(ids.reshape(12, 1),)], loss)
    statistics = PerSampleSquares(model, sample="token", backend=backend)
    backward(model, [(ids,)], loss)
    check_squares(statistics, model, expected)


@both_backends
def test_tokens_of_a_module_used_twice(backend: str) -> None:
    shared = nn.Linear(4, 4)
    model, x = to(DTYPES[backend], nn.Sequential(shared, nn.Tanh(), shared), randn(3, 4, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 4)) / 12

    expected = Expected.of(copy.deepcopy(model), [(x.reshape(12, 4),)], loss)
    statistics = PerSampleSquares(model, sample="token", backend=backend)
    backward(model, [(x,)], loss)
    check_squares(statistics, model, expected)


def test_tokens_that_are_pooled_are_refused() -> None:
    """A layer behind the pooling has B rows and not B T: its tokens are not the samples."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(1))

    model, x = to(torch.float64, Pooled(), randn(3, 5, 4))
    PerSampleSquares(model, sample="token")
    with pytest.raises(RuntimeError, match="head"):
        model(x).sum().backward()


LENGTHS = {"ragged": [3, 1, 4], "empty-within": [2, 0, 3], "empty-ends": [0, 4, 0], "one": [5]}


@both_backends
@pytest.mark.parametrize("leading", [True, False], ids=["1-tokens", "tokens"])
@pytest.mark.parametrize("name", LENGTHS)
def test_segments(name: str, leading: bool, backend: str) -> None:
    """Packed sequences are samples; an empty one has a row of zeros and counts."""
    lengths = LENGTHS[name]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    model = nn.Sequential(
        nn.Embedding(3, 4), nn.Linear(4, 5), nn.RMSNorm(5), nn.LayerNorm(5), nn.Linear(5, 3)
    )
    model, ids = to(DTYPES[backend], model, randint(3, tokens))
    n = len(lengths)

    def loss(out: Tensor) -> Tensor:
        errors = squared_error("sum")(out.reshape(tokens, -1))
        parts = [errors[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return torch.stack(parts) / n

    expected = Expected.of(copy.deepcopy(model), [(ids,)], loss)
    statistics = PerSampleSquares(model, backend=backend)
    with statistics.segments(ends.to(DEVICE, torch.int32)):
        out = model(ids[None] if leading else ids)
    loss(out).sum().backward()
    check_squares(statistics, model, expected)


def test_segments_then_dense() -> None:
    """The context ends: the next forward has a batch dimension again, and both add up."""
    model, x = to(torch.float64, nn.Linear(4, 3), randn(6, 4))
    loss = squared_error("sum")

    def packed(out: Tensor) -> Tensor:
        errors = loss(out)
        return torch.stack((errors[:2].sum(), errors[2:].sum())) / 5

    plain = copy.deepcopy(model)
    rows = rows_of(packed(plain(x)), list(plain.parameters()))
    later = rows_of(loss(plain(x[:3])) / 5, list(plain.parameters()))
    statistics = PerSampleSquares(model)
    with statistics.segments(torch.tensor([0, 2, 6], device=DEVICE)):
        out = model(x)
    packed(out).sum().backward()
    (loss(model(x[:3])) / 5).sum().backward()
    assert statistics.samples == 5
    for p, first, second in zip(model.parameters(), rows, later, strict=True):
        q = mean_square_of(torch.cat((first, second)))
        assert_near(statistics.mean_square(p), q, 1e-11, "packed and dense")
