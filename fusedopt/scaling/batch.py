"""How lr, decays and eps follow a change of the batch size; the package states the rules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.rules.sgd import MOMENTUM_FORMS
from .checks import check_optimizer, decay, not_negative, number, positive
from .groups import check_tensors, hand_down, write
from .holders import state_holder
from .states import Batches, check_overflow, check_states, rescale_states

RULES = ("decoupled", "sqrt", "linear", "constant")
_BETA_FORMS: dict[str, Callable[[Any, float], Any]] = {
    "linear": lambda beta, kappa: 1.0 - kappa * (1.0 - beta),
    "power": lambda beta, kappa: beta**kappa,
}
# The rules that keep the memory of averages constant in samples, and the form of their own.
_OWN_FORM = {"decoupled": "power", "sqrt": "linear"}


def rescale(
    hyper_parameters: Mapping[str, Any],
    from_batch: float,
    to_batch: float,
    rule: str,
    *,
    beta_form: str | None = None,
) -> dict[str, Any]:
    """Return hyper-parameters for `to_batch` where these were tuned at `from_batch`.

    ``betas`` and ``alpha`` are decays of averages. ``momentum`` is the decay of a *sum*: besides
    becoming shorter, as an average's, it changes what one gradient adds up to, lr / (1 - momentum).
    Where momentum changes, lr therefore also is multiplied by (1 - new momentum) / (1 - momentum).
    Not so with a ``momentum_form`` of ``"ema"``, whose momentum is the decay of an average.

    Args:
        hyper_parameters: any of ``lr``, ``initial_lr``, ``betas``, ``alpha``, ``momentum``, ``eps``
            and ``weight_decay``, with the meaning that they have in torch.optim, and
            ``momentum_form``, as numbers or tensors. It is not changed; other entries are handed on
            as they are.
        from_batch: samples a step that the hyper-parameters are for.
        to_batch: samples a step wanted, in the same unit.
        rule: ``"decoupled"``, ``"sqrt"``, ``"linear"`` or ``"constant"``: see the package.
        beta_form: how decays change, in place of the rule's own form: ``"linear"``,
            1 - kappa (1 - beta), needs kappa <= 1 / (1 - beta); ``"power"``, beta ** kappa, has
            no limit, and makes bias corrections a function of the samples seen alone.

    Returns:
        A new dictionary with the same keys. ``weight_decay`` changes with "sqrt" alone, and where
        ``decoupled_weight_decay`` is there and true.

    Raises:
        ValueError: for batch sizes that are not positive, an unknown rule or form, a decay that
            is or would become less than 0, or 1 or more, or the square-root rule for a denominator
            that it does not hold for: a variance, or the root of a virtual batch's second moment.
            Also for numbers that lr, eps or weight_decay cannot be, or would become: less than 0,
            not finite, or 0 for what was not.
        TypeError: for what is no number, and would be changed.
    """
    kappa = _ratio(from_batch, to_batch)
    change = _decay_change(rule, beta_form, kappa)
    _check_fits(rule, hyper_parameters)
    scaled = dict(hyper_parameters)
    factor = _lr_factor(rule, kappa)
    if change is not None:
        if "betas" in scaled:
            betas = enumerate(_sequence("betas", scaled["betas"]))
            scaled["betas"] = tuple(change(f"betas[{i}]", beta) for i, beta in betas)
        if "alpha" in scaled:
            scaled["alpha"] = change("alpha", scaled["alpha"])
        # 0 is no momentum at all, and stays that.
        if scaled.get("momentum", 0) != 0:
            old, scaled["momentum"] = scaled["momentum"], change("momentum", scaled["momentum"])
            if scaled.get("momentum_form") != "ema":
                factor = factor * (1.0 - scaled["momentum"]) / (1.0 - old)
    for name in ("lr", "initial_lr"):
        if name in scaled:
            scaled[name] = _changed(name, scaled[name], lambda lr: _times(lr, factor), kappa)
    if rule == "sqrt":
        root = math.sqrt(kappa)
        if "eps" in scaled:
            scaled["eps"] = _changed("eps", scaled["eps"], lambda eps: eps / root, kappa)
        if scaled.get("decoupled_weight_decay") and "weight_decay" in scaled:
            old = scaled["weight_decay"]
            scaled["weight_decay"] = _changed("weight_decay", old, lambda x: x * root, kappa)
    return scaled


@torch.no_grad()
def rescale_(
    optimizer: Optimizer,
    from_batch: float,
    to_batch: float,
    rule: str,
    *,
    beta_form: str | None = None,
) -> None:
    """Apply ``rescale`` to every parameter group, and take the state along.

    Call it between two steps, before the first or in the middle of a run: step counts, second
    moments and momentum buffers become what they would be after as many samples in batches of the
    new size (``fusedopt.scaling.states`` says how). Tensors are written in place. With "sqrt" the
    bound of ``clip=GlobalNorm(...)`` is divided by sqrt(kappa), as norms are where noise dominates.
    A ``guard=SpikeGuard(...)`` forgets the norms, which were those of the other batch size.

    A scheduler of torch's holds on to the lr that it found: make it after the last call, or use
    ``samples_schedule``, which reads the ``initial_lr`` that is rescaled here with lr. For a
    captured CUDA graph, call ``optimizer.push_hyperparameters()`` afterwards.

    A group that is added afterwards starts from the optimizer's defaults. These stay as they were,
    as no checkpoint carries them: give the group the hyper-parameters that ``rescale`` returns.

    Args:
        optimizer: SGD, RMSprop, Adam or AdamW of torch.optim or of fusedopt, or, before its first
            step, another whose lr, betas, alpha and momentum are what they are in these. A
            ``ZeroRedundancyOptimizer`` around one is passed as it is, on every rank: each has the
            state of a part of the parameters.
        from_batch: samples a step that the hyper-parameters are for.
        to_batch: samples a step wanted.
        rule: as for ``rescale``.
        beta_form: as for ``rescale``.

    Raises:
        ValueError: as ``rescale``, where groups share one lr tensor and need it to differ, for a
            state of which it is not known what to do, or which would overflow in its type. Nothing
            has changed then.
        TypeError: as ``rescale``, or for what is no optimizer of torch's, as SVAG.
    """
    check_optimizer(optimizer)
    groups = optimizer.param_groups
    # All of them first: an error must not leave half of the groups scaled, nor a tensor that groups
    # share, as they do when it was the constructor's lr, be scaled once for each.
    scaled = [rescale(g, from_batch, to_batch, rule, beta_form=beta_form) for g in groups]
    check_tensors(groups, scaled)
    kappa = _ratio(from_batch, to_batch)
    batches = Batches(kappa, _lr_factor(rule, kappa), rule in _OWN_FORM, rule == "sqrt")
    holder = state_holder(optimizer)
    check_states(holder, groups, batches)
    clip = getattr(holder, "clip", None) if rule == "sqrt" else None
    bound = None if clip is None else _bound(clip.max_norm, kappa)
    check_overflow(holder, groups, scaled, batches)
    if rule == "decoupled":
        _warn_of_dependence(holder)
    rescale_states(holder, groups, scaled, batches)
    if clip is not None:
        clip.max_norm = bound
    guard = getattr(holder, "guard", None)
    if guard is not None and kappa != 1:
        guard.restart()
    write(groups, scaled)
    hand_down(groups, holder.param_groups)


def _bound(max_norm: float, kappa: float) -> float:
    """Return the bound of the norm for the new batch size.

    The norm of noise falls with the batch, as eps has to beside the root of its square.
    """
    new = max_norm / math.sqrt(kappa)
    if not 0 < new < math.inf and math.isfinite(max_norm):
        raise ValueError(
            f"clip.max_norm = {max_norm} would become {new} for a batch {kappa:g} times as large"
        )
    return new


def _warn_of_dependence(optimizer: Optimizer) -> None:
    """Warn where the second moment is that of the batch, so that "decoupled" does not hold."""
    for group in optimizer.param_groups:
        if ("betas" in group or "alpha" in group) and group.get("virtual_batch_size") is None:
            warnings.warn(
                f'rule="decoupled" is for a second moment that does not depend on the batch, and'
                f" that of {type(optimizer).__name__} does: take fusedopt.BatchDecoupledAdam, or"
                ' rule="sqrt" where noise dominates',
                UserWarning,
                stacklevel=4,
            )
            return


def _ratio(from_batch: float, to_batch: float) -> float:
    old, new = positive("from_batch", from_batch), positive("to_batch", to_batch)
    kappa = new / old
    if not 0 < kappa < math.inf:
        raise ValueError(f"from_batch = {old} and to_batch = {new} are too far apart")
    return kappa


def _lr_factor(rule: str, kappa: float) -> float:
    """Return what lr is multiplied by, apart from a change of momentum."""
    return {"decoupled": kappa, "sqrt": math.sqrt(kappa), "linear": kappa, "constant": 1.0}[rule]


def _decay_change(rule: str, form: str | None, kappa: float) -> Callable[[str, Any], Any] | None:
    """Return what maps (name, decay) to the new decay, or None for a rule that keeps decays."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if form is not None and form not in _BETA_FORMS:
        raise ValueError(f"beta_form must be one of {', '.join(_BETA_FORMS)}, got {form!r}")
    if rule not in _OWN_FORM:
        if form is not None:
            raise ValueError(f'beta_form={form!r} means nothing for rule="{rule}": it keeps decays')
        return None
    form = form or _OWN_FORM[rule]

    def change(name: str, old: Any) -> Any:
        decay(name, old)
        new = _BETA_FORMS[form](old, kappa)
        if not 0.0 <= new < 1.0:
            remedy = ': beta_form="power", beta**kappa, always is' if form == "linear" else ""
            raise ValueError(
                f"{name} = {old} would become {new} for a batch {kappa:g} times as large, which"
                f" is not in [0, 1){remedy}"
            )
        return new

    return change


