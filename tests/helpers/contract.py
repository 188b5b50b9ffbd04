"""What the contract tests share: our optimizer and torch's side by side on equal parameters.

torch's for-loop implementation (``foreach=False``) is the oracle: its fused and foreach paths
differ from it in documented and in undocumented ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from marks import BACKENDS as BACKENDS
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt

DEVICE = torch.device(os.environ.get("FUSEDOPT_TEST_DEVICE", "cpu"))

# Small, since the interpreter takes milliseconds a chunk: a matrix, a scalar, an empty one, an
# odd size. Tensors of many chunks are the business of the kernels' own tests.
SHAPES = ((3, 5), (), (0, 4), (9,))

# Rounding of float32, over ten or so steps of a rule; every trajectory moves far beyond it.
RTOL, ATOL = 3e-5, 3e-6


@dataclass(frozen=True)
class Case:
    """A class of ours, torch's class of the same name, and arguments for both."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)


def _case(name: str, variant: str = "", **options: Any) -> Case:
    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)
    return Case(f"{name}-{variant}" if variant else name, ours, theirs, options)


# Options that torch lacks, at the value that makes them torch's.
OWN: dict[str, dict[str, Any]] = {
    "SGD": {"momentum_form": "torch", "cautious_weight_decay": False},
    "RMSprop": {"bias_correction": False, "denominator": "std"},
    "Adam": {"bias_correction": "adam", "cautious_weight_decay": False},
    "AdamW": {"bias_correction": "adam", "cautious_weight_decay": False},
}

# Arguments at which every term of the update shows: steps are large, averages short.
PLAIN = (
    _case("SGD", lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    _case("RMSprop", lr=0.03, alpha=0.7, weight_decay=0.1),
    _case("Adam", lr=0.1, betas=(0.6, 0.8), weight_decay=0.1),
    _case("AdamW", lr=0.1, betas=(0.6, 0.8), weight_decay=0.3),
)
VARIANTS = (
    _case("SGD", "stateless", lr=0.1),
    _case("SGD", "nesterov", lr=0.1, momentum=0.8, nesterov=True, maximize=True),
    _case("RMSprop", "all", lr=0.03, alpha=0.7, momentum=0.6, centered=True, maximize=True),
    _case("Adam", "amsgrad", lr=0.1, betas=(0.3, 0.5), amsgrad=True, maximize=True),
    _case("AdamW", "amsgrad", lr=0.1, betas=(0.3, 0.5), weight_decay=0.3, amsgrad=True),
)
CASES = PLAIN + VARIANTS


# The cases that also run on Triton where a test's subject is the host's part: they hold all
# states, options and step rules between them, and the interpreter is slow.
ON_TRITON = {"SGD", "AdamW", "RMSprop-all", "Adam-amsgrad"}


def ids(case: Case) -> str:
    return case.name


def on_backends(cases: Sequence[Case]) -> Any:
    """Parametrize ``case`` and ``backend``: the reference for all, Triton for some."""
    rows = [(case, "reference") for case in cases]
    rows += [(case, "triton") for case in cases if case.name in ON_TRITON]
    names = [f"{case.name}-{backend}" for case, backend in rows]
    return pytest.mark.parametrize(("case", "backend"), rows, ids=names)


SGD, RMSPROP, ADAM, ADAMW = PLAIN
each_case = pytest.mark.parametrize("case", CASES, ids=ids)
each_class = pytest.mark.parametrize("case", PLAIN, ids=ids)
each_case_on_backends = on_backends(CASES)
each_class_on_backends = on_backends(PLAIN)


def new_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[Parameter]:
    """Parameters of fixed values on the device under test."""
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(_normal(s, dtype, generator).to(DEVICE)) for s in shapes]


def _normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    # Drawn in double, so that the values are the same for every type.
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype)


