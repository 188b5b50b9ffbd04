"""Weight gradient and per-sample squares of a linear layer: kernels against explicit samples."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fusedopt.kernels import aot
from fusedopt.kernels.aot import samples as aot_samples
from fusedopt.kernels.per_sample.shapes import Tile, rows_tile, samples_tile
from fusedopt.statistics.ops import tiles as ops_tiles
from fusedopt.statistics.ops import triton_linear
from fusedopt.statistics.ops.samples import Samples
from fusedopt.statistics.ops.triton_linear import linear, linear_in_tiles

# Small enough that tiny shapes take several tiles and several steps.
SMALL = Tile(16, 16, 16, 128, 2)
WIDE = Tile(32, 16, 32, 128, 2)

NARROW = (torch.bfloat16, torch.float16)

# Processors that a weight is shared out for, and whether samples may be cut: one has whole tiles.
FORCED = [(1, False), (5, False), (5, True), (13, True)]


def explicit(a, e, bounds=None):
    """Gradient and squares in float64, sample by sample."""
    a, e = a.double(), e.double()
    if bounds is None:
        rows = [e[b].T @ a[b] for b in range(len(a))]
    else:
        pairs = zip(bounds, bounds[1:], strict=False)
        rows = [e[start:stop].T @ a[start:stop] for start, stop in pairs]
    total = sum(rows, torch.zeros(e.shape[-1], a.shape[-1], dtype=torch.float64))
    return total, sum((row * row for row in rows), torch.zeros_like(total))


def normal(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def check(results, expected, ulp=2.0**-24):
    """Compare in units of rounding; sums of up to a few hundred products are within 64 of them."""
    for result, wanted in zip(results, expected, strict=True):
        bound = 64 * ulp * max(1.0, wanted.abs().max().item())
        error = (result.double() - wanted.to(result.device)).abs().max().item()
        assert error <= bound, f"off by {error}, at most {bound}"
        # A kernel that leaves zeros behind would be caught.
        assert wanted.abs().max().item() > 4 * bound


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize(
    ("batch", "length", "inputs", "outputs", "tile"),
    [
        (3, 21, 20, 18, SMALL),  # nothing divides
        (2, 16, 16, 32, SMALL),  # everything divides
        (1, 40, 7, 33, WIDE),  # one sample
        (5, 3, 17, 5, SMALL),  # samples shorter than a block
    ],
)
def test_samples_of_many_rows(device, dtype, forced, batch, length, inputs, outputs, tile):
    a = normal(batch, length, inputs, device=device, dtype=dtype)
    e = normal(batch, length, outputs, device=device, dtype=dtype)
    results = linear_in_tiles(a, e, Samples(batch), torch.float32, None, tile, forced)
    check(results, explicit(a.cpu(), e.cpu()))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize(
    ("batch", "processors"), [(1, 1), (5, 1), (37, 1), (37, 4), (37, 5), (200, 7)]
)
def test_samples_of_one_row(device, dtype, batch, processors):
    a = normal(batch, 1, 19, device=device, dtype=dtype)
    e = normal(batch, 1, 33, device=device, dtype=dtype)
    forced = (processors, False)
    results = linear_in_tiles(a, e, Samples(batch), torch.float32, None, SMALL, forced)
    wanted = explicit(a.cpu(), e.cpu())
    check(results[:1], wanted[:1])
    if dtype == torch.float32:
        check(results[1:], wanted[1:])
    else:
        # Of 16-bit operands both squares are rounded to nearest, to the 8 bits of bfloat16.
        torch.testing.assert_close(results[1].cpu().double(), wanted[1], rtol=2.0**-7, atol=0)


@pytest.mark.parametrize(
    ("dtype", "index", "processors"),
    [
        (torch.float32, torch.int32, 1),
        (torch.float32, torch.int64, 3),
        (torch.bfloat16, torch.int64, 5),
        (torch.float16, torch.int32, 7),
        (torch.float32, torch.int32, 13),
        (torch.float32, torch.int32, 48),
    ],
)
def test_segments(device, dtype, index, processors):
    # Empty at both ends, in the middle, twice in a row; shorter and longer than a block; an end on
    # the edge of a block; and among many processors some are left without samples.
    bounds = [0, 0, 7, 30, 30, 30, 46, 50, 50]
    a = normal(50, 20, device=device, dtype=dtype)
    e = normal(50, 18, device=device, dtype=dtype)
    offsets = torch.tensor(bounds, dtype=index, device=device)
    samples = Samples(len(bounds) - 1, offsets)
    forced = (processors, False)
    results = linear_in_tiles(a, e, samples, torch.float32, None, SMALL, forced)
    check(results, explicit(a.cpu(), e.cpu(), bounds))


def test_segments_beyond_one_turn_of_the_counting_loop(device):
    lengths = torch.randint(0, 3, (300,))
    bounds = [0, *lengths.cumsum(0).tolist()]
    a = normal(bounds[-1], 3, device=device)
    e = normal(bounds[-1], 4, device=device)
    samples = Samples(300, torch.tensor(bounds, dtype=torch.int32, device=device))
    wanted = explicit(a.cpu(), e.cpu(), bounds)
    for forced in (None, (3, False)):
        check(linear_in_tiles(a, e, samples, torch.float32, None, SMALL, forced), wanted)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("length", [1, 20])
def test_an_infinity_stays_in_its_sample(device, length):
    """Rows of the next sample are in reach of a block: they are masked in both operands."""
    a = torch.ones(2, length, 3, device=device)
    e = torch.ones(2, length, 4, device=device)
    a[1, :, 0] = float("inf")
    e[1, :, 1] = 0.0
    flat = Samples(2, torch.tensor([0, length, 2 * length], device=device))
    for case in ((a, e, Samples(2)), (a.flatten(0, 1), e.flatten(0, 1), flat)):
        gradient, squares = linear_in_tiles(*case, torch.float32, None, SMALL)
        for result in (gradient, squares):
            finite = torch.isfinite(result)
            assert not finite[:, 0].any() and finite[:, 1:].all()
        assert gradient[1, 0].isnan() and gradient[0, 0] == float("inf")


@pytest.mark.parametrize("length", [1, 18])
def test_strides_are_walked_without_a_copy(device, length, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a copy")

    monkeypatch.setattr(torch.Tensor, "contiguous", forbidden)
    time_first = normal(length, 3, 20, device=device).transpose(0, 1)
    columns_first = normal(3, 18, length, device=device).transpose(1, 2)
    sliced = normal(3, length, 60, device=device)[..., ::3]
    repeated = normal(3, 1, 18, device=device).expand(3, length, 18)
    for a, e in ((time_first, columns_first), (sliced, repeated)):
        results = linear_in_tiles(a, e, Samples(3), torch.float32, None, SMALL)
        check(results, explicit(a.cpu(), e.cpu()))


def test_strides_of_segments(device):
    a = normal(20, 30, device=device).t()
    e = normal(30, 36, device=device)[:, ::2]
    bounds = [0, 11, 30]
    samples = Samples(2, torch.tensor(bounds, device=device))
    wanted = explicit(a.cpu(), e.cpu(), bounds)
    check(linear_in_tiles(a, e, samples, torch.float32, None, SMALL), wanted)


@pytest.mark.parametrize("forced", [None, (3, False)])
@pytest.mark.parametrize("length", [1, 9])
def test_squares_are_added_to(device, length, forced):
    a, e = normal(20, length, 5, device=device), normal(20, length, 6, device=device)
    wanted = explicit(a.cpu(), e.cpu())
    before = torch.rand(6, 5, device=device)
    for squares in (before.clone(), before.t().clone().t()):
        gradient, result = linear_in_tiles(a, e, Samples(20), torch.float32, squares, SMALL, forced)
        assert result is squares
        check((gradient, result), (wanted[0], wanted[1] + before.cpu().double()))


@pytest.mark.parametrize("forced", [None, (3, False)])
@pytest.mark.parametrize("length", [1, 9])
def test_squares_alone(device, length, forced):
    a, e = normal(20, length, 5, device=device), normal(20, length, 6, device=device)
    gradient, squares = linear_in_tiles(a, e, Samples(20), None, None, SMALL, forced)
    assert gradient is None
    check((squares,), explicit(a.cpu(), e.cpu())[1:])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("forced", [None, (3, False), (3, True)])
def test_the_gradient_is_rounded_once(device, dtype, forced):
    """To nearest, from float32, whatever the number of shares."""
    a = normal(4, 25, 8, device=device, dtype=dtype)
    e = normal(4, 25, 8, device=device, dtype=dtype)
    gradient, _ = linear_in_tiles(a, e, Samples(4), dtype, None, SMALL, forced)
    exact, _ = linear_in_tiles(a, e, Samples(4), torch.float32, None, SMALL, forced)
    assert gradient.dtype == dtype and torch.equal(gradient, exact.to(dtype))


def test_small_gradients_do_not_underflow(device):
    """1e-4 squared is 0 in float16 and exact enough in bfloat16."""
    e = torch.full((32, 1, 4), 1e-4, device=device, dtype=torch.float16)
    a = torch.full((32, 1, 4), 1e-3, device=device, dtype=torch.float16)
    _, squares = linear(a, e, Samples(32), torch.float16)
    wanted = explicit(a.cpu(), e.cpu())[1].float()
    torch.testing.assert_close(squares.cpu(), wanted, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize(
    ("of_a", "of_e"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_mixed_types(device, of_a, of_e):
    """Under autocast the layer saw its input in the narrow type of its output."""
    a, e = normal(2, 9, 6, device=device).to(of_a), normal(2, 9, 5, device=device).to(of_e)
    results = linear(a, e, Samples(2), torch.float32)
    seen = a.to(of_e) if of_e == torch.bfloat16 else a
    check(results, explicit(seen.cpu(), e.cpu()))


@pytest.mark.parametrize(
    ("a", "e", "samples"),
    [
        ((0, 4, 3), (0, 4, 5), Samples(0)),
        ((2, 0, 3), (2, 0, 5), Samples(2)),
        ((0, 3), (0, 5), Samples(0, torch.zeros(1, dtype=torch.int32))),
        ((0, 3), (0, 5), Samples(3, torch.zeros(4, dtype=torch.int32))),
    ],
)
def test_nothing_gives_zeros(device, a, e, samples):
    if samples.offsets is not None:
        samples = Samples(samples.count, samples.offsets.to(device))
    kept = torch.ones(5, 3, device=device)
    a, e = torch.empty(a, device=device), torch.empty(e, device=device)
    gradient, squares = linear(a, e, samples, torch.float32, kept)
    assert torch.equal(gradient, torch.zeros_like(kept)) and torch.equal(
        kept, torch.ones_like(kept)
    )
    assert squares is kept


@pytest.mark.parametrize("forced", [None, (2, False)])
def test_a_weight_without_elements(device, forced):
    a, e = torch.ones(2, 3, 0, device=device), torch.ones(2, 3, 5, device=device)
    for result in linear_in_tiles(a, e, Samples(2), torch.float32, None, SMALL, forced):
        assert result.shape == (5, 0)


def test_a_real_layer_and_torch_func(device):
    """Per-sample gradients by ``torch.func`` of the layer as it stands in a network."""
    layer = torch.nn.Linear(6, 5).to(device)
    x = normal(4, 7, 6, device=device)

    def loss(weight, sample):
        out = torch.func.functional_call(layer, {"weight": weight}, (sample,))
        return out.pow(3).sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight, x)
    out = layer(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(out.pow(3).sum(), out)
    gradient, squares = linear(x, e, Samples(4), torch.float32)
    torch.testing.assert_close(gradient, rows.sum(0))
    torch.testing.assert_close(squares, rows.square().sum(0))


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("length", [1, 40])
def test_equal_calls_give_equal_bits(device, length, forced):
    a, e = normal(6, length, 20, device=device), normal(6, length, 18, device=device)
    first, second = (
        linear_in_tiles(a, e, Samples(6), torch.float32, None, SMALL, forced) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_precision_of_float32_is_torchs(device, monkeypatch):
    seen = []
    real = triton_linear.launch
    monkeypatch.setattr(
        triton_linear, "launch", lambda *args, **meta: seen.append(meta) or real(*args, **meta)
    )
    a, e = normal(2, 3, 4, device=device), normal(2, 3, 5, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            linear(a, e, Samples(2), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [meta["PRECISION"] for meta in seen] == ["ieee", "tf32"]


@pytest.fixture
def backends():
    """torch's settings, restored at the end; monkeypatch would delete what it set."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    yield torch.backends
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_precision_may_be_set_by_attribute(device, backends, setting):
    # Catches asking the old function, which raises where the attribute says tf32.
    backends.cuda.matmul.fp32_precision = setting
    assert ops_tiles.precision(device) == setting
    a, e = normal(2, 3, 4, device=device), normal(2, 3, 5, device=device)
    linear(a, e, Samples(2), torch.float32)


