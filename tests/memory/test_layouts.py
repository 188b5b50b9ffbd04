"""Tensors of every layout: parameter, gradient and each state laid out independently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from guarded import Guarded, channels_last, padded_rows, transposed, with_holes
from tolerances import STEP, TRAJECTORY, assert_close_ulps, assert_untouched
from torch import Tensor
from torch.nn import Parameter
from trajectory import Trajectory, assert_same_ends, make_gradients

import fusedopt

SHAPE = (2, 3, 4, 5)
LAYOUTS: dict[str, Callable[[Tensor], Guarded]] = {
    "contiguous": Guarded,
    "transposed": lambda x: Guarded(x, transposed(x.shape)),
    "channels_last": lambda x: Guarded(x, channels_last(x.shape)),
    "every_second": lambda x: Guarded(x, with_holes(x.shape)),
    "padded_rows": lambda x: Guarded(x, padded_rows(x.shape)),
    "misaligned": lambda x: Guarded(x, shift=1),
    "misaligned_transposed": lambda x: Guarded(x, transposed(x.shape), shift=3),
}
# The states that each class keeps under these arguments.
CLASSES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "SGD": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, ("momentum_buffer",)),
    "RMSprop": (
        {"lr": 0.03, "alpha": 0.9, "centered": True, "momentum": 0.9},
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
    "Adam": (
        {"lr": 0.1, "betas": (0.6, 0.9), "amsgrad": True, "weight_decay": 0.1},
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
}


def _combinations(operands: int) -> list[tuple[str, ...]]:
    """Each operand in each layout beside contiguous ones, and all of them different at once."""
    names = list(LAYOUTS)
    chosen = {("contiguous",) * operands}
    for position in range(operands):
        for layout in names:
            one = ["contiguous"] * operands
            one[position] = layout
            chosen.add(tuple(one))
    for turn in range(len(names)):
        chosen.add(tuple(names[(turn + i) % len(names)] for i in range(operands)))
        chosen.add((names[turn],) * operands)
    return sorted(chosen)


def _check_layouts(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments, states = CLASSES[name]
    layouts = _combinations(2 + len(states))
    labels = ["/".join(layout) for layout in layouts]
    watched: list[tuple[str, Guarded]] = []

    def place(layout: str, values: Tensor, label: str) -> Tensor:
        guard = LAYOUTS[layout](values)
        watched.append((label, guard))
        return guard.view

    values = [torch.randn(SHAPE, dtype=dtype, device=device) for _ in layouts]
    params = [
        Parameter(place(layout[0], x, f"parameter {label}"))
        for x, layout, label in zip(values, layouts, labels, strict=True)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    copies = [Parameter(x.to(wide, copy=True)) for x in values]
    ours = Trajectory(getattr(fusedopt, name)(params, **arguments, backend=backend), labels)
    model = getattr(torch.optim, name)(copies, **arguments, foreach=False)
    expected = Trajectory(model, labels, dtype)
    before = ours.values()
    steps = make_gradients(values, 3)
    for number, gradients in enumerate(steps):
        placed = [
            place(layout[1], g, f"gradient {label}")
            for g, layout, label in zip(gradients, layouts, labels, strict=True)
        ]
        ours.step(placed)
        expected.step(gradients)
        for label, g, original in zip(labels, placed, gradients, strict=True):
            assert_untouched(g, original, f"gradient {label}")
        if number == 0:
            _place_states(ours, states, layouts, labels, place)
    assert_same_ends(ours, expected, before, TRAJECTORY)
    for label, guard in watched:
        guard.check(label)


def _place_states(
    run: Trajectory,
    names: Sequence[str],
    layouts: Sequence[tuple[str, ...]],
    labels: Sequence[str],
    place: Callable[[str, Tensor, str], Tensor],
) -> None:
    """Exchange states for copies in other layouts, as a checkpoint from elsewhere does."""
    for p, layout, label in zip(run.params, layouts, labels, strict=True):
        state = run.optimizer.state[p]
        for name, of_state in zip(names, layout[2:], strict=True):
            state[name] = place(of_state, state[name], f"{name} {label}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_operand_in_every_layout(name: str, backend: str, device: torch.device) -> None:
    # Catches elements that are paired by their place in memory where their order differs, writes
    # into holes, staging that is not copied back, or copied into the gradient, and a layout that
    # is remembered from the step before.
    _check_layouts(name, backend, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=["bfloat16", "complex64"])
def test_layouts_in_other_types(dtype: torch.dtype, device: torch.device) -> None:
    if dtype.is_complex:
        _check_complex_layouts(device)
    else:
        _check_layouts("SGD", "triton", dtype, device)


def _check_complex_layouts(device: torch.device) -> None:
    # Real and imaginary part stay beside each other whatever the strides.
    values = torch.randn(4, 5, dtype=torch.complex64, device=device)
    arguments, _ = CLASSES["Adam"]
    params = [Parameter(make(values).view) for make in (Guarded, _transposed_guard)]
    params.append(Parameter(Guarded(values, with_holes(values.shape)).view))
    copies = [Parameter(values.clone()) for _ in params]
    labels = ["contiguous", "transposed", "every_second"]
    ours = Trajectory(fusedopt.Adam(params, **arguments, backend="triton"), labels)
    theirs = Trajectory(torch.optim.Adam(copies, **arguments, foreach=False), labels)
    before = ours.values()
    for gradients in make_gradients(copies, 2):
        # A conjugate view is a flag on the tensor, not on its memory.
        ours.step([gradients[0].conj().resolve_conj().conj(), gradients[1], gradients[2].mT.mT])
        theirs.step(gradients)
    assert_same_ends(ours, theirs, before, TRAJECTORY)


def _transposed_guard(values: Tensor) -> Guarded:
    return Guarded(values, transposed(values.shape))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_expanded_gradients(backend: str, device: torch.device) -> None:
    # What sum().backward() leaves behind: one value, or one row, for all elements.
    shape = (6, 1030)
    column = torch.linspace(1, 2, 6, device=device)[:, None]
    row = torch.linspace(-3, -1, 1030, device=device)
    gradients = [torch.tensor(1.5, device=device).expand(shape), column.expand(shape)]
    gradients += [row.expand(shape), row.flip(0).expand(shape)]
    originals = [g.clone() for g in gradients]
    values = [torch.randn(shape, device=device) for _ in gradients]
    params = [Parameter(x.clone()) for x in values]
    copies = [Parameter(x.clone()) for x in values]
    arguments, _ = CLASSES["Adam"]
    labels = ["scalar", "column", "row", "flipped"]
    ours = Trajectory(fusedopt.Adam(params, **arguments, backend=backend), labels)
    theirs = Trajectory(torch.optim.Adam(copies, **arguments, foreach=False), labels)
    before = ours.values()
    for _ in range(2):
        ours.step(gradients)
        theirs.step([g.contiguous() for g in gradients])
    assert_same_ends(ours, theirs, before, TRAJECTORY)
    for label, g, original in zip(labels, gradients, originals, strict=True):
        assert_untouched(g, original, f"gradient {label}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("what", ["parameter", "state"])
def test_expanded_targets_are_refused(what: str, backend: str, device: torch.device) -> None:
    # One memory location cannot take the updates of many elements; nothing may have changed.
    first = Parameter(torch.ones(4, device=device))
    second = Parameter(torch.ones(3, 4, device=device))
    optimizer = fusedopt.SGD([first, second], lr=0.1, momentum=0.9, backend=backend)
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    if what == "parameter":
        second.data = torch.ones(1, 4, device=device).expand(3, 4)
    else:
        buffer = torch.ones(1, 4, device=device).expand(3, 4)
        optimizer.state[second]["momentum_buffer"] = buffer
    before = [first.detach().clone(), second.detach().clone()]
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\]"):
        optimizer.step()
    for p, old in zip((first, second), before, strict=True):
        assert_untouched(p, old, "a parameter after a step that was refused")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_strides_change_at_one_address(what: str, backend: str, device: torch.device) -> None:
    # Catches a prepared launch that knows tensors by their addresses alone.
    start, first, second = (torch.randn(6, 6, device=device) for _ in range(3))
    p = Parameter(start.clone())
    optimizer = fusedopt.SGD([p], lr=0.5, backend=backend)
    p.grad = first.clone()
    optimizer.step()
    expected = start - 0.5 * first
    assert_close_ulps(p, expected, start, STEP[torch.float32], "after one step")
    p.grad.copy_(second)
    if what == "gradient":
        p.grad = p.grad.t()
        before, expected = expected, expected - 0.5 * second.t()
    else:
        p.data = p.data.t()
        before, expected = expected.t(), expected.t() - 0.5 * second
    optimizer.step()
    assert_close_ulps(p, expected, before, TRAJECTORY[torch.float32], "after two steps")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_negated_gradient(backend: str, device: torch.device) -> None:
    # Memory holds the values with the other sign, and a flag on the tensor says so, as for the
    # imaginary part of a conjugate; this one is dense, so that nothing but the flag gives it away.
    start, opposite = torch.randn(40, device=device), torch.randn(40, device=device)
    p = Parameter(start.clone())
    p.grad = torch._neg_view(opposite)
    assert p.grad.is_neg()
    fusedopt.SGD([p], lr=0.5, backend=backend).step()
    assert_close_ulps(p, start + 0.5 * opposite, start, STEP[torch.float32], "parameter")
