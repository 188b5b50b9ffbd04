"""What the figures are wanted to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .contenders import BASE, OURS

# Of the fused kernel's time over the plain gradient's: for samples of one row, and for long ones.
ROW, LONG, LONG_FROM = 2.0, 1.15, 256
# Of a training step's time with statistics over that without.
STEP = 1.10
# What squares take, in bytes a parameter.
SQUARES = 4.0
# Blocks of the allocator may be larger than asked for, by less than this each.
ROUNDING = 2 * 2**20


def aims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each aim with what was measured, and whether it holds; None where nothing was."""
    return [
        {
            "aim": text,
            "measured": measured,
            "bound": bound,
            "holds": measured <= bound if result["measurement"] and measured is not None else None,
        }
        for text, measured, bound in _stated(result)
    ]


def _stated(result: dict[str, Any]) -> Iterator[tuple[str, float | None, float]]:
    for case in result["linear"]:
        name = f"{case['shape']} {case['arithmetic']}"
        ours, base = (case["contenders"][key] for key in (OURS, BASE))
        if case["length"] == 1 or case["length"] >= LONG_FROM:
            bound = ROW if case["length"] == 1 else LONG
            yield f"{name}: time over the plain gradient", ours["ratio"], bound
        elements = case["inputs"] * case["outputs"]
        more = _more(ours["peak_bytes"], base["peak_bytes"], elements)
        yield f"{name}: more peak memory, bytes a parameter", more, _squares(elements)
    step = result["training"]
    if step is not None:
        yield "training step: time with statistics over without", step["ratio"], STEP
        more = _more(step["with"]["peak_bytes"], step["without"]["peak_bytes"], step["parameters"])
        bound = _squares(step["parameters"])
        yield "training step: more peak memory, bytes a parameter", more, bound


def _more(ours: int | None, base: int | None, elements: int) -> float | None:
    return None if ours is None or base is None else (ours - base) / elements


def _squares(elements: int) -> float:
    return SQUARES + ROUNDING / elements
