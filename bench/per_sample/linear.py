"""One linear layer: every contender compared, measured for memory, and timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import clock
from bench.harness.contenders import FAILED, MEASURED, UNFIT, Mismatch, first_line

from .cases import ARITHMETIC, Shape
from .contenders import BASE, CONTENDERS, OURS, Contender, Operands, Result, Run
from .correctness import check_results

# Of the weight's rows and columns, how many at either end are compared with float64.
EDGE = 8


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
        Mismatch: where ours differs from float64, or from torch, by more than rounding.
        torch.OutOfMemoryError: where operands and results alone do not fit.
    """
    device, arithmetic = torch.device(settings["device"]), ARITHMETIC[kind]
    # Before any memory is counted.
    watch = clock.Clock(device)
    with torch.no_grad(), arithmetic.set():
        x = operands(shape, arithmetic.dtype, device)
        found, runs = _admit(shape, kind, x, advance, settings.get("contenders"))
        if OURS not in runs or BASE not in runs:
            raise torch.OutOfMemoryError(f"the gradient of {shape} in {kind} {UNFIT}")
        times = clock.in_turn(runs, watch, settings["repetitions"], settings["seconds"])
    for name, measured in times.items():
        found[name] |= clock.summary(measured)
    for name in times:
        found[name] |= clock.ratio(found[name], found[BASE])
    return {"shape": str(shape), **vars(shape), "arithmetic": kind, "contenders": found}


def _admit(
    shape: Shape,
    kind: str,
    x: Operands,
    advance: Callable[[], None],
    chosen: list[str] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Run]]:
    """Run each contender that can once, compare it with ours, and note its memory."""
    contenders = {name: c for name, c in CONTENDERS.items() if c.applies(shape)}
    if chosen:
        kept = {OURS, BASE, *chosen}
        contenders = {name: c for name, c in contenders.items() if name in kept}
    # All of them first: what one holds on to is missing to the others when times are taken.
    prepared = {name: _attempt(c, partial(c.prepare, x)) for name, c in contenders.items()}
    ours = CONTENDERS[OURS].prepare(x)()
    _check_exactly(x, ours, kind)
    found: dict[str, dict[str, Any]] = {}
    fits: dict[str, Run] = {}
    for name, contender in contenders.items():
        entry: dict[str, Any] = {"title": contender.title, "source": contender.source}
        run, why = prepared[name]
        if run is not None:
            facts, why = _attempt(contender, partial(_facts, name, run, ours, kind, x.a.device))
            if facts is not None:
                entry |= facts
                fits[name] = run
        found[name] = entry | why
        clock.release()
        advance()
    return found, fits


def _attempt(
    contender: Contender, function: Callable[[], Any]
) -> tuple[Any | None, dict[str, Any]]:
    """Call a function; return what it returned or None, and the status with its reason.

    Raises:
        Exception: of any kind, where it is not another library's.
    """
    try:
        return function(), {"status": MEASURED}
    except torch.OutOfMemoryError:
        # Nothing more here: the error holds on to the frames, and so to what did fit.
        return None, {"status": UNFIT}
    except Exception as error:
        if not contender.foreign:
            raise
        text = str(error) if isinstance(error, Mismatch) else first_line(error)
        return None, {"status": FAILED, "reason": text}


def _check_exactly(x: Operands, ours: Result, kind: str) -> None:
    """Compare the corners of our result with float64: it is what the others are compared with.

    Raises:
        Mismatch: where it differs by more than rounding.
    """
    rows, columns = (_ends(size, x.a.device) for size in x.weight.shape)
    samples = torch.bmm(x.e[..., rows].double().transpose(1, 2), x.a[..., columns].double())
    exact = samples.sum(0), samples.square().sum(0)
    gradient, squares = (None if t is None else t[rows][:, columns] for t in ours)
    assert gradient is not None
    check_results(OURS, (gradient, squares), exact, kind, ARITHMETIC[kind], "float64")


def _ends(size: int, device: torch.device) -> Tensor:
    """Return the first and the last places of a dimension."""
    places = torch.arange(size, device=device)
    return places if size <= 2 * EDGE else torch.cat([places[:EDGE], places[-EDGE:]])


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
