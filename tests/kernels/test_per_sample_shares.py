"""How programs share the tiles of a weight: the model, the arithmetic, and cut samples."""

from __future__ import annotations

import pytest
import torch

from bench.per_sample import rounding
from bench.per_sample.busy import DEVICES, SAMPLES, layers, partial_bytes
from fusedopt.kernels.lang import jit, tl
from fusedopt.kernels.per_sample.shapes import BUSY, Tile, share_tiles, shared_by
from fusedopt.kernels.per_sample.shares import split_share
from fusedopt.statistics.ops import triton_linear
from fusedopt.statistics.ops.samples import Samples
from fusedopt.statistics.ops.triton_linear import linear_in_tiles

SMALL = Tile(16, 16, 16, 128, 2)


def explicit(a, e):
    """Gradient and squares in float64."""
    rows = torch.einsum("bto,bti->boi", e.double(), a.double())
    return rows.sum(0), rows.square().sum(0)


def close(results, wanted):
    for result, exact in zip(results, wanted, strict=True):
        torch.testing.assert_close(result.cpu().double(), exact.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("layer", list(layers()), ids=lambda x: f"{x.model} {x.name}")
def test_layers_of_known_models_keep_the_processors_busy(layer, gpu):
    # Catches sharing whole samples alone, of which 9 of 36 tiles on 304 processors leave half idle.
    for samples in SAMPLES:
        assert layer.busy(samples, gpu) >= 0.9, samples
        shares = layer.shares(samples, gpu)
        processors = DEVICES[gpu][0]
        # At most two tiles of both results, and the two parts of cut samples.
        assert shares.shares <= processors and shares.slots <= 6
        size = layer.tile(DEVICES[gpu][1])
        most = processors * 6 * size.outputs * size.inputs * 4
        assert partial_bytes(layer, samples, gpu) <= most


def test_what_is_chosen():
    # Tiles fill the processors: nothing is shared.
    assert share_tiles(1024, 32, 8, 132).shares == 0
    # One processor, as in the interpreter.
    assert share_tiles(7, 64, 8, 1).shares == 0
    # 144 tiles on 132 processors: 12 tiles of 64 samples in shares of 6 or fewer.
    shared = share_tiles(144, 64, 4, 132)
    assert (shared.whole, shared.shares, shared.unit, shared.slots) == (132, 132, 4, 4)
    assert shared.longest(132) == 64 * 4 + 6 * 4
    # Two samples cannot be shared by 132: they are cut; where they must not be, they are not.
    cut = share_tiles(36, 2, 100, 132)
    assert (cut.unit, cut.steps, cut.slots) == (1, 100, 6) and cut.busy(132) > BUSY
    assert share_tiles(36, 2, 100, 132, may_cut=False).unit == 100
    # Too little to be worth a further launch.
    assert share_tiles(36, 1, 4, 132).shares == 0
    # Nothing to do.
    assert share_tiles(36, 0, 4, 132).shares == share_tiles(0, 4, 4, 132).shares == 0


def test_busy_counts_whole_waves():
    assert shared_by(12, 10, 1, 12).busy(12) == 1.0
    assert shared_by(144, 10, 1, 144).busy(132) == pytest.approx(144 / 264)
    # 24 processors, of which 12 would have nothing in a second wave: 12 tiles of 10 on 24.
    assert shared_by(36, 10, 1, 24).longest(24) == 15


@jit
def _write_shares(out, shares, left, positions, unit):
    share = tl.program_id(0)
    tile, first, count = split_share(share, shares, left, positions, unit)
    tl.store(out + 3 * share, tile)
    tl.store(out + 3 * share + 1, first)
    tl.store(out + 3 * share + 2, count)


@pytest.mark.parametrize(
    ("left", "positions", "unit", "shares"),
    [(5, 12, 4, 7), (5, 12, 1, 7), (1, 3, 1, 8), (131, 2**24, 1, 132), (131, 3 * 2**22, 3, 304)],
)
def test_shares_are_equal_and_cover_everything(device, left, positions, unit, shares):
    """Also where the positions of all tiles are more than 2^31."""
    out = torch.zeros(shares, 3, dtype=torch.int64, device=device)
    _write_shares[(shares,)](out, shares, left, positions, unit)
    at = 0
    for tile, first, count in out.tolist():
        assert tile * positions + first == at and first < positions
        assert count % unit == 0 and 0 <= count <= positions
        at += count
    assert at == left * positions
    counts = out[:, 2]
    assert counts.max() - counts.min() <= unit


@pytest.mark.parametrize("processors", [2, 3, 5, 7, 11, 50])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "inputs", "outputs"), [(1, 100, 40, 20), (3, 70, 24, 40), (3, 40, 8, 8)]
)
def test_any_number_of_shares(device, batch, length, inputs, outputs, processors, cut):
    """One sample in many parts, of which some shares have the middle alone."""
    a = torch.randn(batch, length, inputs, device=device)
    e = torch.randn(batch, length, outputs, device=device)
    forced = (processors, cut)
    results = linear_in_tiles(a, e, Samples(batch), torch.float32, None, SMALL, forced)
    close(results, explicit(a, e))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("processors", [3, 7])
