"""What an optimizer has gathered so far, as if in batches of another size.

With kappa = new batch size / old, mu and mu' the old and the new momentum:

=================  ====================================================================
state              in the middle of a run
=================  ====================================================================
step               t / kappa, where decays change: t steps were t / kappa of the new
exp_avg, grad_avg  unchanged: averages of gradients, whose mean the batch does not alter
second moments     divided by kappa with "sqrt", else unchanged
momentum_buffer    so that the steps per sample, where gradients stay, do not jump
=================  ====================================================================

Of states in 8 bits it is the scales that are multiplied.

**Step counts** enter bias corrections as beta^t. As beta becomes beta^kappa and t becomes t / kappa
this stays: corrections depend on the samples seen and not on their batches. With the linear form,
1 - kappa (1 - beta), it stays to first order in kappa (1 - beta): a switch within the first
1 / (1 - beta) steps is better made with ``beta_form="power"``. A count may be a fraction.

**Second moments** are ``exp_avg_sq``, ``max_exp_avg_sq`` and ``square_avg``. The square-root rule
holds where they are all noise, sigma^2 / B (Malladi et al., arXiv 2205.10287, whose theorem 4.2
follows u = v / sigma^2): a batch kappa times as large has 1 / kappa of it. A centred RMSprop knows
the square of the mean and divides the variance alone, which also keeps that positive.

**Momentum buffers.** Gradients that stay at d fill them to

* SGD, as torch has it: d / (1 - mu), a sum of gradients: multiplied by (1 - mu) / (1 - mu').
* SGD, velocity: lr d / (1 - mu), which is what the step is: multiplied as lr / (1 - mu) is, by the
  rule's factor of lr.
* SGD, ema: d, an average: unchanged.
* RMSprop: (d / root) / (1 - mu), a sum of ratios, where root = sqrt(s) + eps: as SGD, but with
  "sqrt" the root shrinks by sqrt(kappa) and ratios grow by it, so that the sum of those in the
  buffer is multiplied by sqrt(kappa) (1 - mu) / (1 - mu'). The step lr b grows by kappa then, as
  lr (1 - mu') / (1 - mu) sqrt(kappa) is its learning rate: the step per sample stays. To first
  order in 1 - mu this also keeps what the gradients already seen have yet to move the parameter by,
  lr b mu / (1 - mu), so that noise in the buffer, too, acts as if nothing had been changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import rules
from .groups import Groups
from .holders import has_state_elsewhere

_TORCHS = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
_MOMENTS = ("exp_avg", "grad_avg", "momentum_buffer", *_SECOND_MOMENTS)
_SCALE = "_scale"
# Whose names of states mean what they do here, and whose lr is scaled as theirs.
_RULES = (
    rules.SGD, rules.RMSPROP, rules.ADAM, rules.BATCH_DECOUPLED_ADAM, rules.BATCH_DECOUPLED_RMSPROP,
    *rules.PAIRED.values(),
)  # fmt: skip
# Of ours, those that no rule for the batch size is known for.
_WITHOUT = (rules.ADAM_C, rules.LION, rules.SCHEDULE_FREE_ADAMW)
# What is beside a parameter belongs to its value, which the batch does not alter.
_KNOWN = {"step", "master", "compensation", *_MOMENTS, *(name + _SCALE for name in _MOMENTS)}


@dataclass(frozen=True)
class Batches:
    """A change of the batch size under a rule.

    Attributes:
        kappa: new batch size / old.
        lr_factor: what the rule multiplies lr by, apart from a change of momentum.
        decays: whether the rule changes decays.
        noise: whether second moments are in proportion to 1 / batch size.
    """

    kappa: float
    lr_factor: float
    decays: bool
    noise: bool


def check_states(optimizer: Optimizer, groups: Groups, batches: Batches) -> None:
    """Raise ValueError for a state of which it is not known what to do."""
    if getattr(optimizer, "rule", None) in _WITHOUT and (batches.decays or batches.lr_factor != 1):
        raise ValueError(
            f"no rule for the batch size is known for {type(optimizer).__name__}: set its"
            " hyper-parameters yourself"
        )
    follows = batches.decays or any(g.get("momentum_form") == "velocity" for g in groups)
    if follows and has_state_elsewhere(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in another optimizer, and it is not known"
            " how: rescale before the first step"
        )
    if batches.decays and any(optimizer.state.values()) and not _is_known(optimizer):
        raise ValueError(
            f"it is not known how the state of {type(optimizer).__name__} depends on the batch"
            " size: rescale before the first step"
        )
    for group in groups:
        for state in _states(optimizer, group):
            for name, value in state.items():
                problem = _problem(name, value) if batches.decays else None
                if problem is not None:
                    raise ValueError(
                        f"{type(optimizer).__name__} has a state {name!r} {problem}: rescale"
                        " before the first step"
                    )


def _is_known(optimizer: Any) -> bool:
    """Whether names of states mean what they do here; Muon's momentum_buffer is an average."""
    rule = getattr(optimizer, "rule", None)
    return type(optimizer) in _TORCHS or (rule is not None and rule in _RULES)


