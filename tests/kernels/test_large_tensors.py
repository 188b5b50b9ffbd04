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
from fusedopt.kernels.lang import INTERPRETED, tl
from fusedopt.kernels.rules import SGD

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
