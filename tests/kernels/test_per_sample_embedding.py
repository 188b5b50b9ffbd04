"""Squares of an embedding table: the kernels against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from sums import check
from torch.nn import functional as F  # noqa: N812

from fusedopt.kernels.per_sample import embedding as kernels
from fusedopt.statistics.ops.samples import Samples
from fusedopt.statistics.ops.triton_embedding import embedding


def check_table(result, ids, e, sample_of, vocabulary, padding_idx=None, before=None):
    """Compare with tables ``[samples, vocabulary, width]``, filled token by token."""
    count = max(sample_of, default=-1) + 1
    rows = torch.zeros(count, vocabulary, e.shape[-1], dtype=torch.float64, device=e.device)
    sizes = torch.zeros_like(rows)
    flat = e.reshape(-1, e.shape[-1]).double()
    for sample, token, error in zip(sample_of, ids.flatten().tolist(), flat, strict=True):
        if token != padding_idx:
            rows[sample, token] += error
            sizes[sample, token] += error.abs()
    check(*result, rows, sizes, before)


def dense(ids):
    return [sample for sample, row in enumerate(ids) for _ in row]


@pytest.fixture(params=(32, 4, 1), ids=lambda chunk: f"chunks of {chunk}")
def chunk(request, monkeypatch: pytest.MonkeyPatch) -> int:
    """Short chunks, so that runs of keys and of ids reach over many of them."""
    monkeypatch.setattr(kernels, "CHUNK", request.param)
    if request.param < 32:
        monkeypatch.setattr(kernels, "AT_ONCE", 2)
        monkeypatch.setattr(kernels, "JOIN_ROWS", 2)
        monkeypatch.setattr(kernels, "BLOCK", 4)
        monkeypatch.setattr(kernels, "JOIN_BLOCK", 2)
    return request.param


@pytest.mark.parametrize(
    ("shape", "vocabulary"),
    (
        ((1, 1), 1),
        ((4, 5), 50),  # hardly a token twice
        ((4, 5), 3),  # every token in every sample, and repeated
        ((1, 18), 2),  # runs of one sample longer than a chunk
        ((18, 1), 2),  # an id's run over several chunks, samples apart
        ((3, 6), 1),
    ),
)
def test_tables(shape, vocabulary, device, chunk):
    ids = torch.randint(vocabulary, shape, device=device)
    e = torch.randn(*shape, 5, device=device)
    result = embedding(ids, e, Samples(shape[0]), vocabulary, None, torch.float32)
    check_table(result, ids, e, dense(ids), vocabulary)
    again = embedding(ids, e, Samples(shape[0]), vocabulary, None, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


@pytest.mark.parametrize("padding_idx", (None, 1))
def test_nothing_is_stored_twice(padding_idx, device, chunk, monkeypatch):
    # Catches a zero that is stored first and replaced later: threads are not ordered between.
    if device.type != "cpu":
        pytest.skip("stores are counted in the interpreter")
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    real = builder.create_masked_store
    stored = []

    def store(self, pointers, value, mask, *options):
        stored.extend(pointers.data[mask.data].tolist())
        return real(self, pointers, value, mask, *options)

    monkeypatch.setattr(builder, "create_masked_store", store)
    ids = torch.randint(3, (4, 18), device=device)
    ids[1, :9] = 2
    e = torch.randn(4, 18, 5, device=device)
    result = embedding(ids, e, Samples(4), 3, padding_idx, torch.float32)
    check_table(result, ids, e, dense(ids), 3, padding_idx)
    assert len(stored) >= 2 * 2 * 5
    assert len(stored) == len(set(stored))


@pytest.mark.parametrize("padding_idx", (0, 1, 3))
def test_padding(padding_idx, device, chunk):
    ids = torch.randint(4, (3, 6), device=device)
    ids[0, :3] = padding_idx
    e = torch.randn(3, 6, 5, device=device)
    result = embedding(ids, e, Samples(3), 4, padding_idx, torch.float32)
    check_table(result, ids, e, dense(ids), 4, padding_idx)
    assert not result[0][padding_idx].any() and not result[1][padding_idx].any()


def test_nothing_but_padding(device, chunk):
    ids = torch.full((2, 5), 1, device=device)
    e = torch.full((2, 5, 3), float("nan"), device=device)
    for table in embedding(ids, e, Samples(2), 3, 1, torch.float32):
        assert torch.equal(table, torch.zeros(3, 3, device=device))


def test_ids_that_never_occur_stay_zero(device):
    ids = torch.tensor([[1, 4, 1], [4, 4, 1]], device=device)
    e = torch.randn(2, 3, 5, device=device)
    for table in embedding(ids, e, Samples(2), 6, None, torch.float32):
        assert table.any(1).tolist() == [False, True, False, False, True, False]
        assert torch.equal(table[[0, 2, 3, 5]], torch.zeros(4, 5, device=device))


@pytest.mark.parametrize("lengths", ((0, 3, 0, 7, 1, 0), (9,), (1, 1, 1)))
@pytest.mark.parametrize("integers", (torch.int32, torch.int64))
def test_segments(lengths, integers, device, chunk):
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(integers)
    ids = torch.randint(3, (sum(lengths),), device=device, dtype=integers)
    e = torch.randn(len(ids), 5, device=device)
    result = embedding(ids, e, Samples(len(lengths), offsets), 3, None, torch.float32)
    sample_of = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    check_table(result, ids, e, sample_of, 3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_types(dtype, device):
    ids = torch.randint(3, (3, 4), device=device, dtype=torch.int32)
    e = torch.randn(3, 4, 5, device=device).to(dtype)
    result = embedding(ids, e, Samples(3), 3, None, dtype)
    assert result[0].dtype == dtype
    check_table(result, ids, e, dense(ids), 3)
    alone = embedding(ids, e, Samples(3), 3, None, None)
    assert alone[0] is None and torch.equal(alone[1], result[1])


def test_strides(device):
    ids = torch.randint(3, (4, 3), device=device).t()
    e = torch.randn(5, 4, 3, 2, device=device)[..., 1].permute(2, 1, 0)
    assert e.shape == (3, 4, 5) and not ids.is_contiguous()
    result = embedding(ids, e, Samples(3), 3, None, torch.float32)
    check_table(result, ids, e, dense(ids), 3)
    row = torch.randn(5, device=device).expand(3, 4, 5)
    check_table(embedding(ids, row, Samples(3), 3, None, torch.float32), ids, row, dense(ids), 3)


@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
def test_squares_are_added_to(layout, device, chunk):
    ids = torch.randint(3, (3, 6), device=device)
    e = torch.randn(3, 6, 5, device=device)
    squares = torch.rand(4, 5, device=device)
    if layout == "transposed":
        squares = torch.rand(5, 4, device=device).t()
    before = squares.double()
    gradient, result = embedding(ids, e, Samples(3), 4, None, torch.float32, squares)
    assert result is squares
    check_table((gradient, result), ids, e, dense(ids), 4, None, before)


@pytest.mark.parametrize("shape", ((0, 3, 4), (2, 0, 4), (2, 3, 0)))
def test_nothing_to_sum(shape, device):
    ids = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    e = torch.randn(shape, device=device)
    before = torch.rand(5, shape[2], device=device)
    kept = before.clone()
    gradient, squares = embedding(ids, e, Samples(shape[0]), 5, None, torch.float16, before)
    assert squares is before and torch.equal(before, kept)
    assert torch.equal(gradient, torch.zeros(5, shape[2], dtype=torch.float16, device=device))


def test_by_torch_func(device):
    table = torch.randn(5, 3, device=device)
    ids = torch.tensor([[1, 2, 1, 0], [4, 4, 4, 2], [0, 0, 1, 1]], device=device)
    target = torch.randn(3, 4, 3, device=device)

    def loss(table, ids, target):
        return F.embedding(ids, table, padding_idx=2).sub(target).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(table, ids, target)
    e = 2 * (table[ids] - target)
    gradient, squares = embedding(ids, e, Samples(3), 5, 2, torch.float32)
    torch.testing.assert_close(gradient, rows.sum(0))
    torch.testing.assert_close(squares, rows.square().sum(0))


def test_wrong_shapes(device):
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    e = torch.zeros(2, 3, 4, device=device)
    with pytest.raises(ValueError, match="dimensions"):
        embedding(ids[0], e[0], Samples(2), 5, None, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        embedding(ids, e[:, :2], Samples(2), 5, None, torch.float32)
    with pytest.raises(ValueError, match="expected 3"):
        embedding(ids, e, Samples(3), 5, None, torch.float32)