def _problem(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name not in _KNOWN:
        return "of which it is not known how it depends on the batch size"
    if name == "step" and isinstance(value, Tensor) and not value.is_floating_point():
        return f"of type {value.dtype}, which cannot count fractions of a step"
    return None


@dataclass(frozen=True)
class _Change:
    """What becomes of one tensor of a state.

    Attributes:
        name: of the state.
        tensor: that is changed.
        apply: changes a tensor as `tensor` is to be, in place.
        widens: whether numbers may become larger.
        elementwise: whether `apply` is for tensors of the shape of `tensor` alone; else it is a
            multiplication, under which the largest number stays that.
    """

    name: str
    tensor: Tensor
    apply: Callable[[Tensor], Any]
    widens: bool
    elementwise: bool = False


def check_overflow(optimizer: Optimizer, groups: Groups, scaled: Groups, batches: Batches) -> None:
    """Raise ValueError where finite numbers would become infinite in the type of a state.

    Each rank looks at what it has. The host waits once for each device.
    """
    verdicts: dict[torch.device, list[tuple[_Change, Tensor]]] = {}
    for change in _changes(optimizer, groups, scaled, batches):
        local = _local(change.tensor)
        if change.widens and local.numel() and not local.is_meta:
            verdicts.setdefault(local.device, []).append((change, _stays_finite(change, local)))
    for found in verdicts.values():
        passed = torch.stack([verdict for _, verdict in found]).tolist()
        for (change, _), fine in zip(found, passed, strict=True):
            if not fine:
                raise ValueError(
                    f"{type(optimizer).__name__} has a state {change.name!r} that would overflow"
                    f" {change.tensor.dtype} for a batch {batches.kappa:g} times as large: take"
                    " steps between, or rescale before the first step"
                )


def _stays_finite(change: _Change, tensor: Tensor) -> Tensor:
    before = tensor.detach()
    if not change.elementwise:
        # Two numbers, in the tensor's own type, and no copy of it. An inf or nan that is there
        # already hides what else may come, and there is nothing left to save.
        before = torch.stack(torch.aminmax(_real(before)))
    after = before.clone()
    change.apply(after)
    return (after.isfinite() | ~before.isfinite()).all()


def _local(tensor: Any) -> Any:
    """Return this rank's part of a DTensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rescale_states(optimizer: Optimizer, groups: Groups, scaled: Groups, batches: Batches) -> None:
    """Rescale the states of all groups in place; the checks have passed.

    Args:
        optimizer: that has the states.
        groups: with the hyper-parameters for the old batch size.
        scaled: for each group, the hyper-parameters for the new one.
        batches: the change.
    """
    for change in _changes(optimizer, groups, scaled, batches):
        change.apply(change.tensor)
    if batches.decays:
        for group in groups:
            for state in _states(optimizer, group):
                if "step" in state and not isinstance(state["step"], Tensor):
                    state["step"] = state["step"] / batches.kappa


def _changes(
    optimizer: Optimizer, groups: Groups, scaled: Groups, batches: Batches
) -> Iterator[_Change]:
    """Yield what becomes of each tensor of the states, once."""
    kappa, counted = batches.kappa, set[int]()
    for group, new in zip(groups, scaled, strict=True):
        factor = _buffer_factor(group, new, batches)
        for state in _states(optimizer, group):
            if batches.noise:
                yield from _reductions(group, state, kappa)
            buffer = _factor_of(state, "momentum_buffer")
            if buffer is not None:
                yield _Change("momentum_buffer", buffer, _multiply(factor), float(factor) > 1)
            step = state.get("step")
            # Parameters may share one count: a checkpoint keeps what was shared when it was made.
            if batches.decays and isinstance(step, Tensor) and id(step) not in counted:
                counted.add(id(step))
                yield _Change("step", step, _divide(kappa), kappa < 1)


def _factor_of(state: dict[str, Any], name: str) -> Any:
    """Return the tensor that a state is in proportion to: itself, or the scale of its codes."""
    return state.get(name + _SCALE, state.get(name))


def _multiply(factor: Any) -> Callable[[Tensor], Any]:
    return lambda tensor: tensor.mul_(factor)


def _divide(kappa: float) -> Callable[[Tensor], Any]:
    return lambda tensor: tensor.div_(kappa)


def _states(optimizer: Optimizer, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the states of a group; that of a parameter which is listed twice, once."""
    for parameter in {id(p): p for p in group["params"]}.values():
        yield optimizer.state.get(parameter, {})


def _buffer_factor(group: dict[str, Any], new: dict[str, Any], batches: Batches) -> Any:
    if not group.get("momentum", 0):
        return 1.0
    form = group.get("momentum_form", "torch")
    if form == "ema":
        return 1.0
    if form == "velocity":
        return batches.lr_factor
    fill = (1.0 - group["momentum"]) / (1.0 - new["momentum"])
    sums_ratios = "alpha" in group
    return fill * math.sqrt(batches.kappa) if sums_ratios and batches.noise else fill


def _reductions(group: dict[str, Any], state: dict[str, Any], kappa: float) -> Iterator[_Change]:
    for name in _SECOND_MOMENTS:
        moment = _factor_of(state, name)
        if moment is None:
            continue
        if name == "square_avg" and group.get("centered"):
            yield _reduction_of_variance(state, kappa)
        else:
            yield _Change(name, moment, _divide(kappa), kappa < 1)


def _reduction_of_variance(state: dict[str, Any], kappa: float) -> _Change:
    def apply(square: Tensor) -> None:
        square, mean = _real(square), _real(state["grad_avg"])
        if not hasattr(square, "to_local"):
            mean = _local(mean)
        signal = mean * mean
        # Rounding may have made the variance negative, which a smaller batch would make worse.
        square.sub_(signal).clamp_(min=0).div_(kappa).add_(signal)

    return _Change("square_avg", state["square_avg"], apply, kappa < 1, elementwise=True)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
