"""One linear layer: every contender compared, measured for memory, and timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from bench import clock

from .agreement import check_results
from .cases import ARITHMETIC, Shape
from .contenders import BASE, CONTENDERS, OURS, Operands, Result, Run

T = TypeVar("T")

UNFIT = "does not fit"


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
    """Draw a layer's input, errors and weight, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    return Operands(
        draw(shape.batch, shape.length, shape.inputs),
        draw(shape.batch, shape.length, shape.outputs),
        draw(shape.outputs, shape.inputs),
    )


def measure(
    shape: Shape, kind: str, settings: dict[str, Any], advance: Callable[[], None]
) -> dict[str, Any]:
    """Return everything about a shape and a type of arithmetic.

    Raises:
        Mismatch: where two contenders differ by more than rounding.
        torch.OutOfMemoryError: where operands and results alone do not fit.
    """
    device, arithmetic = torch.device(settings["device"]), ARITHMETIC[kind]
    # Before any memory is counted.
    watch = clock.Clock(device)
    with torch.no_grad(), arithmetic.set():
        x = operands(shape, arithmetic.dtype, device)
        found, runs = _admit(shape, kind, x, advance)
        if OURS not in runs or BASE not in runs:
            raise torch.OutOfMemoryError(f"the gradient of {shape} in {kind} {UNFIT}")
        times = clock.in_turn(runs, watch, settings["repetitions"], settings["seconds"])
    for name, measured in times.items():
        found[name] |= clock.summary(measured)
    for name in times:
        found[name] |= clock.ratio(found[name], found[BASE])
    return {"shape": str(shape), **vars(shape), "arithmetic": kind, "contenders": found}


def _admit(
    shape: Shape, kind: str, x: Operands, advance: Callable[[], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, Run]]:
    """Run each contender that fits once, compare it with ours, and note its memory."""
    contenders = {name: c for name, c in CONTENDERS.items() if c.applies(shape)}
    # All of them first: what one holds on to is missing to the others when times are taken.
    runs = {name: _unless_full(partial(c.prepare, x)) for name, c in contenders.items()}
    ours = CONTENDERS[OURS].prepare(x)()
    found: dict[str, dict[str, Any]] = {}
    fits: dict[str, Run] = {}
    for name, contender in contenders.items():
        entry: dict[str, Any] = {"title": contender.title, "source": contender.source}
        run = runs[name]
        if run is not None and _unless_full(run) is not None:
            entry["status"] = "measured"
            entry |= _facts(name, run, ours, kind, x.a.device)
            fits[name] = run
        else:
            entry["status"] = UNFIT
        found[name] = entry
        clock.release()
        advance()
    return found, fits


def _unless_full(function: Callable[[], T]) -> T | None:
    """Call a function; return None where the device lacks the memory for it."""
    try:
        return function()
    except torch.OutOfMemoryError:
        # Nothing more here: the error holds on to the frames, and so to what did fit.
        return None


def _facts(
    name: str,
    run: Run,
    ours: Result,
    kind: str,
    device: torch.device,
) -> dict[str, Any]:
    result = run()
    distances = check_results(name, result, ours, kind, ARITHMETIC[kind])
    facts: dict[str, Any] = {"distance": distances}
    facts["result_bytes"] = sum(t.numel() * t.element_size() for t in result if t is not None)
    del result
    facts["peak_bytes"] = clock.peak_bytes(run, device)
    return facts
