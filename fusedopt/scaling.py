"""Hyper-parameters for another batch size: how lr, decays and eps follow a change of the batch.

A rule keeps the trajectory, as a function of the samples seen, as it was at the batch size that the
hyper-parameters were tuned at. With kappa = to_batch / from_batch, and as many epochs as before:

============  ==============  ====================  ===============  ============
rule          lr              decay of an average   eps              weight decay
============  ==============  ====================  ===============  ============
"decoupled"   lr kappa        beta ** kappa         unchanged        unchanged
"sqrt"        lr sqrt(kappa)  1 - kappa (1 - beta)  eps/sqrt(kappa)  unchanged
"linear"      lr kappa        unchanged             unchanged        unchanged
"constant"    unchanged       unchanged             unchanged        unchanged
============  ==============  ====================  ===============  ============

"decoupled" is for optimizers whose second moment does not depend on the batch, as that of
``BatchDecoupledAdam``, and for plain SGD (Wang and Aitchison, arXiv 2402.18824, with ``beta **
kappa`` for their 1 - kappa (1 - beta), to which it is equal to first order). "sqrt" is for Adam and
RMSprop where gradient noise dominates (Malladi et al., arXiv 2205.10287). It leaves the weight
decay alone, as there: decay that is decoupled as AdamW's shrinks weights by lr * weight_decay a
step, and so, over an epoch, less by sqrt(kappa).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

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

    Args:
        hyper_parameters: any of ``lr``, ``betas``, ``alpha``, ``momentum``, ``eps`` and
            ``weight_decay``, with the meaning that they have in torch.optim, as numbers or
            tensors. It is not changed; other entries are handed on as they are.
        from_batch: samples a step that the hyper-parameters are for.
        to_batch: samples a step wanted, in the same unit.
        rule: ``"decoupled"``, ``"sqrt"``, ``"linear"`` or ``"constant"``: see the module.
        beta_form: how decays change, in place of the rule's own form: ``"linear"``,
            1 - kappa (1 - beta), needs kappa <= 1 / (1 - beta); ``"power"``, beta ** kappa, has
            no limit, and makes bias corrections a function of the samples seen alone.

    Returns:
        A new dictionary with the same keys.

    Raises:
        ValueError: for batch sizes that are not positive, an unknown rule or form, or a decay
            that is or would become less than 0, or 1 or more.
    """
    kappa = _ratio(from_batch, to_batch)
    change = _decay_change(rule, beta_form, kappa)
    scaled = dict(hyper_parameters)
    factor = {"decoupled": kappa, "sqrt": math.sqrt(kappa), "linear": kappa, "constant": 1.0}[rule]
    if change is not None:
        if "betas" in scaled:
            names = (f"betas[{i}]" for i in range(len(scaled["betas"])))
            scaled["betas"] = tuple(map(change, names, scaled["betas"]))
        if "alpha" in scaled:
            scaled["alpha"] = change("alpha", scaled["alpha"])
        # 0 is no momentum at all, and stays that.
        if scaled.get("momentum", 0) != 0:
            old, scaled["momentum"] = scaled["momentum"], change("momentum", scaled["momentum"])
            factor = factor * (1.0 - scaled["momentum"]) / (1.0 - old)
    if "lr" in scaled:
        scaled["lr"] = scaled["lr"] * factor
    if rule == "sqrt" and "eps" in scaled:
        scaled["eps"] = scaled["eps"] / math.sqrt(kappa)
    return scaled


def rescale_(
    optimizer: Optimizer,
    from_batch: float,
    to_batch: float,
    rule: str,
    *,
    beta_form: str | None = None,
) -> None:
    """Apply ``rescale`` to every parameter group; tensors are written in place.

    Call it before the first step and before a scheduler is made: a scheduler holds the lr that it
    found, and bias corrections count the steps there have been as if all had the new batch size
    (early in a run, steps then are too long). For a captured CUDA graph, call
    ``optimizer.push_hyperparameters()`` afterwards.

    Args:
        optimizer: of torch.optim or of fusedopt.
        from_batch: samples a step that the hyper-parameters are for.
        to_batch: samples a step wanted.
        rule: as for ``rescale``.
        beta_form: as for ``rescale``.

    Raises:
        ValueError: as ``rescale``, or where groups share one lr tensor and need it to differ. No
            group has changed then.
    """
    groups = optimizer.param_groups
    # All of them first: an error must not leave half of the groups scaled, nor a tensor that groups
    # share, as they do when it was the constructor's lr, be scaled once for each.
    scaled = [rescale(g, from_batch, to_batch, rule, beta_form=beta_form) for g in groups]
    _check_shared(groups, scaled)
    for group, new in zip(groups, scaled, strict=True):
        for name in ("lr", "alpha", "momentum", "eps"):
            if name in group:
                group[name] = _written(group[name], new[name])
        if "betas" in group:
            pairs = zip(group["betas"], new["betas"], strict=True)
            group["betas"] = tuple(_written(old, value) for old, value in pairs)


def _ratio(from_batch: float, to_batch: float) -> float:
    for name, value in (("from_batch", from_batch), ("to_batch", to_batch)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    return to_batch / from_batch


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

    def change(name: str, decay: Any) -> Any:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
        new = _BETA_FORMS[form](decay, kappa)
        if not 0.0 <= new < 1.0:
            remedy = ': beta_form="power", beta**kappa, always is' if form == "linear" else ""
            raise ValueError(
                f"{name} = {decay} would become {new} for a batch {kappa:g} times as large, which"
                f" is not in [0, 1){remedy}"
            )
        return new

    return change


def _check_shared(groups: list[dict[str, Any]], scaled: list[dict[str, Any]]) -> None:
    values: dict[int, float] = {}
    for group, new in zip(groups, scaled, strict=True):
        lr = group.get("lr")
        if isinstance(lr, Tensor) and values.setdefault(id(lr), float(new["lr"])) != new["lr"]:
            raise ValueError(
                "groups of different momentum share one lr tensor, and need different values of it:"
                " give each group a tensor of its own"
            )


def _written(old: Any, new: Any) -> Any:
    """Return the new value, in the old tensor if it is one: others may hold on to that."""
    if isinstance(old, Tensor):
        return old.copy_(new)
    return new
