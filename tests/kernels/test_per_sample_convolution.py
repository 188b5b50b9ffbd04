"""Weight gradient and per-sample squares of a convolution: kernels against real layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from fusedopt.kernels.lang import tl
from fusedopt.kernels.per_sample.shapes import Tile, convolution_tile
from fusedopt.statistics.ops import triton_convolution
from fusedopt.statistics.ops.triton_convolution import convolution, convolution_in_tiles

# Small enough that tiny shapes take several tiles and several steps.
SMALL = Tile(16, 16, 16, 128, 2)


@pytest.fixture(autouse=True)
def _exact():
    """On a GPU, torch's default for convolutions is tf32. All settings are restored."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, before_matmul = cudnn.conv.fp32_precision, matmul.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    yield
    # The old setting first: it writes the new one, too.
    cudnn.allow_tf32 = before == "tf32"
    cudnn.conv.fp32_precision = before
    matmul.fp32_precision = before_matmul


def explicit(x, e, kernel, stride, padding, dilation, groups):
    """Gradient and squares in float64: autograd through ``conv2d``, sample by sample."""
    x, e = x.double(), e.double()
    shape = (e.shape[1], x.shape[1] // groups, *kernel)
    total = torch.zeros(shape, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for i in range(len(x)):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        out = F.conv2d(x[i : i + 1], weight, None, stride, padding, dilation, groups)
        (row,) = torch.autograd.grad(out, weight, e[i : i + 1])
        total += row
        squares += row * row
    return total, squares


def operands(device, case, batch=2, size=(6, 7), channels=4, outputs=6, dtype=torch.float32):
    kernel, stride, padding, dilation, groups = case
    x = torch.randn(batch, channels, *size).to(device, dtype)
    weight = torch.zeros(outputs, channels // groups, *kernel)
    out = F.conv2d(x.cpu().float(), weight, None, stride, padding, dilation, groups)
    return x, torch.randn(out.shape).to(device, dtype)


def run(x, e, case, dtype=torch.float32, squares=None, forced=None):
    kernel, stride, padding, dilation, groups = case
    geometry = (*kernel, *stride, *padding, *dilation)
    return convolution_in_tiles(x, e, geometry, groups, dtype, squares, SMALL, forced)


def check(results, expected):
    """Compare in units of rounding of float32; see the linear layer's."""
    for result, wanted in zip(results, expected, strict=True):
        bound = 64 * 2.0**-24 * max(1.0, wanted.abs().max().item())
        error = (result.double().cpu() - wanted).abs().max().item()
        assert error <= bound, f"off by {error}, at most {bound}"
        assert wanted.abs().max().item() > 4 * bound


PLAIN = ((3, 3), (1, 1), (1, 1), (1, 1), 1)

# Kernel size, stride, padding, dilation, groups: each differs between height and width.
CASES = {
    "plain": PLAIN,
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided": ((3, 2), (2, 3), (0, 0), (1, 1), 1),
    "padded": ((2, 3), (1, 1), (2, 1), (1, 1), 1),
    "dilated": ((2, 3), (1, 1), (0, 1), (3, 2), 1),
    "groups": ((3, 3), (1, 1), (1, 1), (1, 1), 2),
    "everything": ((3, 2), (2, 1), (1, 2), (2, 3), 2),
}


@pytest.mark.parametrize("forced", [None, (5, True)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_geometry(device, case, forced):
    x, e = operands(device, case)
    check(run(x, e, case, forced=forced), explicit(x.cpu(), e.cpu(), *case))


def test_by_depth(device):
    """A group a channel: weights of [channels, 1, 3, 3]."""
    case = ((3, 3), (1, 1), (1, 1), (1, 1), 4)
    x, e = operands(device, case, channels=4, outputs=8, size=(4, 5))
    check(run(x, e, case), explicit(x.cpu(), e.cpu(), *case))


def test_several_tiles_in_every_direction(device):
    x, e = operands(device, PLAIN, channels=3, outputs=20, size=(5, 4))
    check(run(x, e, PLAIN), explicit(x.cpu(), e.cpu(), *PLAIN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(device, dtype):
    x, e = operands(device, PLAIN, dtype=dtype)
    check(run(x, e, PLAIN), explicit(x.cpu(), e.cpu(), *PLAIN))
    gradient, _ = run(x, e, PLAIN, dtype)
    assert torch.equal(gradient, run(x, e, PLAIN)[0].to(dtype))


@pytest.mark.parametrize("forced", [(1, False), (2, False), (5, False), (2, True), (7, True)])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_shares(device, batch, forced):
    """Of several tiles and groups; samples take three blocks, the last of them begun."""
    case = CASES["groups"]
    x, e = operands(device, case, batch=batch)
    first, second = (run(x, e, case, forced=forced) for _ in range(2))
    check(first, explicit(x.cpu(), e.cpu(), *case))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_dimension(device):
    """``Conv1d``: height 1."""
    layer = torch.nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2).double()
    x = torch.randn(3, 4, 9)
    rows = []
    for sample in x.double():
        layer.zero_grad()
        layer(sample.unsqueeze(0)).square().sum().backward()
        rows.append(layer.weight.grad.clone())
    e = (2 * layer(x.double())).float().detach().unsqueeze(2).to(device)
    case = ((1, 3), (1, 2), (0, 1), (1, 1), 2)
    results = run(x.unsqueeze(2).to(device), e, case)
    wanted = sum(rows), sum(row * row for row in rows)
    check([r.squeeze(2) for r in results], wanted)


def test_memory_formats(device, monkeypatch):
    """Strides are walked; a gradient whose rows lie apart is the one thing that is copied."""
    case = CASES["everything"]
    x, e = operands(device, case)
    wanted = explicit(x.cpu(), e.cpu(), *case)
    last = torch.channels_last
    apart = torch.zeros(*e.shape[:3], e.shape[3] + 2, device=device)[..., 1:-1].copy_(e)
    repeated = torch.ones(2, 1, 1, 1, device=device).expand_as(e)
    check(run(x.contiguous(memory_format=last), e.contiguous(memory_format=last), case), wanted)
    check(run(x.transpose(0, 1).contiguous().transpose(0, 1), apart, case), wanted)
    check(run(x, repeated, case), explicit(x.cpu(), repeated.cpu(), *case))


@pytest.mark.parametrize("forced", [None, (2, False)])
def test_squares_are_added_to(device, forced):
    case = CASES["1x1"]
    x, e = operands(device, case)
    wanted = explicit(x.cpu(), e.cpu(), *case)
    before = torch.rand(6, 4, 1, 1, device=device)
    squares = before.clone()
    gradient, result = run(x, e, case, squares=squares, forced=forced)
    assert result is squares
    check((gradient, result), (wanted[0], wanted[1] + before.cpu().double()))
    gradient, result = run(x, e, case, dtype=None, forced=forced)
    assert gradient is None
    check((result,), wanted[1:])


@pytest.mark.parametrize(("stride", "wide"), [(2**20, False), (2**32, True)])
def test_large_strides_take_wide_indices(device, monkeypatch, stride, wide):
    """Elements of a sample more than 2^31 apart, without the memory.

    A dimension of size 1 may have any stride, so the results are right with either type: what is
    checked is that the type that reaches the elements is asked for, and that it compiles and runs.
    """
    seen = []
    real = triton_convolution.launch
    monkeypatch.setattr(
        triton_convolution, "launch", lambda *args, **meta: seen.append(meta) or real(*args, **meta)
    )
    case = CASES["padded"]
    x, e = operands(device, case, channels=1, outputs=2)
    far = x.as_strided(x.shape, (x.stride(0), stride, x.stride(2), x.stride(3)))
    check(run(far, e, case), explicit(x.cpu(), e.cpu(), *case))
    assert [meta["INDEX"] for meta in seen] == [tl.int64 if wide else tl.int32]


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "ieee"),
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "ieee"),
    ],
)
def test_the_precision_is_torchs_of_convolutions(
    device, monkeypatch, matmul, setting, value, wanted
):
    # Catches asking for the precision of matrix products: torch's defaults differ.
    torch.backends.cuda.matmul.fp32_precision = matmul
    owner = torch.backends.cudnn if setting == "allow_tf32" else torch.backends.cudnn.conv
    setattr(owner, setting, value)
    seen = []
    monkeypatch.setattr(triton_convolution, "launch", lambda *_, **meta: seen.append(meta))
    asked = []
    monkeypatch.setattr(
        triton_convolution,
        "convolution_tile",
        lambda *choice: asked.append(choice[2]) or convolution_tile(*choice),
    )
    x, e = operands(device, PLAIN)
    convolution(x, e, *PLAIN, torch.float32)
    assert asked == [wanted] and {meta["PRECISION"] for meta in seen} == {wanted}


def test_the_public_function_chooses(device):
    x, e = operands(device, PLAIN)
    kernel, stride, padding, dilation, groups = PLAIN
    squares = torch.zeros(6, 4, 3, 3, device=device)
    results = convolution(x, e, kernel, stride, padding, dilation, groups, torch.float32, squares)
    assert results[1] is squares
    check(results, explicit(x.cpu(), e.cpu(), *PLAIN))


def test_no_samples_give_zeros(device):
    x, e = torch.empty(0, 4, 3, 3, device=device), torch.empty(0, 6, 3, 3, device=device)
    for result in run(x, e, PLAIN):
        assert torch.equal(result, torch.zeros(6, 4, 3, 3, device=device))


@pytest.mark.parametrize(
    ("x", "e", "groups"),
    [
        ((2, 4, 5, 5), (2, 6, 5, 4), 1),
        ((2, 4, 5, 5), (3, 6, 5, 5), 1),
        ((2, 4, 5, 5), (2, 6, 5, 5), 3),
    ],
)
def test_shapes_that_do_not_fit_are_named(device, x, e, groups):
    case = (*PLAIN[:4], groups)
    with pytest.raises(ValueError, match="fit|belong|groups"):
        run(torch.ones(x, device=device), torch.ones(e, device=device), case)


def test_tiles_are_as_small_as_the_weight():
    for capability in (0, 80, 90, 100):
        for itemsize, precision in ((2, "tf32"), (4, "tf32"), (4, "ieee")):
            depthwise = convolution_tile(capability, itemsize, precision, 1, 9)
            assert (depthwise.outputs, depthwise.inputs) == (16, 16)
            wide = convolution_tile(capability, itemsize, precision, 512, 4608)
            assert wide.outputs >= 64 and wide.inputs == 64
            assert wide.threads > depthwise.threads >= 32
