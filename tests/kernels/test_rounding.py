"""How the kernels convert between memory and arithmetic: bit by bit as torch does."""

from __future__ import annotations

import pytest
import torch
from tolerances import bits
from torch import Tensor

import fusedopt
from fusedopt.kernels.codecs import decode, encode
from fusedopt.kernels.lang import INTERPRETED, jit, tl

# The low halves of float32 patterns: exact, just above, just below a tie, a tie, just above one,
# and the largest. A tie goes up or down by the last bit of the upper half.
LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
CHUNK = 4096


@jit
def _store(source, destination, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    encode(destination + offsets, tl.load(source + offsets), None)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros_like(values, dtype=dtype)
    assert len(values) % CHUNK == 0
    _store[(len(values) // CHUNK,)](values, out, BLOCK=CHUNK)
    return out


@jit
def _load(source, destination, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(destination + offsets, decode(source + offsets, None, tl.float32))


def _float32(pattern: Tensor) -> Tensor:
    return pattern.to(torch.int32).view(torch.float32)


def _assert_same_bits(stored: Tensor, expected: Tensor, values: Tensor) -> None:
    # Any nan will do: its payload is no number.
    assert torch.equal(stored.isnan(), expected.isnan())
    number = ~expected.isnan()
    wrong = (bits(stored) != bits(expected)) & number
    assert not wrong.any(), (
        f"{int(wrong.sum())} values stored wrongly, the first {values[wrong][0].item()!r} as"
        f" {stored[wrong][0].item()!r} instead of {expected[wrong][0].item()!r}"
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("low", LOW_HALVES, ids=hex)
def test_every_upper_half(dtype: torch.dtype, low: int, device: torch.device) -> None:
    # All 65536 upper halves of float32: every sign, exponent, and leading seven bits of mantissa,
    # so zeros, subnormals, the step to infinity, infinities and nans. Catches truncation, ties
    # away from zero, a nan that is carried into infinity and an infinity into a nan.
    upper = torch.arange(1 << 16, dtype=torch.int64, device=device) << 16
    values = _float32((upper | low).where(upper < 1 << 31, (upper | low) - (1 << 32)))
    _assert_same_bits(_stored(values, dtype), values.to(dtype), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_narrow_value_loads(dtype: torch.dtype, device: torch.device) -> None:
    # Catches subnormals that are flushed or taken for normal numbers.
    pattern = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device)
    values = pattern.to(torch.int16).view(dtype)
    out = torch.zeros(len(values), device=device)
    _load[(len(values) // CHUNK,)](values, out, BLOCK=CHUNK)
    _assert_same_bits(out, values.float(), values)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_every_float16_tie(device: torch.device) -> None:
    # Between every two neighbours of float16, from subnormal to largest: the middle, which goes
    # to the even one, and the float32 values beside the middle.
    pattern = torch.arange(0x7C00, dtype=torch.int32, device=device).to(torch.int16)
    lower = pattern.view(torch.float16).double()
    upper = (pattern + 1).view(torch.float16).double()
    # Above the largest finite value lies what would be the next one.
    upper[-1] = 65536.0
    middle = ((lower + upper) / 2).float()
    towards = torch.full_like(middle, torch.inf)
    values = torch.cat(
        (middle, torch.nextafter(middle, towards), torch.nextafter(middle, -towards))
    )
    values = torch.nn.functional.pad(values, (0, -len(values) % CHUNK))
    values = torch.cat((values, -values))
    _assert_same_bits(_stored(values, torch.float16), values.to(torch.float16), values)


def test_float64_to_float32(device: torch.device) -> None:
    base = torch.randn(CHUNK, device=device).double()
    half = torch.finfo(torch.float32).eps / 2
    for factor in (0.0, half / 2, half * (1 - 2**-20), half, half * (1 + 2**-20)):
        values = base * (1 + factor)
        _assert_same_bits(_stored(values, torch.float32), values.float(), values)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_rounds_like_torch(backend: str, device: torch.device) -> None:
    # The same through an optimizer: p - 1 * (-g) with p = -0 is g itself, in float32, so that
    # only the store rounds. Catches a path that does not use the codec.
    info = torch.finfo(torch.bfloat16)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max, info.tiny]
    special += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, torch.finfo(torch.float32).max]
    special += [info.tiny * 2**-7, info.tiny * 2**-8, info.tiny * 3 * 2**-8, 1e-45]
    gradient = torch.cat((torch.tensor(special), torch.randn(2000))).to(device)
    p = torch.nn.Parameter(torch.full_like(gradient, -0.0, dtype=torch.bfloat16))
    p.grad_dtype = None
    p.grad = gradient
    fusedopt.SGD([p], lr=1.0, maximize=True, backend=backend).step()
    _assert_same_bits(p.detach(), gradient.to(torch.bfloat16), gradient)


@pytest.mark.skipif(not INTERPRETED, reason="compares the interpreter's own conversion")
def test_interpreter_truncates() -> None:
    # Why the codec rounds by itself there. If this fails, Triton has changed and the special
    # case in kernels/codecs/cast.py can go.
    values = torch.full((CHUNK,), 1 + 3 * 2**-8)
    out = torch.zeros(CHUNK, dtype=torch.bfloat16)
    _plain_store[(1,)](values, out, BLOCK=CHUNK)
    assert out[0].item() != values.to(torch.bfloat16)[0].item()


@jit
def _plain_store(source, destination, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(destination + offsets, tl.load(source + offsets).to(tl.bfloat16))
