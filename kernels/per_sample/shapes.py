"""Which tile a program owns: plain functions, no device needed.

Chosen by what the compiler makes of them (``python -m fusedopt codegen``): the widest tiles whose
accumulators stay in registers. ``linear_samples`` and ``convolution_samples`` keep three of them in
float32, the product of the sample at hand and two sums; ``linear_rows`` keeps two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Tiles that neighbouring programs stack along the outputs; see ``tiles.tile_of_program``.
GROUP = 8

# Rows that a row block of a short sample may have, and what a block costs beyond its rows, in rows.
ROWS = (64, 32, 16)
BLOCK_COST = 16


@dataclass(frozen=True, order=True)
class Tile:
    """A program's share of the weight: ``outputs x inputs``, in steps of ``rows`` of the operands.

    Attributes:
        outputs: rows of the weight.
        inputs: columns of the weight.
        rows: rows of the operands that one step multiplies.
        threads: threads of a program.
        stages: row blocks that are in flight.
        hides_zero: whether accumulators are set to a zero that the compiler does not know.
    """

    outputs: int
    inputs: int
    rows: int
    threads: int
    stages: int
    hides_zero: bool = False

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

    def constants_of_samples(self, precision: str, accumulate: bool) -> dict[str, object]:
        """State the same for a kernel that ends samples."""
        return {**self.constants(precision, accumulate), "HIDE_ZERO": self.hides_zero}

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


def _family(capability: int) -> str:
    """Whose tiles an architecture has: those of its matrix instruction, but for sm_120.

    There the compiler holds a thread to the 128 registers of two programs, at the price of stack,
    in tiles for which it takes more on sm_80 to 89.
    """
    return "sm_120" if capability // 10 == 12 else matrix_instruction(capability)


def takes_descriptors(capability: int, itemsize: int, precision: str) -> bool:
    """Whether ``linear_samples`` takes descriptors of its operands: what the hardware copies.

    Exact products of float32, whose operands lie in registers, would take stack.
    """
    return capability >= 90 and (itemsize == 2 or precision != "ieee")


# By ``_family`` and by operands: 16-bit, float32 in tf32.
_SAMPLES = {
    "wgmma": (Tile(128, 128, 64, 256, 4, True), Tile(128, 128, 32, 256, 3, True)),
    "tcgen05": (Tile(128, 64, 64, 256, 3), Tile(128, 64, 32, 256, 4)),
    "mma.sync": (Tile(128, 64, 32, 256, 4), Tile(128, 64, 32, 256, 3)),
    "sm_120": (Tile(128, 64, 32, 256, 3), Tile(128, 64, 32, 256, 3)),
    "v_mfma": (Tile(128, 128, 32, 512, 2), Tile(128, 128, 16, 512, 2)),
}
_ROWS = {
    "wgmma": (Tile(128, 128, 32, 256, 3), Tile(128, 128, 32, 256, 3)),
    "tcgen05": (Tile(128, 64, 64, 256, 3), Tile(128, 64, 32, 256, 3)),
    "mma.sync": (Tile(128, 64, 32, 256, 3), Tile(128, 64, 32, 256, 3)),
    "sm_120": (Tile(128, 64, 16, 256, 3), Tile(128, 64, 32, 256, 3)),
    "v_mfma": (Tile(128, 128, 32, 512, 2), Tile(128, 128, 32, 512, 2)),
}
# Of 16-bit operands whose rows do not start at multiples of 16 bytes (a vocabulary of 50257), every
# element has an address of its own.
_SCATTERED = Tile(128, 64, 16, 256, 3)
# Without matrix instructions the operands of each step lie in registers, too.
_SAMPLES_EXACT = Tile(128, 64, 32, 256, 3)
_ROWS_EXACT = Tile(64, 64, 16, 256, 3)


def samples_tile(
    capability: int,
    itemsize: int,
    precision: str,
    outputs: int,
    inputs: int,
    wide: bool = True,
    length: int = ROWS[0],
    segmented: bool = False,
) -> Tile:
    """Choose the tile of ``linear_samples``.

    Args:
        capability: compute capability times 10, or 0 where the GPU is not NVIDIA's.
        itemsize: bytes of an element of the operands.
        precision: of products of float32, ``"tf32"`` or ``"ieee"``.
        outputs: rows of the weight.
        inputs: columns of the weight.
        wide: whether operands can be loaded 16 bytes at a time.
        length: rows of a sample, of unequal ones in the mean.
        segmented: whether samples are segments of packed rows.
    """
    tile = _choose(_SAMPLES, _SAMPLES_EXACT, capability, itemsize, precision, wide)
    # Those of exact products, and those whose elements have addresses, take stack at other heights.
    special = tile in (_SAMPLES_EXACT, _SCATTERED)
    fit = _fit(tile if special else _shorten(tile, length), outputs, inputs)
    if special and fit.threads < tile.threads:
        # As many operands, or their addresses, a thread as in the wide tile.
        fit = replace(fit, rows=16)
    # Where segments end is kept in registers, which the addresses of a fourth block would need.
    return replace(fit, stages=min(fit.stages, 3)) if segmented else fit


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
    amd = capability == 0
    exact = precision == "ieee" and not amd
    height = min(max(_power_of_two(outputs), 16), 64 if exact else 128)
    width = min(max(_power_of_two(inputs), 16), 64)
    warps = min(8, max(1, height * width // 512))
    # The addresses of wider blocks of float32 take stack beside those of partial results.
    short = exact or (itemsize == 4 and matrix_instruction(capability) == "mma.sync")
    rows, threads, stages = 16 if short else 32, warps * (64 if amd else 32), 2 if amd else 3
    hides_zero = matrix_instruction(capability) == "wgmma" and not exact
    return Tile(height, width, rows, threads, stages, hides_zero)


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
    if itemsize == 2 and not wide:
        return replace(table[_family(capability)][0], inputs=64)
    if itemsize == 4 and precision == "ieee" and capability:
        return exact
    return table[_family(capability)][0 if itemsize == 2 else 1]


def _shorten(tile: Tile, length: int) -> Tile:
    """Give a tile the rows that short samples fill, with as many of them in flight."""
    cost = {rows: -(-length // rows) * (rows + BLOCK_COST) for rows in ROWS if rows <= tile.rows}
    rows = min(cost, key=cost.__getitem__)
    return replace(tile, rows=rows)


def _fit(tile: Tile, outputs: int, inputs: int) -> Tile:
    """Halve a tile that is more than twice as wide as the weight."""
    height = tile.outputs if outputs > 64 else min(tile.outputs, 64)
    width = tile.inputs if inputs > 64 else min(tile.inputs, 64)
    small = height * width <= 64 * 64 < tile.outputs * tile.inputs
    threads = tile.threads // (2 if small else 1)
    return replace(tile, outputs=height, inputs=width, threads=threads)


# Registers that a thread of a share may take: it has a processor to itself, and left alone the
# compiler takes stack for a second one's sake.
SHARE_REGISTERS = 255

# Of the processors' time, what whole tiles must keep busy for nothing to be shared; and row blocks
# that the longest program must be spared by sharing, which a further launch and two pieces cost.
BUSY = 0.9
WORTH = 4


@dataclass(frozen=True)
class Shares:
    """Which programs have tiles alone, and how others share what is left (``shares``).

    Attributes:
        tiles: of the weight.
        whole: tiles that a program has alone: the first ones.
        shares: programs that share the others, each at most a tile's positions.
        positions: of a tile: row blocks.
        unit: positions that are not cut: those of a sample, or 1.
        steps: positions of a sample, where one is cut; otherwise 1.
    """

    tiles: int
    whole: int
    shares: int
    positions: int
    unit: int = 1
    steps: int = 1

    @property
    def left(self) -> int:
        """Tiles that are shared."""
        return self.tiles - self.whole

    @property
    def slots(self) -> int:
        """Float32 tiles of partial results that a share has room for."""
        return 6 if self.steps > 1 else 4

    def longest(self, processors: int) -> int:
        """Positions of the processor that has the most, in whole waves."""
        longest = -(-self.whole // processors) * self.positions
        if self.shares:
            longest += -(-self.left * (self.positions // self.unit) // self.shares) * self.unit
        return longest

    def busy(self, processors: int) -> float:
        """Of the processors' time until the last one is done, the part in which they have work.

        A model: each runs one program at a time, all at one speed, and a position takes the time
        of any other. What partial results cost is not in it.
        """
        done = processors * self.longest(processors)
        return self.tiles * self.positions / done if done else 1.0


def share_tiles(
    tiles: int, samples: int, steps: int, processors: int, may_cut: bool = True
) -> Shares:
    """Choose how programs share the tiles of a weight.

    Whole tiles, where they keep BUSY of the processors' time or sharing spares fewer than WORTH row
    blocks; otherwise shares of whole samples, where they do; otherwise shares that cut samples.

    Args:
        tiles: of the weight.
        samples: of the batch.
        steps: row blocks of a sample.
        processors: of the GPU.
        may_cut: whether a share may end within a sample.
    """
    whole = Shares(tiles, tiles, 0, samples * steps)
    if not tiles or whole.busy(processors) >= BUSY:
        return whole
    shared = shared_by(tiles, samples, steps, processors)
    if may_cut and shared.busy(processors) < BUSY:
        shared = shared_by(tiles, samples, steps, processors, cut=True)
    spared = whole.longest(processors) - shared.longest(processors)
    return shared if spared >= WORTH else whole


def shared_by(tiles: int, samples: int, steps: int, processors: int, cut: bool = False) -> Shares:
    """Share out what is left of a weight's tiles when each processor has had equally many.

    Args:
        tiles: of the weight.
        samples: of the batch.
        steps: row blocks of a sample.
        processors: of the GPU.
        cut: whether a share may end within a sample.
    """
    whole = tiles // processors * processors
    unit = 1 if cut else steps
    units = (tiles - whole) * (samples * steps // unit if unit else 0)
    cut = cut and steps > 1
    return Shares(tiles, whole, min(processors, units), samples * steps, unit, steps if cut else 1)