def gradient_like(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return _normal(p.shape, p.dtype, generator).to(p.device)


def set_gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give every parameter a gradient that depends on the seed and on its place."""
    for place, p in enumerate(params):
        p.grad = gradient_like(p, 1000 * seed + place) * scale


def groups_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: Optimizer) -> list[Any]:
    """Everything a step could change, copied."""
    params = groups_of(optimizer)
    states = []
    for p in params:
        state = optimizer.state[p] if p in optimizer.state else {}
        states.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in params]
    return [[p.detach().clone() for p in params], states, groups, gradients]


def assert_same_bits(ours: Any, theirs: Any, at: str = "") -> None:
    """Equal to the last bit, a nan being equal to a nan, through lists and dictionaries."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        msg = (lambda m: f"{at}: {m}") if at else None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=msg)
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs), at
        for key, value in ours.items():
            assert_same_bits(value, theirs[key], f"{at}[{key!r}]")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), at
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(a, b, f"{at}[{place}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), at


def assert_unchanged(optimizer: Optimizer, before: list[Any]) -> None:
    assert_same_bits(snapshot(optimizer), before)


def assert_same_state(
    ours: Optimizer, theirs: Optimizer, rtol: float = RTOL, atol: float = ATOL
) -> None:
    """Parameters and states of both agree, under the same keys and in the same types."""
    mine, others = groups_of(ours), groups_of(theirs)
    for place, (p, q) in enumerate(zip(mine, others, strict=True)):
        label = f"parameter {place} of shape {tuple(p.shape)}"
        close = {"rtol": rtol, "atol": atol, "msg": lambda m, at=label: f"{at}: {m}"}
        torch.testing.assert_close(p.detach(), q.detach(), **close)
        state = ours.state[p] if p in ours.state else {}
        expected = theirs.state[q] if q in theirs.state else {}
        present = {k: v for k, v in expected.items() if v is not None}
        assert set(state) == set(present), label
        for key, value in present.items():
            where = {**close, "msg": lambda m, at=f"{label}, {key}": f"{at}: {m}"}
            torch.testing.assert_close(state[key], value, check_device=key != "step", **where)


class Pair:
    """The same parameters under our optimizer (``ours``) and under torch's (``theirs``).

    Args:
        case: which classes, with what arguments.
        groups: options of each parameter group; every group holds parameters of ``shapes``.
        ours_only: arguments for our class alone.
        options: arguments for both that replace the case's.
    """

    def __init__(
        self,
        case: Case,
        *,
        groups: Sequence[dict[str, Any]] = ({},),
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        backend: str = "reference",
        ours_only: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        arguments = {**case.options, **options}
        self.params = [new_params(shapes, dtype, seed) for seed in range(len(groups))]
        self.copies = [new_params(shapes, dtype, seed) for seed in range(len(groups))]
        mine = [{"params": p, **g} for p, g in zip(self.params, groups, strict=True)]
        other = [{"params": p, **g} for p, g in zip(self.copies, groups, strict=True)]
        self.ours = case.ours(mine, **arguments, backend=backend, **(ours_only or {}))
        self.theirs = case.theirs(other, **arguments, foreach=False)
        self.start = [p.detach().clone() for p in self.flat(self.params)]
        self.seed = 0

    @staticmethod
    def flat(groups: Sequence[Sequence[Parameter]]) -> list[Parameter]:
        return [p for group in groups for p in group]

    @property
    def both(self) -> tuple[Optimizer, Optimizer]:
        return self.ours, self.theirs

    def backward(self, scale: float = 1.0) -> None:
        """Set equal gradients on both sides, new ones at each call."""
        self.seed += 1
        for optimizer in self.both:
            set_gradients(groups_of(optimizer), self.seed, scale)

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.backward()
            self.ours.step()
            self.theirs.step()

    def each(self, change: Callable[[Optimizer], Any]) -> None:
        """Do the same to both optimizers."""
        for optimizer in self.both:
            change(optimizer)

    def check(self, rtol: float = RTOL, atol: float = ATOL) -> None:
        """Both agree, and have moved so far that standing still would have failed."""
        assert_same_state(self.ours, self.theirs, rtol, atol)
        for p, start in zip(self.flat(self.params), self.start, strict=True):
            if p.numel() > 0 and p.shape == start.shape and p.dtype == start.dtype:
                bound = atol + rtol * start.abs().max().item()
                moved = (p.detach() - start).abs().max().item()
                assert not moved < 5 * bound, f"moved by {moved} only, with a bound of {bound}"


class FlagOnDevice(Tensor):
    """An overflow flag that says it lives on an accelerator: the host must not wait for it."""

    @property
    def device(self) -> torch.device:
        return torch.device("xpu")