def test_an_infinity_stays_in_its_sample_where_that_is_cut(device, processors):
    a = torch.ones(3, 40, 3, device=device)
    e = torch.ones(3, 40, 4, device=device)
    a[1, :, 0] = float("inf")
    e[1, :, 1] = 0.0
    results = linear_in_tiles(a, e, Samples(3), torch.float32, None, SMALL, (processors, True))
    for result in results:
        finite = torch.isfinite(result)
        assert not finite[:, 0].any() and finite[:, 1:].all()
    gradient = results[0]
    assert gradient is not None and gradient[1, 0].isnan() and gradient[0, 0] == float("inf")


def described(monkeypatch, a, e, samples):
    """Whether operands are described, with what comes of them."""
    seen = []
    real = triton_linear.launch
    monkeypatch.setattr(
        triton_linear, "launch", lambda *args, **meta: seen.append(meta) or real(*args, **meta)
    )
    results = linear_in_tiles(a, e, samples, torch.float32, None, SMALL)
    return seen[0]["DESCRIBED"], results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [2, 16, 37])
def test_descriptors_reach_no_row_of_the_next_sample(device, monkeypatch, dtype, length):
    if device.type != "cpu" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("descriptors are for compute capability 9 and more")
    a = torch.randn(3, length, 24, device=device).to(dtype)
    e = torch.randn(3, length, 40, device=device).to(dtype)
    a[1], e[2] = float("nan"), float("nan")
    is_described, results = described(monkeypatch, a[:1], e[:1], Samples(1))
    assert is_described
    close(results, explicit(a[:1], e[:1]))
    # Inner samples, time first, and a batch of one whose stride says nothing.
    inner = torch.randn(length, 3, 24, device=device).to(dtype).transpose(0, 1)
    is_described, results = described(
        monkeypatch, inner, e[:1].expand(3, -1, -1).clone(), Samples(3)
    )
    assert is_described
    close(results, explicit(inner, e[:1].expand(3, -1, -1)))
    one = a[:1].as_strided((1, length, 24), (0, 24, 1))
    is_described, results = described(monkeypatch, one, e[:1], Samples(1))
    assert is_described
    close(results, explicit(a[:1], e[:1]))


def test_operands_that_have_no_descriptor_are_reached_by_pointers(device, monkeypatch):
    a = torch.randn(2, 20, 24, device=device)
    odd = torch.randn(2, 20, 9, device=device)
    shifted = torch.randn(2 * 20 * 8 + 1, device=device)[1:].view(2, 20, 8)
    repeated = torch.randn(1, 20, 8, device=device).expand(2, -1, -1)
    turned = torch.randn(2, 8, 20, device=device).transpose(1, 2)
    for e in (odd, shifted, repeated, turned):
        is_described, results = described(monkeypatch, a, e, Samples(2))
        assert not is_described
        close(results, explicit(a, e))
    flat = Samples(2, torch.tensor([0, 20, 40], device=device))
    is_described, results = described(monkeypatch, a.flatten(0, 1), a.flatten(0, 1), flat)
    assert not is_described
    close(results, explicit(a, a))


def test_row_blocks_are_as_long_as_short_samples():
    from fusedopt.kernels.per_sample.shapes import samples_tile

    rows = {
        length: samples_tile(90, 2, "tf32", 4096, 4096, True, length).rows
        for length in (1, 16, 17, 32, 33, 64, 65, 96, 197, 2048)
    }
    assert rows == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 32, 96: 32} | {
        197: 64,
        2048: 64,
    }
    # Not more than the tile has.
    assert samples_tile(80, 2, "tf32", 4096, 4096, True, 2048).rows == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_round_squares_as_the_measured_arithmetic(device, dtype):
    """The table of errors is of what the kernel computes."""
    for a, e in rounding.operands(0, 40, dtype):
        rows = Samples(len(a))
        a3, e3 = (x[:, None, :40].contiguous().to(device) for x in (a, e))
        _, squares = linear_in_tiles(a3, e3, rows, None, None, SMALL)
        wanted = rounding.in_bfloat16(e[:, :40]).t() @ rounding.in_bfloat16(a[:, :40])
        torch.testing.assert_close(squares.cpu().double(), wanted, rtol=1e-5, atol=0)


def test_squares_in_bfloat16_are_off_by_little_and_hardly_to_one_side():
    for dtype in (torch.bfloat16, torch.float16):
        error = rounding.errors(64, dtype, 1)["bfloat16"]
        assert error.abs().max() < 2.0**-7 and error.mean().abs() < 1e-3
        # A selection of nothing would pass the lines above.
        assert error.numel() > 10_000 and error.square().mean().sqrt() > 1e-4
