"""Tensors of every size, in memory that is watched on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from guarded import Guarded
from tolerances import TRAJECTORY, assert_untouched
from torch.nn import Parameter
from trajectory import Trajectory, assert_same_ends, make_gradients

import fusedopt
from fusedopt.kernels import multi_tensor

BLOCKS = sorted({multi_tensor.block_size(aligned) for aligned in (True, False)})
SIZES = [1, 2, 3, 7, 8, 9, 40]
SIZES += [n for block in BLOCKS for n in (block - 1, block, block + 1, 2 * block, 2 * block + 3)]
SHAPES: list[tuple[int, ...]] = [(), (0,), (0, 4), (3, 0, 2), (1, 1, 1), (5, 1, 7)]
SHAPES += [(n,) for n in sorted(set(SIZES))]

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.03, "alpha": 0.9, "centered": True, "momentum": 0.9},
    "AdamW": {"lr": 0.1, "betas": (0.6, 0.9), "amsgrad": True, "weight_decay": 0.3},
}


def _watched(
    shapes: Sequence[tuple[int, ...]], shifts: Sequence[int], dtype: torch.dtype, device: Any
) -> Iterator[Guarded]:
    for shape, shift in zip(shapes, shifts, strict=True):
        yield Guarded(torch.randn(shape, dtype=dtype, device=device), shift=shift)


def _check_steps(
    name: str,
    backend: str,
    guards: Sequence[Guarded],
    gradient_shifts: Sequence[int],
    steps: int = 2,
) -> None:
    """Step beside torch; check values, the memory around them, and the gradients."""
    params = [Parameter(guard.view) for guard in guards]
    stored = params[0].dtype
    # The model computes in float32, rounded once a step to the parameters' type.
    copies = [Parameter(p.detach().to(torch.float32, copy=True)) for p in params]
    labels = [f"{i}:{tuple(p.shape)}".replace(" ", "") for i, p in enumerate(params)]
    optimizer = getattr(fusedopt, name)(params, **CLASSES[name], backend=backend)
    ours = Trajectory(optimizer, labels)
    model = getattr(torch.optim, name)(copies, **CLASSES[name], foreach=False)
    expected = Trajectory(model, labels, stored)
    before = ours.values()
    (gradients,) = make_gradients(params, 1)
    for _ in range(steps):
        # Smaller ones of the same sign: every parameter goes on in one direction.
        gradients = [g / 2 for g in gradients]
        held = [Guarded(g, shift=s) for g, s in zip(gradients, gradient_shifts, strict=True)]
        ours.step([guard.view for guard in held])
        expected.step(gradients)
        for label, gradient, guard in zip(labels, gradients, held, strict=True):
            assert_untouched(guard.view, gradient, f"gradient of {label}")
            guard.check(f"gradient of {label}")
    assert_same_ends(ours, expected, before, TRAJECTORY)
    for label, guard, p in zip(labels, guards, params, strict=True):
        guard.check(label)
        # What was updated is the watched memory, not a copy of it.
        assert_untouched(guard.view, p, label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLASSES)
def test_sizes_in_one_launch(name: str, dtype: torch.dtype, device: torch.device) -> None:
    # Catches a lost tail, a mask that is off by one, a chunk updated twice, and a tensor that is
    # handed its neighbour's address, size, or coefficients.
    guards = list(_watched(SHAPES, [0] * len(SHAPES), dtype, device))
    _check_steps(name, "triton", guards, [0] * len(SHAPES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sizes_off_alignment(dtype: torch.dtype, device: torch.device) -> None:
    # The parameter, its gradient, or both start between two 16-byte boundaries.
    shifts = [i % 3 for i in range(len(SHAPES))]
    gradient_shifts = [i % 4 for i in range(len(SHAPES))]
    guards = list(_watched(SHAPES, shifts, dtype, device))
    _check_steps("AdamW", "triton", guards, gradient_shifts)


@pytest.mark.parametrize("name", CLASSES)
def test_sizes_in_the_reference(name: str, device: torch.device) -> None:
    # Every other one large enough to be cut into pieces, with and without a remainder.
    from fusedopt.backends.reference import PIECE_OF_THREAD as PIECE

    shapes = [*SHAPES, (PIECE,), (PIECE + 1,), (2, PIECE + 3)]
    guards = list(_watched(shapes, [0] * len(shapes), torch.float32, device))
    _check_steps(name, "reference", guards, [1] * len(shapes))


def test_many_tiny_beside_one_large(device: torch.device) -> None:
    # Catches a map from programs to chunks that loses count.
    shapes = [(i % 4,) for i in range(40)] + [(5 * BLOCKS[-1] + 7,)] + [(3,)] * 20
    guards = list(_watched(shapes, [0] * len(shapes), torch.float32, device))
    _check_steps("SGD", "triton", guards, [0] * len(shapes), steps=1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_but_empty_tensors(backend: str, device: torch.device) -> None:
    # Torch counts the steps of an empty shard, too.
    p = Parameter(torch.empty(0, 3, device=device))
    optimizer = fusedopt.AdamW([p], backend=backend)
    for count in (1, 2):
        p.grad = torch.empty(0, 3, device=device)
        optimizer.step()
        assert optimizer.state[p]["step"].item() == count


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CLASSES)
def test_equal_runs_are_equal_to_the_bit(name: str, backend: str, device: torch.device) -> None:
    # Catches memory that is read before it was written, and an order that varies.
    starts = [torch.randn(n, device=device) for n in (1, BLOCKS[-1] + 1, 40)]
    gradients = make_gradients(starts, 3)
    ends = []
    for _ in range(2):
        params = [Parameter(x.clone()) for x in starts]
        optimizer = getattr(fusedopt, name)(params, **CLASSES[name], backend=backend)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values()]
        ends.append([*params, *states])
    for i, (a, b) in enumerate(zip(*ends, strict=True)):
        assert_untouched(a, b, f"tensor {i} of the second run")