@pytest.mark.parametrize(
    ("hip", "architecture", "fastest"),
    [
        (None, None, "tf32"),
        ("6.4", "gfx942:sramecc+:xnack-", "tf32"),
        ("6.4", "gfx90a:sramecc+:xnack-", "ieee"),
        ("6.4", "gfx950", "ieee"),
    ],
)
def test_tf32_is_asked_of_those_that_have_it(monkeypatch, backends, hip, architecture, fastest):
    monkeypatch.setattr(torch.version, "hip", hip)
    facts = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    # Without the cache, which would keep the answer.
    monkeypatch.setattr(ops_tiles, "fastest_precision", ops_tiles.fastest_precision.__wrapped__)
    backends.cuda.matmul.fp32_precision = "tf32"
    backends.cudnn.conv.fp32_precision = "tf32"
    gpu = torch.device("cuda")
    assert ops_tiles.fastest_precision(gpu) == fastest
    assert ops_tiles.precision(gpu) == fastest
    assert ops_tiles.convolution_precision(gpu) == fastest


def test_variants_for_amd_ask_for_what_triton_has():
    for target, tf32 in (("hip:gfx90a", False), ("hip:gfx950", False), ("hip:gfx942", True)):
        variants = list(aot_samples.variants(aot.parse_target(target)))
        names = [variant.name for variant in variants]
        assert len(names) == len(set(names)), target
        assert any("tf32" in variant.constants.values() for variant in variants) == tf32, target
        for dtype in ("fp32", "bf16", "fp16"):
            assert any(name.startswith(f"linear_rows {dtype}") for name in names), (target, dtype)


