"""Draws the pictures of docs/architecture.md: ``python tools/draw_architecture.py``.

Boxes name files, arrows what travels between them, so that a move of code shows as a name that is
wrong: ``--check`` says which, and draws nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"

HOST, DEVICE, OTHERS = "#dbe9f6", "#fde3c8", "#eeeeee"


@dataclass(frozen=True)
class Box:
    """A file, or something outside of the project.

    Attributes:
        x, y: its middle, in columns and rows; rows count downwards.
        title: what it is.
        text: what it does.
        file: where, from the project's root; nothing for what is not ours.
        color: who runs it.
    """

    x: float
    y: float
    title: str
    text: str
    file: str = ""
    color: str = HOST


@dataclass(frozen=True)
class Arrow:
    """What travels from one box to another, by their titles."""

    start: str
    end: str
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """One drawing."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


STEP = Picture(
    "The life of a step",
    (
        Box(0, 0, "step()", "closure, hooks,\nloss scaler", "fusedopt/optimizer.py"),
        Box(
            1,
            0,
            "Request",
            "parameters, inputs, samples,\nscale: gathered once,\nDTensors unwrapped",
            "fusedopt/step/request.py",
        ),
        Box(
            1,
            1,
            "checks",
            "everything that can fail,\nbefore anything changes",
            "fusedopt/step/checks.py",
        ),
        Box(
            2,
            0,
            "Plan",
            "does the last one still fit?\nelse a new one: device groups",
            "fusedopt/step/plan.py",
        ),
        Box(
            2,
            1,
            "DeviceGroup",
            "tensors of one device,\ntheir step counts",
            "fusedopt/step/device_group.py",
        ),
        Box(0, 1, "statistics", "squares of samples,\nor nothing", "fusedopt/statistics/base.py"),
        Box(
            3,
            0,
            "norm",
            "norm of all gradients,\none factor on the device",
            "fusedopt/step/norm.py",
        ),
        Box(
            3,
            2,
            "coefficients",
            "lr, betas, step to scalars,\nonce a group and step count",
            "fusedopt/coefficients.py",
        ),
        Box(
            3,
            1,
            "GradScale",
            "loss scale, clipping factor,\noverflow flag",
            "fusedopt/step/scale.py",
            DEVICE,
        ),
        Box(
            2,
            2,
            "executor",
            "one launch a bucket:\ntypes, options, alignment",
            "fusedopt/backends/triton.py",
        ),
        Box(1, 2, "update kernel", "chunk, load, rule, store", "kernels/multi_tensor.py", DEVICE),
        Box(0, 2, "rule", "the update of one element", "kernels/rules/adam.py", DEVICE),
    ),
    (
        Arrow("step()", "Request"),
        Arrow("statistics", "Request", "inputs"),
        Arrow("Request", "Plan"),
        Arrow("Request", "checks", "no plan fits"),
        Arrow("Plan", "DeviceGroup"),
        Arrow("Plan", "norm"),
        Arrow("norm", "GradScale", "factor"),
        Arrow("Plan", "GradScale", "scale, overflow"),
        Arrow("DeviceGroup", "coefficients"),
        Arrow("DeviceGroup", "executor"),
        Arrow("coefficients", "executor", "scalars"),
        Arrow("GradScale", "executor"),
        Arrow("executor", "update kernel", "addresses"),
        Arrow("update kernel", "rule", "float32"),
    ),
)

