"""Squares of bias and gain: the kernels against a loop over samples in float64."""

from __future__ import annotations

import pytest
import torch
from sums import check, rows_of
from torch import nn

from fusedopt.kernels.per_sample import vectors
from fusedopt.statistics.ops import triton_vectors
from fusedopt.statistics.ops.samples import Samples
from fusedopt.statistics.ops.triton_vectors import affine, affine_and_bias, plan, vector

# Samples, positions, columns: one of each; one position; one column block and a bit; one sample.
SHAPES = ((1, 1, 1), (40, 1, 33), (3, 5, 7), (2, 3, 130), (1, 300, 5), (17, 9, 16))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(shape, device, dtype=torch.float32):
    """Errors, input, mean and reciprocal deviation."""
    e = torch.randn(shape, device=device).to(dtype)
    x = torch.randn(shape, device=device).to(dtype)
    mean = torch.randn(shape[:-1], device=device)
    rstd = torch.rand(shape[:-1], device=device) + 0.5
    return e, x, mean, rstd


def gain_terms(e, x, mean, rstd):
    centred = x.double() if mean is None else x.double() - mean.double().unsqueeze(-1)
    return e.double() * centred * rstd.double().unsqueeze(-1)


def check_terms(result, terms, offsets=None, before=None):
    check(*result, rows_of(terms, offsets), rows_of(terms.abs(), offsets), before)