def _sequence(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of decays, got {values!r}") from None


def _times(lr: Any, factor: Any) -> Any:
    # The momentum may be a tensor where lr is not, and must not make it one.
    number_by_tensor = isinstance(factor, Tensor) and not isinstance(lr, Tensor)
    return lr * (float(factor) if number_by_tensor else factor)


def _changed(name: str, old: Any, change: Callable[[Any], Any], kappa: float) -> Any:
    """Return ``change(old)``; raise where one of them is no value of a hyper-parameter."""
    before = not_negative(name, old)
    new = change(old)
    after = number(name, new)
    if not math.isfinite(after) or (after == 0 and before != 0):
        raise ValueError(
            f"{name} = {before} would become {after} for a batch {kappa:g} times as large, beyond"
            " what its type can hold"
        )
    return new


def _check_fits(rule: str, hyper_parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for options that are unknown, or that the rule does not hold for."""
    form = hyper_parameters.get("momentum_form", "torch")
    if form not in MOMENTUM_FORMS:
        names = ", ".join(MOMENTUM_FORMS)
        raise ValueError(f"momentum_form must be one of {names}, got {form!r}")
    if rule != "sqrt":
        return
    if hyper_parameters.get("denominator", "std") == "variance":
        raise ValueError(
            'rule="sqrt" is for a denominator that is a standard deviation: with'
            ' denominator="variance" and noise that dominates, the steps grow with the batch by'
            " themselves"
        )
    if hyper_parameters.get("virtual_batch_size") is not None:
        raise ValueError(
            'rule="sqrt" is for a second moment that falls as the batch grows, and that of a'
            ' virtual batch does not: use rule="decoupled"'
        )
