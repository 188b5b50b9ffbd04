"""Which tile a program owns and how many programs share it: plain functions, no device needed.

Chosen by what the compiler makes of them (``python -m fusedopt codegen``): the widest tiles whose
accumulators stay in registers. ``linear_samples`` and ``convolution_samples`` keep three of them in
float32, the product of the sample at hand and two sums; ``linear_rows`` keeps two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Tiles that neighbouring programs stack along the outputs; see ``tiles.tile_of_program``.
GROUP = 8

# Programs that take part in a sum over splits, in units of the processors of the GPU.
MAX_WAVES = 2


@dataclass(frozen=True, order=True)
class Tile:
    """A program's share of the weight: ``outputs x inputs``, in steps of ``rows`` of the operands.

    Attributes:
        outputs: rows of the weight.
        inputs: columns of the weight.
        rows: rows of the operands that one step multiplies.
        threads: threads of a program.
        stages: row blocks that are in flight.
    """

    outputs: int
    inputs: int
    rows: int
    threads: int
    stages: int

    def constants(self, precision: str, accumulate: bool) -> dict[str, object]:
        """State what a kernel of tiles is compiled for: whoever launches or compiles it asks here.

        Args:
            precision: how products of float32 are formed.
            accumulate: whether squares are added to what is there.
        """
        return {
            "BLOCK_O": self.outputs,
            "BLOCK_I": self.inputs,
            "BLOCK_ROWS": self.rows,
            "GROUP": GROUP,
            "PRECISION": precision,
            "ACCUMULATE": accumulate,
        }

    def count(self, outputs: int, inputs: int) -> int:
        """Tiles of a weight of ``outputs x inputs``."""
        return -(-outputs // self.outputs) * -(-inputs // self.inputs)


def matrix_instruction(capability: int) -> str:
    """How the names of an architecture's matrix instructions begin.

    Args:
        capability: compute capability times 10, or 0 where the GPU is not NVIDIA's.
    """
    if capability == 0:
        return "v_mfma"
    # Consumer cards of Blackwell (sm_120) have neither tcgen05 nor wgmma.
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(capability // 10, "mma.sync")


# By matrix instruction and by operands: 16-bit, float32 in tf32.
_SAMPLES = {
    "wgmma": (Tile(128, 128, 64, 256, 4), Tile(128, 128, 32, 256, 3)),
    "tcgen05": (Tile(128, 64, 64, 256, 3), Tile(128, 64, 32, 256, 4)),
    "mma.sync": (Tile(128, 64, 32, 256, 4), Tile(128, 64, 32, 256, 3)),
    "v_mfma": (Tile(128, 128, 32, 512, 2), Tile(128, 128, 32, 512, 2)),
}
_ROWS = {
    "wgmma": (Tile(128, 128, 32, 256, 3), Tile(128, 128, 32, 256, 3)),
    "tcgen05": (Tile(128, 64, 64, 256, 3), Tile(128, 64, 32, 256, 3)),
    "mma.sync": (Tile(128, 64, 32, 256, 3), Tile(128, 64, 32, 256, 3)),
    "v_mfma": (Tile(128, 128, 32, 512, 2), Tile(128, 128, 32, 512, 2)),
}
# Of 16-bit operands whose rows do not start at multiples of 16 bytes (a vocabulary of 50257), every
# element has an address of its own.
_SCATTERED = Tile(128, 64, 32, 256, 3)
# Without matrix instructions the operands of each step lie in registers, too.
_SAMPLES_EXACT = Tile(128, 64, 32, 256, 3)
_ROWS_EXACT = Tile(64, 64, 16, 256, 3)


def samples_tile(
    capability: int, itemsize: int, precision: str, outputs: int, inputs: int, wide: bool = True
) -> Tile:
    """Choose the tile of ``linear_samples``.

    Args:
        capability: compute capability times 10, or 0 where the GPU is not NVIDIA's.
        itemsize: bytes of an element of the operands.
        precision: of products of float32, ``"tf32"`` or ``"ieee"``.
        outputs: rows of the weight.
        inputs: columns of the weight.
        wide: whether operands can be loaded 16 bytes at a time.
    """
    tile = _choose(_SAMPLES, _SAMPLES_EXACT, capability, itemsize, precision, wide)
    return _fit(tile, outputs, inputs)


def rows_tile(
    capability: int, itemsize: int, precision: str, outputs: int, inputs: int, wide: bool = True
) -> Tile:
    """Choose the tile of ``linear_rows``; arguments as for ``samples_tile``."""
    tile = _choose(_ROWS, _ROWS_EXACT, capability, itemsize, precision, wide)
    return _fit(tile, outputs, inputs)


def convolution_tile(
    capability: int, itemsize: int, precision: str, outputs: int, inputs: int
) -> Tile:
    """Choose the tile of ``convolution_samples``; arguments as for ``samples_tile``.

    The addresses of gathered pixels take the registers that a wider tile would need, and weights of
    grouped convolutions are small.
    """
    del itemsize
    amd = capability == 0
    exact = precision == "ieee" and not amd
    height = min(max(_power_of_two(outputs), 16), 64 if exact else 128)
    width = min(max(_power_of_two(inputs), 16), 64)
    warps = min(8, max(1, height * width // 512))
    return Tile(height, width, 16 if exact else 32, warps * (64 if amd else 32), 2 if amd else 3)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _choose(
    table: dict[str, tuple[Tile, Tile]],
    exact: Tile,
    capability: int,
    itemsize: int,
    precision: str,
    wide: bool,
) -> Tile:
    if itemsize == 2 and not wide and capability:
        return _SCATTERED
    if itemsize == 4 and precision == "ieee" and capability:
        return exact
    return table[matrix_instruction(capability)][0 if itemsize == 2 else 1]


def _fit(tile: Tile, outputs: int, inputs: int) -> Tile:
    """Halve a tile that is more than twice as wide as the weight."""
    height = tile.outputs if outputs > 64 else min(tile.outputs, 64)
    width = tile.inputs if inputs > 64 else min(tile.inputs, 64)
    small = height * width <= 64 * 64 < tile.outputs * tile.inputs
    return Tile(height, width, tile.rows, tile.threads // (2 if small else 1), tile.stages)


@lru_cache(maxsize=4096)
def choose_splits(tiles: int, samples: int, steps_of_sample: int, processors: int) -> int:
    """Choose over how many programs a tile's samples are split.

    The time is estimated in steps of one tile: whole waves of programs, each with its share of the
    samples and with filling its pipeline and storing the tile, and then writing and reading partial
    results, 16 bytes an element and split (0.2 steps a tile on an H100).

    Args:
        tiles: tiles of the weight.
        samples: samples of the batch.
        steps_of_sample: steps that a sample takes.
        processors: processors of the GPU.

    Returns:
        A number of splits, none of which is without samples. Partial results take the memory of
        at most MAX_WAVES tiles a processor, whatever the batch.
    """
    best, least = 1, float("inf")
    for splits in range(1, max(1, min(samples, MAX_WAVES * processors // tiles)) + 1):
        share = -(-samples // splits)
        waves = -(-tiles * splits // processors)
        time = waves * (share * steps_of_sample + 10) + (0.2 * tiles * splits if splits > 1 else 0)
        if time < least:
            best, least = splits, time
    # Without splits that are empty because the others round up.
    return -(-samples // -(-samples // best))
