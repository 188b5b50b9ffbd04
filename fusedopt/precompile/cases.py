"""Steps of every kind that an optimizer can take, on small tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..accumulation import GradientAccumulator
from ..clipping import GlobalNorm
from ..formats import check_options, check_parameters, format_of
from ..guard import SpikeGuard
from ..kernels.aot import DTYPES
from ..kernels.aot.option_sets import option_sets
from ..kernels.aot.update import LAYOUTS
from ..kernels.rule import Group, Rule
from ..kernels.rules import REGISTRY
from ..kernels.weight_average import OPTIONS as AVERAGE
from ..memory.layout import ALIGNMENT
from ..optimizer import FusedOptimizer
from ..optimizers import SGD
from ..statistics import GradSampleSquares, Statistics
from ..testing import HeldSquares, statistics_for

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

# Parameter, gradient, and whether addresses are aligned: what codegen looks at, and besides every
# type with addresses that are not. States have the parameter's type.
STEP_LAYOUTS = tuple(
    dict.fromkeys(
        [(param, gradient, aligned) for param, gradient, _, aligned in LAYOUTS]
        + [(dtype, dtype, False) for dtype in DTYPES]
        # What gradients of micro-batches are added up in.
        + [("fp16", "fp32", True)]
    )
)

# Parameter, gradient of a micro-batch, and whether addresses are aligned.
SUM_LAYOUTS = (
    ("bf16", "bf16", True), ("fp16", "fp16", True), ("bf16", "fp32", True),
    ("bf16", "bf16", False), ("fp16", "fp16", False),
)  # fmt: skip

# Parameter and per-sample gradients: besides, what autocast makes of them.
SAMPLE_LAYOUTS = tuple(
    dict.fromkeys(
        [*STEP_LAYOUTS]
        + [("fp32", samples, aligned) for samples in ("bf16", "fp16") for aligned in (True, False)]
    )
)

CLIPS: tuple[float | None, ...] = (None, 2.0, math.inf)

NUMEL = 4 * ALIGNMENT
# Rows that end within a group, of which codes are walked row by row.
COLUMNS = 9 * ALIGNMENT

# Options of precision and telemetry as optimizers take them, and of the average of the weights as
# groups do.
Precision = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Something to run under a fake driver of a GPU.

    Attributes:
        name: unique; by it cases travel between processes.
        rule: name of the rule, or None for what belongs to no rule.
        types: element types of the tensors, in Triton's spelling.
        run: does it. What it computes is of no meaning.
    """

    name: str
    rule: str | None
    types: frozenset[str]
    run: Callable[[], None]

    def is_chosen(self, rules: Collection[str], types: Collection[str]) -> bool:
        """Whether filters let the case pass; an empty one lets everything pass."""
        in_rules = not rules or self.rule is None or self.rule in rules
        return in_rules and (not types or self.types <= set(types))


def all_cases(precision: Precision = MappingProxyType({})) -> Iterator[Case]:
    """Every kind of step of every registered rule.

    Args:
        precision: options; left out is what they do not go with.
    """
    for rule in REGISTRY.values():
        for number, group in enumerate(option_sets(rule)):
            if problem(rule, {**group, **precision}) is not None:
                continue
            for layout in STEP_LAYOUTS:
                yield from _case("step", rule, number, group, precision, layout, take_steps)
            # What GradSampleSquares makes is a gradient and its squares.
            if rule.degrees == (1, 2):
                run = take_steps_from_samples
                for layout in SAMPLE_LAYOUTS:
                    yield from _case("samples", rule, number, group, precision, layout, run)
                step = take_steps_with_held_squares
                for layout in STEP_LAYOUTS:
                    yield from _case("held", rule, number, group, precision, layout, step)
        for number, group in enumerate(live_groups(rule)):
            if problem(rule, {**group, **precision}) is None:
                for param in DTYPES:
                    layout = param, param, True
                    yield from _case("live", rule, number, group, precision, layout, take_steps)
    for norm_type in (2.0, math.inf):
        run = partial(take_guarded_step, norm_type)
        yield Case(f"guard {norm_type}", None, frozenset(("fp32",)), run)
    for param, gradient, aligned in SUM_LAYOUTS:
        name = f"micro-batches {param} {gradient}{'' if aligned else ' unaligned'}"
        run = partial(accumulate, param, gradient, aligned)
        yield Case(name, None, frozenset((param, gradient)), run)


def live_groups(rule: Rule) -> Iterator[Group]:
    """Yield groups whose coefficients are formed on the device, by every formula of a rule."""
    for group in rule.example_groups:
        decays = (False, True) if "decoupled_weight_decay" in group else (None,)
        for decoupled in decays:
            more = {} if decoupled is None else {"decoupled_weight_decay": decoupled}
            yield {**group, **more, "capturable": True}


