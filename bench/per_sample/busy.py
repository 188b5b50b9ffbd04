"""How many processors a linear layer keeps busy, by the model that the launcher chooses with.

``python -m bench.per_sample.busy`` prints it for the layers of known models, and draws it beside
what equal numbers of samples for each program came to. It needs no GPU, and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusedopt.kernels.per_sample.shapes import Shares, Tile, samples_tile, share_tiles

from .cases import Shape

# Rows and columns of the weights, and rows of a sample. ViT-B's head, of one row a sample, is not
# among them: 64 samples are two row blocks, which are not worth sharing.
MODELS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "GPT-2": (
        1024,
        {"qkv": (2304, 768), "out": (768, 768), "fc": (3072, 768), "proj": (768, 3072)}
        | {"head": (50257, 768)},
    ),
    "ViT-B": (
        197,
        {"qkv": (2304, 768), "out": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)},
    ),
    "Llama-3-8B": (
        2048,
        {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096)}
        | {"down": (4096, 14336), "head": (128256, 4096)},
    ),
    "Llama-3-70B": (
        2048,
        {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192)}
        | {"down": (8192, 28672), "head": (128256, 8192)},
    ),
}
# Processors, and what decides about tiles: H100 and H200, B200, MI300X.
DEVICES = {"H200": (132, 90), "B200": (148, 100), "MI300X": (304, 0)}
SAMPLES = range(8, 65)


@dataclass(frozen=True)
class Layer:
    """A weight and the samples that it has seen.

    Attributes:
        model: whose.
        name: of the layer.
        outputs: rows of the weight.
        inputs: columns of the weight.
        length: rows of a sample.
    """

    model: str
    name: str
    outputs: int
    inputs: int
    length: int

    def tile(self, capability: int) -> Tile:
        """Return what a program has, of 16-bit operands."""
        # Rows that start at multiples of 16 bytes; a vocabulary of 50257 has others.
        wide = self.outputs % 8 == 0 and self.inputs % 8 == 0
        choice = capability, 2, "tf32", self.outputs, self.inputs, wide, self.length
        return samples_tile(*choice)

    def shares(self, samples: int, device: str) -> Shares:
        """Return what is launched on a device."""
        processors, capability = DEVICES[device]
        tile = self.tile(capability)
        tiles = tile.count(self.outputs, self.inputs)
        return share_tiles(tiles, samples, -(-self.length // tile.rows), processors)

    def busy(self, samples: int, device: str) -> float:
        """Return the share of the processors' time that they have work in."""
        return self.shares(samples, device).busy(DEVICES[device][0])

    def busy_in_splits(self, samples: int, device: str) -> float:
        """Return the same for what was launched before: equal numbers of samples a program.

        The number of splits was chosen by an estimate of the time, in row blocks: whole waves of
        programs, 10 for the pipeline and the store of each, and 0.2 for each tile of partial sums.
        """
        processors, capability = DEVICES[device]
        tile = self.tile(capability)
        tiles, steps = tile.count(self.outputs, self.inputs), -(-self.length // tile.rows)

        def waves(splits: int) -> int:
            return -(-tiles * splits // processors)

        def time(splits: int) -> float:
            partial = 0.2 * tiles * splits if splits > 1 else 0.0
            return waves(splits) * (-(-samples // splits) * steps + 10) + partial

        most = max(1, min(samples, 2 * processors // tiles))
        splits = min(range(1, most + 1), key=time)
        splits = -(-samples // -(-samples // splits))
        return tiles * samples / (processors * waves(splits) * -(-samples // splits))


def layers() -> Iterator[Layer]:
    """Every layer of every model."""
    for model, (length, weights) in MODELS.items():
        for name, (outputs, inputs) in weights.items():
            yield Layer(model, name, outputs, inputs, length)


def shapes() -> dict[Shape, list[str]]:
    """Return what ``bench.per_sample --models`` measures, with the layers that each stands for.

    Of GPT-2 and ViT-B 32 samples, of the Llamas, whose samples are long, 8.
    """
    found: dict[Shape, list[str]] = {}
    for x in layers():
        shape = Shape(32 if x.length <= 1024 else 8, x.length, x.inputs, x.outputs)
        found.setdefault(shape, []).append(f"{x.model} {x.name}")
    return found


def partial_bytes(layer: Layer, samples: int, device: str) -> int:
    """Return the bytes that a launch has room for partial results in."""
    tile, shares = layer.tile(DEVICES[device][1]), layer.shares(samples, device)
    return shares.shares * shares.slots * tile.outputs * tile.inputs * 4


def table() -> Table:
    """Tabulate the least over numbers of samples, before and now."""
    numbers = f"{SAMPLES[0]} to {SAMPLES[-1]}"
    title = f"Busy processors, a model: the least at {numbers} samples, before and now"
    result = Table("layer", "weight", *DEVICES, "partial results, MiB at most", title=title)
    for layer in layers():
        cells = [
            f"{min(layer.busy_in_splits(n, device) for n in SAMPLES):.2f}"
            f" {min(layer.busy(n, device) for n in SAMPLES):.2f}"
            for device in DEVICES
        ]
        room = max(partial_bytes(layer, n, device) for n in SAMPLES for device in DEVICES)
        name = f"{layer.model} {layer.name}"
        result.add_row(name, f"{layer.outputs} x {layer.inputs}", *cells, f"{room / 2**20:.0f}")
    return result


def draw(file: Path) -> None:
    """Draw each layer's least and median, before and now, on each device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, len(DEVICES), sharey=True)
    names = [f"{x.model} {x.outputs} x {x.inputs}" for x in layers()]
    places = range(len(names))
    for place, (device, (processors, _)) in zip(axes, DEVICES.items(), strict=True):
        for label, color, height, method in (
            ("equal numbers of samples (before)", "C1", 0.2, Layer.busy_in_splits),
            ("equal shares of row blocks (now)", "C0", -0.2, Layer.busy),
        ):
            found = [sorted(method(x, n, device) for n in SAMPLES) for x in layers()]
            low, middle = [x[0] for x in found], [x[len(x) // 2] for x in found]
            at = [y - height for y in places]
            place.hlines(at, low, [x[-1] for x in found], color=color, linewidth=3, alpha=0.5)
            place.plot(middle, at, "o", color=color, markersize=4, label=label)
        place.axvline(0.9, color="black", linestyle="--", linewidth=1)
        place.set_title(f"{processors} processors ({device})")
        place.set_xlim(0, 1.02)
        place.set_xlabel("busy, by the model")
        place.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(list(places), names, fontsize=8)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    numbers = f"{SAMPLES[0]} to {SAMPLES[-1]}"
    figure.suptitle(f"Busy processors at {numbers} samples: range and median (a model, no times)")
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; draw where asked to."""
    parser = argparse.ArgumentParser("python -m bench.per_sample.busy", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw it, too")
    options = parser.parse_args(arguments)
    Console(width=120).print(table())
    if options.out is not None:
        draw(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
