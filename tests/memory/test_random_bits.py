"""Random bits of stochastic rounding: how random they are, and what they are a function of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fusedopt.memory import rounding

COUNT = 1 << 18
# Standard deviations: of some thousand figures, chance has one beyond it in ten such runs.
Z = 4.5
Bits = Callable[[np.ndarray, int, int], np.ndarray]
U32 = np.uint32


def ours(index: np.ndarray, key0: int, key1: int) -> np.ndarray:
    return rounding.random_bits(torch.from_numpy(index), key0, key1).numpy().view(U32)


def one_round(index: np.ndarray, key0: int, key1: int) -> np.ndarray:
    x = index.astype(U32) ^ U32(key0)
    for shift, factor in ((15, 0xD168AAAD), (15, 0xAF723597)):
        x = (x ^ (x >> U32(shift))) * U32(factor)
    return x ^ (x >> U32(15)) ^ U32(key1)


def philox(index: np.ndarray, key0: int, key1: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011), first word: what is beyond doubt."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [(index & 0xFFFFFFFF).astype(np.uint64), (index >> 32).astype(np.uint64)]
    c += [np.zeros_like(c[0]), np.zeros_like(c[0])]
    for i in range(10):
        k0, k1 = (key0 + i * 0x9E3779B9) % (1 << 32), (key1 + i * 0xBB67AE85) % (1 << 32)
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> high) ^ c[1] ^ np.uint64(k0),
            b & low,
            (a >> high) ^ c[3] ^ np.uint64(k1),
            a & low,
        ]
    return c[0].astype(U32)


def _balance(x: np.ndarray) -> float:
    """Return the worst deviation from one half among the 32 bits."""
    ones = np.unpackbits(x.view(np.uint8)).reshape(len(x), 32).sum(0)
    return float(abs(ones - len(x) / 2).max() / (len(x) / 4) ** 0.5)


def _even(cells: np.ndarray, count: int) -> float:
    """Return how far numbers below ``count`` are from equally many of each, by chi-squared."""
    expected = len(cells) / count
    square = ((np.bincount(cells, minlength=count) - expected) ** 2 / expected).sum()
    return float(abs(square - (count - 1)) / (2 * (count - 1)) ** 0.5)


def _apart(name: str, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[str, float]]:
    """Return how far two streams are from independent ones."""
    yield f"{name}: bits that differ", _balance(x ^ y)
    yield f"{name}: differences", _even((x - y) >> U32(20), 1 << 12)
    yield f"{name}: pairs", _even((x >> U32(26)) * U32(64) + (y >> U32(26)), 1 << 12)


def figures(bits: Bits, seed: int) -> Iterator[tuple[str, float]]:
    """Deviations from chance, in standard deviations."""
    index = np.arange(COUNT)
    key = rounding.keys(seed, 3, 100)
    x = bits(index, *key)
    yield "bits", _balance(x)
    yield "upper bits", _even(x >> U32(16), 1 << 16)
    for lag in (1, 2, 3, 64, 768, 4096, 65536):
        yield from _apart(f"index and index + {lag}", x[lag:], x[:-lag])
    for bit in range(40):
        # Half of the indices: with the others, each pair would count twice.
        lower = (index >> bit << (bit + 1)) | (index & ((1 << bit) - 1))
        changed = bits(lower, *key) ^ bits(lower | (1 << bit), *key)
        yield f"avalanche of index bit {bit}", _balance(changed)
    for name, other in (
        ("step", (seed, 3, 101)),
        ("parameter", (seed, 4, 100)),
        ("seed", (seed + 1, 3, 100)),
    ):
        yield from _apart(f"next {name}", x, bits(index, *rounding.keys(*other)))


@pytest.mark.parametrize("bits, seed", [(ours, 0), (ours, 1), (ours, 1 << 40), (philox, 0)])
def test_bits_are_as_good_as_random(bits: Bits, seed: int) -> None:
    # Catches a shift or a factor that mixes too little, and keys of which one is not mixed in.
    # Philox shows that the bounds are those of chance.
    found = dict(figures(bits, seed))
    assert {name: z for name, z in found.items() if z > Z} == {}


def test_one_round_would_not_do() -> None:
    # Why there are two: and that the figures see it.
    found = dict(figures(one_round, 0))
    assert max(z for name, z in found.items() if name.startswith("index and")) > 100


def test_keys_differ_in_every_bit() -> None:
    # Catches a part of the triple that is dropped or cut. Half of the 64 bits change at a time.
    start = (12345, 6, 7890)
    for position in range(3):
        for bit in range(60):
            other = list(start)
            other[position] ^= 1 << bit
            pairs = zip(rounding.keys(*start), rounding.keys(*other), strict=True)
            changed = sum(bin(a ^ b).count("1") for a, b in pairs)
            assert 12 <= changed <= 52, (position, bit)


def test_keys_tell_the_parts_apart() -> None:
    # Catches a sum or a product of them, for which one and two are two and one.
    numbers = range(6)
    triples = [(a, b, c) for a in numbers for b in numbers for c in numbers]
    assert len({rounding.keys(*triple) for triple in triples}) == len(triples)


def test_a_shard_draws_what_the_whole_draws() -> None:
    # Catches an index within the shard, and one that is cut at 2^32.
    key = rounding.keys(0, 1, 2)
    first = (1 << 32) - 1000
    whole = rounding.random_bits(torch.arange(first, first + 4096).view(64, 64), *key)
    for shards in (2, 4, 8):
        parts = torch.arange(first, first + 4096).view(64, 64).chunk(shards, dim=1)
        drawn = torch.cat([rounding.random_bits(part, *key) for part in parts], dim=1)
        assert torch.equal(drawn, whole)
    # Beyond 2^32 the numbers are others than before it.
    again = rounding.random_bits(torch.arange(4096) + first - (1 << 32) + (1 << 33), *key)
    assert len(set(again.tolist()) & set(whole.flatten().tolist())) < 10
