"""What the demo shows: tables on the terminal, loss curves as a PNG, everything as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table


# Rows of the table of losses.
ROWS = 6
_REMARK = {"triton": "", "reference": " It is written to be compared with, not for speed."}


def to_json(result: dict[str, Any]) -> str:
    """Write the result as strict JSON, which has no infinities and nans: they become null."""
    return json.dumps(_plain(result), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(result: dict[str, Any], console: Console) -> None:
    """Print tables, verdicts, the sample and the files written."""
    from rich.panel import Panel
    from rich.text import Text

    console.print(_loss_table(result))
    console.print(_cost_table(result))
    for line in (*_verdicts(result), *_notes(result)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if result["sample"]:
        # Text, not a string: generated brackets must not be read as markup.
        console.print(Panel(Text(result["sample"]), title="written by the fusedopt run"))


def _new_table(title: str, first: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column(first)
    for name in ("torch.optim.AdamW", "fusedopt.AdamW"):
        table.add_column(name, justify="right")
    return table


def _loss_table(result: dict[str, Any]) -> Table:
    table = _new_table("Loss, nats per character", "step")
    table.add_column("difference", justify="right")
    runs = result["runs"]["torch"], result["runs"]["fusedopt"]
    steps = result["steps"]
    chosen = sorted({1, *(max(1, steps * i // ROWS) for i in range(1, ROWS + 1))})
    rows = [(str(step), *(run["losses"][step - 1] for run in runs)) for step in chosen]
    rows.append(("held-out text", *(run["held_out_loss"] for run in runs)))
    for name, theirs, ours in rows:
        table.add_row(name, f"{theirs:.6f}", f"{ours:.6f}", f"{ours - theirs:.2g}")
    return table


def _cost_table(result: dict[str, Any]) -> Table:
    table = _new_table("Cost of the optimizer", "")
    runs = result["runs"]["torch"], result["runs"]["fusedopt"]
    table.add_row("step, median ms", *(f"{run['step_ms']:.3f}" for run in runs))
    state = (f"{run['state_bytes_per_parameter']:.2f}" for run in runs)
    table.add_row("state, bytes per parameter", *state)
    least = (f"{run['least_traffic_per_parameter']:.1f}" for run in runs)
    table.add_row("the least to read and write, bytes per parameter", *least)
    return table


def _verdicts(result: dict[str, Any]) -> list[str]:
    apart = result["agreement"]
    lines = [
        f"Backend: {result['backend']} ({result['backend_reason']}).{_REMARK[result['backend']]}",
        f"Runs {_verdict(apart['ok'])}: largest difference of the loss {apart['loss']:.2g} nats per"
        f" character (tolerance {apart['loss_tolerance']:.0e}), of a parameter"
        f" {apart['parameter']:.2g} (tolerance {apart['parameter_tolerance']:.0e}).",
    ]
    step = result["kernels"]
    if "not_run" in step:
        why = f"not run ({step['not_run']})" if step["ok"] is None else f"FAILED {step['not_run']}"
        lines.append(f"Kernels: {why}.")
        return lines
    where = "in Triton's interpreter" if step["interpreted"] else "on the GPU"
    lines.append(
        f"Kernels {_verdict(step['ok'])} with the reference {where}: one step of"
        f" {step['parameters']:,} parameters in {step['tensors']} tensors, {step['programs']}"
        f" programs, {step['seconds']:.2g} s; largest difference {step['worst_ulps']:.2g} ulps"
        f" (tolerance {step['tolerance_ulps']:.0f}; the step itself moves parameters by up to"
        f" {step['update_ulps']:.0e} ulps)."
    )
    return lines


def _verdict(ok: bool) -> str:
    return "agree" if ok else "DISAGREE"


def _notes(result: dict[str, Any]) -> list[str]:
    text = result["text"]
    lines = [
        _traffic(result),
        f"Model: {result['parameters']:,} parameters on {result['device']}; text: {text['source']},"
        f" {text['characters']:,} characters, a tenth of them held out; {result['seconds']:.0f} s"
        " in total.",
    ]
    for kind in ("png", "json"):
        if result[kind]:
            lines.append(f"Wrote {result[kind]}")
    if result["png_skipped"]:
        lines.append(f"No PNG: {result['png_skipped']}.")
    return lines


def _traffic(result: dict[str, Any]) -> str:
    """Say who moves the least, which is of the task and not of the optimizer."""
    least = result["runs"]["torch"]["least_traffic_per_parameter"]
    # 21 operands of AdamW's operations, by foreach or one by one, against 7 of one pass.
    whole = f"three times as much, {3 * least:.0f} bytes"
    if result["backend"] == "triton":
        return (
            "The least is moved in one pass, which fusedopt's kernels are; the operations of"
            f" torch.optim.AdamW, as it runs by default, read and write {whole}."
        )
    return (
        "The least is moved in one pass, which fusedopt's kernels are on a GPU; the operations of"
        f" torch.optim.AdamW, and of the reference that ran here, read and write {whole} (in part"
        " from the processor's cache)."
    )


def draw(result: dict[str, Any], file: Path) -> None:
    """Plot both runs' losses, their difference, and how far updates move each layer.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    # Without pyplot there is no display to look for: a Figure alone draws with Agg.
    from matplotlib.figure import Figure

    theirs, ours = (result["runs"][run]["losses"] for run in ("torch", "fusedopt"))
    steps = range(1, len(ours) + 1)
    figure = Figure(figsize=(8, 9), layout="constrained")
    losses, gap, ratios = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2.5))
    losses.plot(steps, theirs, color="#9ecae1", linewidth=4, label="torch.optim.AdamW")
    losses.plot(steps, ours, color="#a63603", linewidth=1, label="fusedopt.AdamW")
    held_out = [result["runs"][run]["held_out_loss"] for run in ("torch", "fusedopt")]
    for loss, color, size in zip(held_out, ("#9ecae1", "#a63603"), (10, 5), strict=True):
        losses.plot([len(ours)], [loss], "D", mfc=color, mec="black", ms=size, zorder=3)
    losses.plot([], [], "kD", ms=5, label=f"on held-out text: {held_out[0]:.4f}, {held_out[1]:.4f}")
    losses.set_ylabel("training loss, nats per character")
    losses.set_title(
        f"Character-level GPT, {result['parameters']:,} parameters, seed {result['seed']}, on"
        f" {result['device']} (backend: {result['backend']})"
    )
    losses.legend()
    gap.plot(steps, [b - a for a, b in zip(theirs, ours, strict=True)], color="black", linewidth=1)
    gap.set_ylabel("difference,\nfusedopt - torch")
    gap.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if result["agreement"]["loss"] == 0.0:
        gap.set_ylim(-1e-6, 1e-6)
        gap.text(0.5, 0.75, "every loss bitwise equal", transform=gap.transAxes, ha="center")
    _draw_ratios(ratios, result["update_ratios"])
    for axes in (losses, gap, ratios):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _draw_ratios(axes: Axes, found: dict[str, Any]) -> None:
    """Plot the norm of each layer's update over that of its parameters."""
    from matplotlib import colormaps

    layers = found["layers"]
    for i, (layer, values) in enumerate(layers.items()):
        color = colormaps["viridis"](i / max(1, len(layers) - 1))
        axes.plot(found["steps"], values, color=color, linewidth=1, label=layer)
    axes.set(yscale="log", xlabel="step", ylabel="norm of the update over\nthat of the parameter")
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
        fontsize="x-small", title="layer, by fusedopt.Telemetry", title_fontsize="small",
    )  # fmt: skip