def check_both(result, e, x, mean, rstd, offsets=None, before=(None, None)):
    check_terms(result[:2], gain_terms(e, x, mean, rstd), offsets, before[0])
    check_terms(result[2:], e.double(), offsets, before[1])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 positions and 16 columns, and as many programs as there is work for."""
    monkeypatch.setattr(vectors, "TILE", 64)
    monkeypatch.setattr(vectors, "BLOCK", 16)
    monkeypatch.setattr(triton_vectors, "MIN_TILES", 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gain_and_bias(shape, device):
    e, x, mean, rstd = operands(shape, device)
    result = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    check_both(result, e, x, mean, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, device):
    e, x, mean, rstd = operands((3, 5, 7), device, dtype)
    samples = Samples(3)
    check_terms(vector(e, samples, dtype), e.double())
    for m in (mean, None):
        result = affine(e, x, m, rstd, samples, dtype)
        assert result[0].dtype == dtype
        check_terms(result, gain_terms(e, x, m, rstd))
    # Errors in 16 bits, an input that was kept in 32, and mean and deviation in 64.
    result = affine_and_bias(e, x.float(), mean.double(), rstd.double(), samples, torch.float32)
    check_both(result, e, x, mean, rstd)


def test_a_type_of_none_leaves_the_gradient_out(device):
    e, x, mean, rstd = operands((3, 5, 7), device)
    kept = affine_and_bias(e, x, mean, rstd, Samples(3), torch.float32)
    left = affine_and_bias(e, x, mean, rstd, Samples(3), None)
    assert left[0] is None and left[2] is None
    assert torch.equal(left[1], kept[1]) and torch.equal(left[3], kept[3])


LAYOUTS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "positions contiguous": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda t: t[:1, :1].expand(t.shape),
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((3, 32, 20), (5, 7, 3)))
def test_strides(shape, layout, device):
    e, x, mean, rstd = operands(shape, device)
    e = LAYOUTS[layout](e)
    result = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    check_both(result, e, x, mean, rstd)
    x, mean = LAYOUTS[layout](x), mean.t().contiguous().t()
    result = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    check_both(result, e, x, mean, rstd)


# Empty samples in front, between and behind; one of a single row; one much longer than the others.
LENGTHS = ((0, 3, 0, 1, 5, 0), (1,), (40, 1, 0, 2), (0, 0))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("integers", (torch.int32, torch.int64))
def test_segments(lengths, integers, device, small):
    e, x, mean, rstd = operands((sum(lengths), 18), device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(integers)
    samples = Samples(len(lengths), offsets)
    result = affine_and_bias(e, x, mean, rstd, samples, torch.float32)
    check_both(result, e, x, mean, rstd, offsets)


@pytest.mark.parametrize(
    ("shape", "chunks", "parts"),
    (
        ((1, 37, 18), 10, 10),  # the last chunk has one position of four
        ((3, 9, 18), 3, 9),
        ((1, 5, 3), 2, 2),
        ((260, 2, 3), 1, 130),  # more programs than one step of the second stage takes
        ((9, 1, 18), 1, 3),
    ),
)
def test_work_divided(shape, chunks, parts, device, small):
    divided = plan(*shape, rows_contiguous=False)
    assert (divided.chunks, divided.parts) == (chunks, parts)
    e, x, mean, rstd = operands(shape, device)
    result = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    check_both(result, e, x, mean, rstd)
    again = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


@pytest.mark.parametrize("shape", ((3, 5, 7), (1, 37, 18)))
def test_squares_are_added_to(shape, device, small):
    e, x, mean, rstd = operands(shape, device)
    gain, bias = torch.rand(2, shape[-1], device=device)
    strided = torch.rand(shape[-1], 2, device=device)
    other = strided[:, 1].clone()
    for squares in ((gain, bias), (gain, None), (None, bias), (strided[:, 0], bias)):
        before = tuple(None if s is None else s.double() for s in squares)
        result = affine_and_bias(e, x, mean, rstd, Samples(shape[0]), torch.float32, *squares)
        check_both(result, e, x, mean, rstd, None, before)
        for s, given in zip(squares, result[1::2], strict=True):
            assert s is None or s is given
    assert torch.equal(strided[:, 1], other)


@pytest.mark.parametrize("shape", ((0, 4, 3), (2, 0, 3), (2, 3, 0)))
def test_nothing_to_sum(shape, device):
    e, x, mean, rstd = operands(shape, device)
    before = torch.rand(shape[-1], device=device)
    kept = before.clone()
    gradient, squares = vector(e, Samples(shape[0]), torch.float16, before)
    assert squares is before and torch.equal(before, kept)
    assert gradient.dtype == torch.float16 and torch.equal(gradient, torch.zeros_like(gradient))
    gradient, squares = affine(e, x, mean, rstd, Samples(shape[0]), torch.float32)
    assert torch.equal(gradient, torch.zeros_like(kept))
    assert torch.equal(squares, torch.zeros_like(kept))


def test_not_finite(device):
    # In its own column and nowhere else. (What masked lanes hold, the interpreter cannot show: 0.)
    e = torch.randn(2, 3, 5, device=device)
    e[0, 1, 2], e[1, 0, 3] = float("nan"), float("inf")
    gradient, squares = vector(e, Samples(2), torch.float32)
    assert gradient.isnan().tolist() == [False, False, True, False, False]
    assert squares.isinf().tolist() == [False, False, False, True, False]


def test_layer_norm_by_torch_func(device):
    norm = nn.LayerNorm(6).to(device)
    x, target = torch.randn(2, 4, 3, 6, device=device)

    def loss(weight, bias, x, target):
        return nn.functional.layer_norm(x, (6,), weight, bias).sub(target).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))
    rows = grads(norm.weight, norm.bias, x, target)
    y, mean, rstd = torch.native_layer_norm(x, (6,), norm.weight, norm.bias, norm.eps)
    e = 2 * (y - target).detach()
    result = affine_and_bias(e, x, mean.squeeze(-1), rstd.squeeze(-1), Samples(4), torch.float32)
    for i, row in enumerate(rows):
        torch.testing.assert_close(result[2 * i], row.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result[2 * i + 1], row.square().sum(0), rtol=1e-4, atol=1e-4)


def test_wrong_shapes(device):
    e, x, mean, rstd = operands((2, 3, 4), device)
    with pytest.raises(ValueError, match="dimensions"):
        vector(e[0], Samples(2), torch.float32)
    with pytest.raises(ValueError, match="2 samples, expected 3"):
        vector(e, Samples(3), torch.float32)
    with pytest.raises(ValueError, match="differ in shape"):
        affine(e, x[:, :2], mean, rstd, Samples(2), torch.float32)
    with pytest.raises(ValueError, match="rstd"):
        affine(e, x, mean, rstd.unsqueeze(-1), Samples(2), torch.float32)
