"""Bytes of a model and its optimizer, for ``python -m fusedopt info --model-parameters 8e9``."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

import fusedopt
from fusedopt.cli import precision
from fusedopt.formats import footprint
from fusedopt.formats.footprint import Part

NOTES = (
    "Kept is what there is between steps, and moved what one step reads and writes: not what"
    " backward writes, nor activations.",
    "Released: backward steps each parameter and frees its gradient"
    " (fusedopt.gradient_release), so that a few are there at a time.",
    "A scale is for 128 elements. Groups end where a tensor ends and, in one whose trailing"
    " dimensions are no multiple of 128 elements together, where each row does: vectors and narrow"
    " matrices have more scales, and so has a shard that is cut along such a dimension. --shapes"
    " counts them exactly.",
    "Step counts are 4 bytes a tensor, on the host.",
)


class Problem(Exception):
    """What is wrong with the arguments; the message is for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument_group("memory of a model and its optimizer").add_argument
    add("--model-parameters", type=float, metavar="8e9", help="how many parameters there are")
    add("--shapes", metavar="32*4096x4096,4096", help="or their shapes, for exact figures")
    add("--params", type=precision.read_dtype, default=torch.bfloat16, metavar="bf16", help="type")
    add("--gradient", type=precision.read_dtype, metavar="bf16", help="type (the parameters')")
    add("--optimizer", default="AdamW", metavar="AdamW", help="the class; case does not matter")
    add("--option", action="append", default=[], metavar="momentum=0.9", help="of it, repeatable")
    add("--clip", action="store_true", help="by the global norm, which reads gradients once more")
    add("--release", action="store_true", help="with gradient release, and nothing beside it")
    precision.add_arguments(parser)


def is_wanted(options: argparse.Namespace) -> bool:
    """Whether memory is asked for."""
    more = (options.gradient, options.states, options.master, options.rounding)
    asked = options.option or options.clip or options.release
    return _has_size(options) or bool(asked) or any(value is not None for value in more)


def _has_size(options: argparse.Namespace) -> bool:
    return options.model_parameters is not None or options.shapes is not None


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Work out what the options ask for.

    Raises:
        Problem: for arguments that mean nothing.
    """
    if not _has_size(options):
        raise Problem("how large is the model? --model-parameters or --shapes says it")
    if options.shapes is not None and options.model_parameters is not None:
        raise Problem(
            "--model-parameters and --shapes both say how large the model is: leave one out"
        )
    kind = _optimizer(options.optimizer)
    group = _group(kind, options)
    gradient = options.gradient or options.params
    arguments = (kind.rule, group, options.params, gradient)
    exact = None
    if options.shapes is not None:
        shapes = read_shapes(options.shapes)
        count: float = sum(map(math.prod, shapes))
        exact = footprint.of_tensors(*arguments, shapes, options.clip)
    else:
        count = options.model_parameters
    if not (math.isfinite(count) and count > 0):
        raise Problem(f"there must be more than 0 parameters, got {count:g}")
    parts = exact or footprint.of_element(*arguments, options.clip)
    scale = 1 / count if exact else 1
    found = {
        "parameters": count,
        "optimizer": kind.__name__,
        "exact": exact is not None,
        "tensors": [_row(part, scale) for part in parts],
        "torch_adamw_float32": _torchs(count, options.clip),
        "notes": list(NOTES),
    }
    if not options.release:
        found["total"] = _totals(parts, scale, count)
    found["released"] = _totals(parts, scale, count, released=True)
    return found


def _row(part: Part, scale: float) -> dict[str, Any]:
    return {
        "name": part.name,
        "dtype": str(part.dtype).removeprefix("torch."),
        "kept_bytes": part.resident * scale,
        "moved_bytes": part.moved * scale,
    }


def _torchs(count: float, clip: bool) -> dict[str, float]:
    """Return the totals of torch's AdamW in float32."""
    plain = (fusedopt.AdamW.rule, _plain_group(), torch.float32, torch.float32)
    found = _totals(footprint.of_element(*plain, False), 1, count)
    if clip:
        # ``clip_grad_norm_`` reads gradients twice, and writes them once.
        found["moved_bytes"] += 3 * 4
        found["moved_gb"] += 3 * 4 * count / 1e9
    return found


def _totals(
    parts: Sequence[Part], scale: float, count: float, released: bool = False
) -> dict[str, float]:
    kept, moved = (size * scale for size in footprint.total(parts, released))
    return {
        "kept_bytes": kept,
        "moved_bytes": moved,
        "kept_gb": kept * count / 1e9,
        "moved_gb": moved * count / 1e9,
    }


def _optimizer(name: str) -> Any:
    known = precision.optimizers()
    found = {key.lower(): value for key, value in known.items()}.get(name.lower())
    if found is None:
        raise Problem(f"no optimizer {name!r}: there are {', '.join(sorted(known))}")
    return found


def _group(kind: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Make the optimizer, whose own checks say what does not go together."""
    parameter = torch.nn.Parameter(torch.empty(1, dtype=options.params, device="meta"))
    more: dict[str, Any] = {"lr": 1e-3, **dict(map(_option, options.option))}
    if len(kind.rule.degrees) > 1:
        more["statistics"] = fusedopt.GradSampleSquares()
    try:
        made = kind([{"params": [parameter], **precision.chosen(options)}], **more)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Problem(str(error)) from None
    return dict(made.param_groups[0])


def _plain_group() -> dict[str, Any]:
    made = fusedopt.AdamW([torch.nn.Parameter(torch.empty(1, device="meta"))])
    return dict(made.param_groups[0])


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        if not equals or not value:
            raise Problem(f"--option is name=value, got {text!r}") from None
        return name, value


def read_shapes(text: str) -> list[tuple[int, ...]]:
    """Read ``32*4096x4096,4096``: thirty-two matrices and a vector.

    Raises:
        Problem: for anything else.
    """
    found: list[tuple[int, ...]] = []
    for part in text.split(","):
        count, star, shape = part.rpartition("*")
        try:
            sizes = tuple(map(int, shape.split("x")))
            times = int(count) if star else 1
        except ValueError:
            sizes, times = (), 0
        if not sizes or min(*sizes, times) < 1:
            raise Problem(f"--shapes is like 32*4096x4096,4096, got {part!r}")
        found += [sizes] * times
    return found


def print_tables(found: dict[str, Any]) -> None:
    """Print what ``collect`` returns."""
    from rich.console import Console
    from rich.table import Table

    count = found["parameters"]
    title = f"{found['optimizer']}, {count:,.0f} parameters: bytes a parameter"
    table = Table(title=title)
    table.add_column("tensor")
    table.add_column("type")
    for column in ("kept", "moved a step", "kept, GB", "moved, GB"):
        table.add_column(column, justify="right")
    for row in found["tensors"]:
        kept, moved = row["kept_bytes"], row["moved_bytes"]
        table.add_row(row["name"], row["dtype"], *_cells(kept, moved, count))
    table.add_section()
    for name, label in (
        ("total", "in all"),
        ("released", "in all, gradients released"),
        ("torch_adamw_float32", "torch's AdamW in float32"),
    ):
        if name in found:
            row = found[name]
            table.add_row(label, "", *_cells(row["kept_bytes"], row["moved_bytes"], count))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # A file has no edge.
        console = Console(width=110)
    console.print(table)
    for note in found["notes"]:
        console.print(note, markup=False)


def _cells(kept: float, moved: float, count: float) -> list[str]:
    in_all = (f"{size * count / 1e9:.4g}" for size in (kept, moved))
    return [f"{kept:.6g}", f"{moved:.6g}", *in_all]