_P = "fusedopt/statistics/per_sample/"
BACKWARD = Picture(
    "The life of a backward pass, observed by PerSampleSquares",
    (
        Box(0, 0, "model(x)", "one batch of samples", "", OTHERS),
        Box(
            1,
            0,
            "ModelCalls",
            "which call of the model\na layer's call belongs to",
            _P + "model_calls.py",
        ),
        Box(2, 0, "ModelCall", "how many samples,\nwhere tensors keep them", _P + "model_call.py"),
        Box(3, 0, "LayerCall", "what a layer needs\nbesides its arguments", _P + "layer_call.py"),
        Box(
            3, 1, "layers", "known layers; attention.py,\nany other: fallback.py", _P + "layers.py"
        ),
        Box(
            2,
            1,
            "observer",
            "behind the layer: notes input\nand gradient of the output",
            _P + "autograd.py",
        ),
        Box(
            1,
            1,
            "ParamTap",
            "before the parameter: runs\nwhen all uses have arrived",
            _P + "autograd.py",
        ),
        Box(1, 2, "reduce", "uses (uses.py) to gradient\nand squares", _P + "reduce.py"),
        Box(
            2,
            2,
            "ops",
            "each reduction in PyTorch\nand in Triton",
            "fusedopt/statistics/ops/",
        ),
        Box(
            3,
            2,
            "weight-gradient kernel",
            "E^T A with one accumulator\nmore, squared by samples",
            "kernels/per_sample/linear.py",
            DEVICE,
        ),
        Box(0, 1, "p.grad", "autograd adds", "", OTHERS),
        Box(
            0,
            2,
            "Record",
            "squares, count, and whether\nthe gradient is still that one",
            _P + "record.py",
        ),
    ),
    (
        Arrow("model(x)", "ModelCalls", "forward"),
        Arrow("ModelCalls", "ModelCall"),
        Arrow("ModelCall", "LayerCall"),
        Arrow("LayerCall", "layers"),
        Arrow("layers", "observer", "backward"),
        Arrow("observer", "ParamTap", "uses"),
        Arrow("ParamTap", "reduce"),
        Arrow("reduce", "ops"),
        Arrow("ops", "weight-gradient kernel"),
        Arrow("ParamTap", "p.grad", "gradient"),
        Arrow("ParamTap", "Record", "squares"),
        Arrow("p.grad", "Record", "arrived"),
    ),
)

PICTURES = {"step": STEP, "backward": BACKWARD}
WIDTH, HEIGHT = 0.74, 0.56


def missing() -> list[str]:
    """Return the files that the pictures name and that are not there."""
    named = [box.file for picture in PICTURES.values() for box in picture.boxes if box.file]
    return sorted({file for file in named if not (ROOT / file).exists()})


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    columns = 1 + max(box.x for box in picture.boxes)
    rows = 1 + max(box.y for box in picture.boxes)
    figure, axes = plt.subplots(figsize=(3.4 * columns, 1.75 * rows), dpi=110)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.55))
    axes.axis("off")
    axes.set_title(picture.title, fontsize=12)
    places = {box.title: box for box in picture.boxes}
    for arrow in picture.arrows:
        a, b = places[arrow.start], places[arrow.end]
        start, end = _edge(a, b), _edge(b, a)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555"})
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        # Beside the line: above a level one, else to its right.
        level = start[1] == end[1]
        style: dict[str, Any] = {
            "fontsize": 7,
            "color": "#555555",
            "va": "bottom" if level else "center",
        }
        x, y = (middle[0], middle[1] - 0.02) if level else (middle[0] + 0.03, middle[1])
        axes.text(x, y, arrow.text, ha="center" if level else "left", **style)
    for box in picture.boxes:
        corner = box.x - WIDTH / 2, box.y - HEIGHT / 2
        frame: dict[str, Any] = {
            "boxstyle": "round,pad=0.01",
            "facecolor": box.color,
            "edgecolor": "#777777",
        }
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, **frame))
        axes.text(
            box.x, box.y - 0.19, box.title, fontsize=9, weight="bold", ha="center", va="center"
        )
        axes.text(box.x, box.y + 0.02, box.text, fontsize=7, ha="center", va="center")
        file = box.file.removeprefix("fusedopt/")
        axes.text(
            box.x, box.y + 0.22, file, fontsize=5.5, family="monospace", ha="center", va="center"
        )
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _edge(box: Box, other: Box) -> tuple[float, float]:
    """Return where the line between the middles of two boxes leaves the first."""
    dx, dy = other.x - box.x, other.y - box.y
    share = min(WIDTH / 2 / abs(dx) if dx else 9.0, HEIGHT / 2 / abs(dy) if dy else 9.0)
    return box.x + share * dx, box.y + share * dy


def main() -> int:
    """Draw, or say which files are not where the pictures have them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look for the files named")
    options = parser.parse_args()
    lost = missing()
    if lost:
        print(f"not there: {', '.join(lost)}", file=sys.stderr)
        return 1
    if not options.check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, picture in PICTURES.items():
            draw(picture, FOLDER / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