def problem(rule: Rule, group: Group) -> str | None:
    """Say why options of precision are no good for a rule; None where they are."""
    try:
        check_options(rule, group)
    except ValueError as error:
        return str(error)
    return None


def _case(
    kind: str,
    rule: Rule,
    number: int,
    group: Group,
    precision: Precision,
    layout: tuple[str, str, bool],
    run: Callable[[Rule, Group, Precision, str, str, bool], None],
) -> Iterator[Case]:
    param, gradient, aligned = layout
    try:
        check_parameters({**group, **precision, "params": [_parameter(param, 1, aligned)]})
    except ValueError:
        return
    types = param if param == gradient else f"{param}/{gradient} gradient"
    name = f"{rule.label(rule.options(group))} {kind} {number} {types}"
    name += "".join(f" {key}={value}" for key, value in precision.items())
    name += "" if aligned else " unaligned"
    types_of = frozenset((param, gradient))
    yield Case(name, rule.name, types_of, lambda: run(rule, group, precision, *layout))


def take_steps(
    rule: Rule, group: Group, precision: Precision, param: str, gradient: str, aligned: bool
) -> None:
    """Take a step without clipping and with either norm."""
    for norm in CLIPS:
        for p in _parameters(rule, {**group, **precision}, param, NUMEL, aligned):
            p.grad_dtype = None
            p.grad = torch.zeros_like(p, dtype=TORCH_DTYPES[gradient])
            _step(rule, group, precision, p, norm, statistics_for(rule))


def take_steps_with_held_squares(
    rule: Rule, group: Group, precision: Precision, param: str, gradient: str, aligned: bool
) -> None:
    """Take a step whose squares are an earlier one's."""
    for p in _parameters(rule, {**group, **precision}, param, NUMEL, aligned):
        p.grad_dtype = None
        p.grad = torch.zeros_like(p, dtype=TORCH_DTYPES[gradient])
        _step(rule, group, precision, p, None, HeldSquares(rule))


def take_guarded_step(norm_type: float) -> None:
    """Take a step that a guard decides about: it is asked after the norms of any rule."""
    p = _parameter("fp32", NUMEL, True)
    p.grad = torch.ones_like(p)
    clip = GlobalNorm(1.0, norm_type=norm_type)
    SGD([p], lr=0.1, backend="triton", clip=clip, guard=SpikeGuard()).step()


def take_steps_from_samples(
    rule: Rule, group: Group, precision: Precision, param: str, samples: str, aligned: bool
) -> None:
    """Take steps on per-sample gradients that lie in memory; clipping takes another way."""
    for norm in CLIPS:
        # Samples lie one behind the other: their size decides, too.
        numel = NUMEL if aligned else NUMEL + 1
        for p in _parameters(rule, {**group, **precision}, param, numel, aligned):
            p.grad_sample = torch.zeros(3, *p.shape, dtype=TORCH_DTYPES[samples])
            _step(rule, group, precision, p, norm, GradSampleSquares())


def _parameters(rule: Rule, group: Group, dtype: str, numel: int, aligned: bool) -> Iterator[Any]:
    yield _parameter(dtype, numel, aligned)
    if format_of(rule, group).codecs:
        columns = COLUMNS + numel - NUMEL
        p = _parameter(dtype, 3 * columns, aligned)
        yield torch.nn.Parameter(p.detach().view(3, columns))


def accumulate(param: str, gradient: str, aligned: bool) -> None:
    """Add the gradient of a micro-batch to the sums."""
    p = _parameter(param, NUMEL, True)
    accumulator = GradientAccumulator([p], backend="triton")
    with accumulator.micro_batch():
        p.grad = _parameter(gradient, NUMEL, aligned).detach()


def _parameter(dtype: str, numel: int, aligned: bool) -> Any:
    memory = torch.zeros(numel + 1, dtype=TORCH_DTYPES[dtype], device="cpu")
    return torch.nn.Parameter(memory[:-1] if aligned else memory[1:])


def _step(
    rule: Rule,
    group: Group,
    precision: Precision,
    p: Tensor,
    norm: float | None,
    statistics: Statistics | None,
) -> None:
    kind = type(rule.name, (FusedOptimizer,), {"rule": rule})
    clip = None if norm is None else GlobalNorm(1.0, norm_type=norm)
    defaults = {**group, **{name: x for name, x in precision.items() if name in AVERAGE}}
    more = {name: x for name, x in precision.items() if name not in AVERAGE}
    # Each optimizer has its own.
    telemetry = copy.copy(more.get("telemetry"))
    more |= {"clip": clip, "statistics": statistics, "telemetry": telemetry}
    optimizer = kind([p], defaults, backend="triton", **more)
    optimizer.step()
    if telemetry is not None:
        # Chunks are as large at steps that are not measured.
        optimizer.step()
        assert telemetry.norms is not None
