"""Which option of which group is wrong, where a step or a checkpoint has numbers that mean nothing.

A step reads options as they are: looking at each of them first would cost more than their use.
``check_numbers`` looks at them where a plan is made or a checkpoint is loaded, and ``explained``
finds the cause of an error that the arithmetic of a step has raised, before anything has changed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..coefficients import numbers_of, on_host
from ..kernels.rule import Group, Rule
from .checks import check_virtual_batch_size, describe, is_on_device
from .request import with_factors


class MissingOption(KeyError):
    """A parameter group without an option that its optimizer needs."""

    def __str__(self) -> str:
        # A KeyError alone shows its text in quotes.
        return str(self.args[0])


def complete(optimizer: Any, group: dict[str, Any]) -> None:
    """Give a group of torch's, put into ``param_groups`` as it is, the options of ours."""
    for name in (*optimizer.choices, *optimizer.extra_options):
        if name not in group and name in optimizer.defaults:
            group[name] = optimizer.defaults[name]


def check_numbers(optimizer: Any, groups: Iterable[Group], whose: str = "") -> None:
    """Raise for a hyper-parameter that is missing or no number, whatever its value.

    Args:
        optimizer: whose rule says which there are.
        groups: in order.
        whose: for messages, where these are not the optimizer's own groups.

    Raises:
        MissingOption: naming option and group.
        TypeError: for what is no number.
        ValueError: for more or fewer numbers than one, or than ``betas`` has.
    """
    for index, group in enumerate(groups):
        for name in numbers_of(optimizer.rule, group):
            place = f"param_groups[{index}]{{}}{whose}"
            problem = _problem(place, group, name, optimizer)
            if problem is not None:
                raise problem
        check_virtual_batch_size(group.get("virtual_batch_size"))


def _problem(place: str, group: Group, name: str, optimizer: Any) -> Exception | None:
    if name not in group:
        kind = type(optimizer).__name__
        return MissingOption(f"{place.format('')} has no {name!r}, which {kind} reads")
    place = place.format(f"[{name!r}]")
    value, example = group[name], _example(optimizer, name)
    count = len(example) if isinstance(example, (tuple, list)) else 1
    entries = _entries(value) if count > 1 else [value]
    if entries is not None and len(entries) == count:
        wrong = next((x for x in entries if not _is_number(x)), ...)
        if wrong is ...:
            return None
        if not isinstance(wrong, Tensor):
            what = "a number" if count == 1 else f"{count} numbers"
            return TypeError(f"{place} must be {what}, got {value!r}")
    if isinstance(value, Tensor):
        got = f"a tensor of shape {tuple(value.shape)}, type {value.dtype} on {value.device}"
    else:
        got = repr(value)
    what = "one number" if count == 1 else f"{count} numbers"
    return ValueError(f"{place} must be {what}, got {got}")


def _example(optimizer: Any, name: str) -> Any:
    """Return a value with which the rule works."""
    # A rule of a user's own need not have examples.
    for group in (*optimizer.rule.example_groups, optimizer.defaults):
        if name in group:
            return group[name]
    return 1.0


def _entries(value: Any) -> list[Any] | None:
    if isinstance(value, Tensor):
        return list(value.unbind()) if value.dim() == 1 else None
    return list(value) if isinstance(value, (tuple, list)) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.device.type != "meta"
    try:
        return not isinstance(value, (str, bytes, bytearray)) and float(value) is not None
    except OverflowError:
        return True
    except (TypeError, ValueError):
        return False


def explained(optimizer: Any, error: Exception, samples: int) -> Exception | None:
    """Return an error that names group and option, or parameter, for one of a step's arithmetic.

    Args:
        optimizer: that has stepped.
        error: what was raised.
        samples: how many the step was of, or the one before it.

    Returns:
        None where groups and step counts are not the cause.
    """
    for problem in _of_params(optimizer):
        return problem
    try:
        check_numbers(optimizer, optimizer.param_groups)
    except (KeyError, TypeError, ValueError) as found:
        return found
    if type(error) is KeyError and error.args[0] in optimizer.defaults:
        for index, group in enumerate(optimizer.param_groups):
            if error.args[0] not in group:
                return MissingOption(f"param_groups[{index}] has no {error.args[0]!r}")
    if isinstance(error, (ArithmeticError, TypeError, ValueError)):
        # What cannot be tried out, as with a step count that is no number, has an error already.
        with suppress(Exception):
            return next(_of_coefficients(optimizer, samples), None)
    return None


def _of_params(optimizer: Any) -> Iterator[Exception]:
    for index, group in enumerate(optimizer.param_groups):
        place = f"param_groups[{index}]"
        if "params" not in group:
            yield MissingOption(f"{place} has no 'params'")
        elif not isinstance(group["params"], Iterable):
            yield TypeError(f"{place}['params'] must be a list, got {group['params']!r}")
        else:
            for position, p in enumerate(group["params"]):
                if not isinstance(p, Tensor):
                    yield TypeError(f"{place}['params'][{position}] is no tensor, but {p!r}")


def _of_coefficients(optimizer: Any, samples: int) -> Iterator[Exception]:
    """Yield what is wrong with numbers that are numbers: found by putting others in their place."""
    rule = optimizer.rule
    for index, group in enumerate(
        with_factors(optimizer.param_groups, optimizer.statistics, samples)
    ):
        # The host does not read what lives on the device.
        if is_on_device(rule, group, optimizer.decided_on_device):
            continue
        numbers = on_host(group, rule.hyper)
        for p in group["params"]:
            step = _next_step(optimizer.state.get(p, {}), rule)
            error = _failure(rule, numbers, step)
            if error is None:
                continue
            if step < 1 and _failure(rule, numbers, 1.0) is None:
                yield ValueError(
                    f"{describe(optimizer, p)}: its state 'step' is {step - 1:g}, and counts begin"
                    f" at 0 ({error})"
                )
            others = {name: _example(optimizer, name) for name in rule.hyper}
            if _failure(rule, {**numbers, **others}, step) is not None:
                # Whatever the numbers: the rule has something else to say.
                continue
            cures = [
                name
                for name in rule.hyper
                if _failure(rule, {**numbers, name: others[name]}, step) is None
            ]
            named = ", ".join(f"{name}={reprlib.repr(group[name])}" for name in cures or rule.hyper)
            yield ValueError(
                f"param_groups[{index}]: there is no step {step:g} with {named} ({error})"
            )


def _next_step(state: Mapping[str, Any], rule: Rule) -> float:
    if not rule.counts_steps:
        return 2.0 if state else 1.0
    return float(state.get("step", 0.0)) + 1.0


def _failure(rule: Rule, numbers: Group, step: float) -> Exception | None:
    try:
        for value in rule.coefficients(numbers, step):
            float(value)
    except (ArithmeticError, TypeError, ValueError) as error:
        return error
    return None