def test_tiles_of_consumer_cards_take_no_stack():
    """Catches the tiles of sm_80, of which the compiler for sm_120 keeps some in stack."""
    script = """
from fusedopt.kernels import aot
from fusedopt.kernels.aot import samples
target = aot.parse_target("cuda:120")
names = ("linear_samples dense bf16 64x64x16", "linear_rows bf16 128x64", "linear_rows fp16 128x64")
compiled = 0
for variant in samples.variants(target):
    if variant.name.startswith(names):
        result = aot.report(aot.compile_variant(variant, target), target)
        broken = variant.budget.broken(variant, result, target)
        assert not broken, (variant.name, broken)
        compiled += 1
assert compiled >= 7, compiled
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_rows_compile_for_amd_without_tf32():
    script = """
from fusedopt.kernels import aot
from fusedopt.kernels.aot import samples
target = aot.parse_target("hip:gfx90a")
compiled = 0
for variant in samples.variants(target):
    if variant.name.startswith("linear_rows bf16 64x64"):
        result = aot.report(aot.compile_variant(variant, target), target)
        assert not variant.budget.broken(variant, result, target)
        compiled += 1
assert compiled
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize(
    ("a", "e", "count", "squares"),
    [
        ((2, 3, 4), (2, 4, 5), 2, None),
        ((2, 3, 4), (2, 3, 5), 3, None),
        ((6, 4), (6, 5), 6, None),
        ((2, 3, 4), (2, 3, 5), 2, (4, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_named(device, a, e, count, squares):
    kept = None if squares is None else torch.zeros(squares, device=device)
    with pytest.raises(ValueError, match="dimensions|samples|squares"):
        linear(torch.ones(a), torch.ones(e), Samples(count), None, kept)


ARCHITECTURES = (0, 75, 80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("choose", [samples_tile, rows_tile])
def test_tiles_are_what_matrix_instructions_take(choose):
    for capability in ARCHITECTURES:
        for itemsize, precision in ((2, "tf32"), (4, "tf32"), (4, "ieee")):
            wide = choose(capability, itemsize, precision, 4096, 4096)
            small = choose(capability, itemsize, precision, 10, 10)
            assert (small.outputs, small.inputs) == (64, 64)
            for tile in (wide, small):
                assert tile.threads in ((256, 512) if capability == 0 else (128, 256))
                operands = (tile.outputs + tile.inputs) * tile.rows * itemsize * tile.stages
                # Shared memory of the smallest card of the family.
                assert operands <= {0: 2 * 65536, 90: 227 * 1024, 100: 227 * 1024}.get(
                    capability, 99 * 1024
                )


def test_tiles_follow_the_architecture():
    assert samples_tile(90, 2, "tf32", 4096, 4096) == Tile(128, 128, 64, 256, 4, True)
    assert samples_tile(80, 2, "tf32", 4096, 4096) == samples_tile(89, 2, "tf32", 4096, 4096)
    assert samples_tile(80, 2, "tf32", 4096, 4096) != samples_tile(90, 2, "tf32", 4096, 4096)


def test_operands_that_cannot_be_loaded_wide_get_a_narrower_tile(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # Catches the wide tile, whose accumulators spill, for a vocabulary of 50257.
    for capability in (80, 90, 100):
        wide = samples_tile(capability, 2, "tf32", 50257, 768)
        narrow = samples_tile(capability, 2, "tf32", 50257, 768, wide=False)
        assert narrow.outputs * narrow.inputs * narrow.rows <= 128 * 64 * 32
        assert narrow.rows <= wide.rows
    asked = []

    def choose(*arguments, **more):
        asked.append(arguments[-1])
        return samples_tile(*arguments, **more)

    monkeypatch.setattr(triton_linear, "samples_tile", choose)
    a = torch.ones(2, 3, 8, dtype=torch.bfloat16, device=device)
    odd = torch.ones(2, 3, 9, dtype=torch.bfloat16, device=device)
    shifted = torch.ones(2 * 3 * 8 + 1, dtype=torch.bfloat16, device=device)[1:].view(2, 3, 8)
    turned = torch.ones(2, 8, 8, dtype=torch.bfloat16, device=device).transpose(1, 2)[:, :3]
    for e in (a, a.transpose(0, 1).contiguous().transpose(0, 1), odd, shifted, turned):
        triton_linear.linear(a, e, Samples(2), torch.float32)
    assert asked == [True, True, False, False, False]
