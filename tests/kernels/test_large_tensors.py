"""Tensors of more than 2^31 elements: the kernel's index arithmetic, and a real one on a GPU."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from tolerances import assert_untouched
from torch import Tensor

import fusedopt
from fusedopt.kernels import multi_tensor
from fusedopt.kernels.lang import INTERPRETED, jit, tl
from fusedopt.kernels.per_sample.shapes import Tile
from fusedopt.kernels.per_sample.tiles import place_tile
from fusedopt.kernels.rules import SGD
from fusedopt.statistics.ops.samples import Samples
from fusedopt.statistics.ops.triton_linear import linear_in_tiles
from fusedopt.statistics.ops.triton_vectors import vector

BLOCK = multi_tensor.BLOCK
LIMIT = 1 << 31
# A remainder behind whole chunks behind the 2^31st element.
NUMEL = LIMIT + 2 * BLOCK + 5


def _reserve(elements: int) -> Tensor:
    """Reserve zeros in bfloat16, of which only the pages that are touched take memory."""
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, 2 * elements, flags=flags)
    except (AttributeError, OSError, ValueError) as error:
        pytest.skip(f"cannot reserve address space: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def _update_chunk(p: Tensor, gradient: Tensor, chunk: int, block: int) -> None:
    """Launch one program of p -= 0.5 * gradient, as the backend would for that chunk."""
    table = torch.tensor([[NUMEL], [0], [p.data_ptr()], [gradient.data_ptr()]])
    group = {**SGD.example_groups[0], "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    multi_tensor.update_tensors[(1,)](
        table, 1,
        torch.zeros(1, dtype=torch.int32), torch.tensor([chunk], dtype=torch.int32),
        torch.tensor([SGD.coefficients(group, 1.0)], dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        **multi_tensor.update_constants(
            SGD, SGD.options(group), (tl.bfloat16, tl.bfloat16), aligned=False, block=block
        ),
    )  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="one program, run by the interpreter")
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("position", ["last_below", "first_beyond", "ragged"])
def test_chunks_beyond_two_to_the_31(position: str, aligned: bool) -> None:
    # A start in int32 wraps by 2^32, and then every mask lets it pass. The reservation begins 2^31
    # elements before the tensor, where such a start leads: the mistake shows as a wrong value and
    # not as a crash.
    block = multi_tensor.block_size(aligned)
    half = LIMIT + NUMEL + 4 * BLOCK
    reserved = _reserve(2 * half)
    p, gradient = reserved[LIMIT:half], reserved[half + LIMIT :]
    start = {
        "last_below": LIMIT - block,
        "first_beyond": LIMIT,
        "ragged": NUMEL // block * block,
    }[position]
    count = min(block, NUMEL - start)
    window = slice(start - block, start + 3 * block)
    p[window], gradient[window] = 3.0, 4.0
    expected = p[window].clone()
    expected[block : block + count] = 1.0
    _update_chunk(p, gradient, start // block, block)
    assert_untouched(p[window], expected, "parameter")
    # Where a start that wrapped around would have written.
    assert not reserved[max(start - LIMIT, 0) :][:block].any()


def _far_samples(samples: int, length: int, width: int) -> Tensor:
    """Reserve samples that lie far apart: the last ones are beyond the 2^31st element."""
    step = 2 * LIMIT // samples
    # In front of them as much as an offset in int32 would lead back by.
    reserved = _reserve(3 * LIMIT + length * width)[LIMIT:]
    x = reserved.as_strided((samples, length, width), (step, width, 1))
    x.copy_(torch.randn(x.shape))
    return x


@pytest.mark.skipif(not INTERPRETED, reason="memory that is reserved and not there")
@pytest.mark.parametrize(("count", "length", "width"), [(4, 5, 16), (4, 5, 9), (32, 1, 16)])
def test_samples_beyond_two_to_the_31(count: int, length: int, width: int) -> None:
    """By descriptors, by addresses, and of one row. Catches a sample's offset in int32."""
    a, e = _far_samples(count, length, width), _far_samples(count, length, width)
    rows = torch.einsum("bto,bti->boi", e.double(), a.double())
    wanted = rows.sum(0), rows.square().sum(0)
    tile = Tile(16, 16, 16, 128, 2)
    found = linear_in_tiles(a, e, Samples(count), torch.float32, None, tile)
    # Squares of one row are rounded to bfloat16.
    for result, exact, rtol in zip(found, wanted, (1e-5, 2.0**-7), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=1e-5)
    rows = e.double().sum(1)
    found = vector(e, Samples(count), torch.float32)
    for result, exact in zip(found, (rows.sum(0), rows.square().sum(0)), strict=True):
        assert result is not None
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@jit
def _write_place_of(out, group, tile_o, tile_i, outputs, inputs):
    group, tile_o, tile_i = tl.load(group), tl.load(tile_o), tl.load(tile_i)
    where, mask = place_tile(group, tile_o, tile_i, outputs, inputs, 16, 16)
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, tl.where(mask, where, -1))


@pytest.mark.parametrize(("group", "outputs"), [(0, 2**18 + 3), (7, 2**15 + 3)])
def test_a_weight_beyond_two_to_the_31(device: torch.device, group: int, outputs: int) -> None:
    """Catches a place in int32, of a wide weight and of groups of small ones."""
    inputs = 2**14 + 5
    tile_o, tile_i = outputs // 16, inputs // 16
    out = torch.zeros(16, 16, dtype=torch.int64, device=device)
    # Numbers that the kernel has from its program, and so in int32.
    numbers = [torch.tensor(n, dtype=torch.int32, device=device) for n in (group, tile_o, tile_i)]
    _write_place_of[(1,)](out, *numbers, outputs, inputs)
    first = (group * outputs + tile_o * 16) * inputs + tile_i * 16
    assert first > LIMIT
    places = first + torch.arange(3)[:, None] * inputs + torch.arange(5)
    assert torch.equal(out.cpu()[:3, :5], places) and (out.cpu()[3:] == -1).all()
    assert (out.cpu()[:, 5:] == -1).all()


@pytest.mark.gpu
@pytest.mark.slow
def test_a_step_on_more_than_two_to_the_31_elements(device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    p = torch.nn.Parameter(torch.full((NUMEL,), 3.0, dtype=torch.bfloat16, device=device))
    p.grad = torch.full_like(p, 4.0)
    optimizer: Any = fusedopt.SGD([p], lr=0.5, backend="triton")
    optimizer.step()
    assert p.detach().min().item() == p.detach().max().item() == 1.0
