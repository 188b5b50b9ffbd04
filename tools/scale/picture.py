"""The picture of docs/scale.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from tools.readme import ROOT

from .costs import Layout, Step
from .models import MODELS, Model
from .page import GPUS, PICTURE, first, fsdp2
from .tables import by_tensor, memory

# Over how many GPUs HSDP cuts, in the picture.
SHARDS = 64
FILE = ROOT / PICTURE
Curve = list[tuple[int, float]]

LINES: dict[str, Callable[[Step], float]] = {
    "memory: update and norm": lambda s: s.passes,
    "host": lambda s: s.host,
    "launches": lambda s: s.launching,
    "norm's all-reduce": lambda s: s.norm,
    "squares, FSDP2": lambda s: by_tensor(s).seconds,
    "training step": lambda s: s.training,
}
HSDP = f"squares, HSDP over {SHARDS}"


def curves(model: Model) -> dict[str, Curve]:
    """Return for each line the numbers of GPUs, and seconds."""
    found = {name: [(n, of(fsdp2(model, n))) for n in GPUS] for name, of in LINES.items()}
    shared = [Step(model, Layout(n, SHARDS)) for n in GPUS if n >= SHARDS]
    found[HSDP] = [(s.layout.gpus, by_tensor(s).seconds) for s in shared]
    return found


def digest() -> str:
    """Return what tells whether a picture is of these curves."""
    rounded = [
        [[name, n, f"{y:.6g}"] for name, line in curves(m).items() for n, y in line] for m in MODELS
    ]
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()


def draw() -> Figure:
    """Draw a panel for each model."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for axes, model in zip(panels, MODELS, strict=True):
        for i, (name, line) in enumerate(curves(model).items()):
            style = "--" if name in ("training step", HSDP) else "-"
            colour = "0.5" if name == "training step" else f"C{i}"
            axes.plot(*zip(*line, strict=True), style, color=colour, label=name)
        fits = first(model, lambda s: s.peak(squares=False) < memory())
        if fits is not None and fits > GPUS[0]:
            axes.axvspan(GPUS[0], fits, color="0.92", label="does not fit", zorder=0)
        axes.set(xscale="log", yscale="log", title=model.name, xlabel="GPUs")
        axes.set_xticks([8, 64, 512, 4096, 16384], ["8", "64", "512", "4,096", "16,384"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds, counted and not run")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def write(path: Path = FILE) -> None:
    """Draw the picture into its file, with the digest of what is drawn."""
    draw().savefig(path, dpi=90, metadata={"Description": digest()})
