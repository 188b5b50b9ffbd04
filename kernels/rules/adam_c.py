"""AdamC: AdamW whose decay is corrected for a learning rate that changes.

    p = (1 - lr (lr / max_lr) wd) p       where a normalisation follows; else (1 - lr wd) p

and the rest of ``adam.py``. max_lr is the largest learning rate of the schedule.

Before a normalisation, steps u are at right angles to the weights, whose squared norm they enlarge
by lr^2 |u|^2, as decay takes it back. In balance |u|^2 / |p|^2 is 2 wd / lr with AdamW, so that
weights shrink and gradients grow as lr falls, and 2 wd / max_lr here, whatever lr is.

Defazio, arXiv 2506.02285, algorithm 1.
"""

from __future__ import annotations

from ..rule import Group, Rule, Scalar
from . import adam


def coefficients(group: Group, step: Scalar) -> tuple[Scalar, ...]:
    """Return Adam's, with the decay as it is to be."""
    if not group["corrected_decay"]:
        return adam.coefficients(group, step)
    decay = group["weight_decay"] * (group["lr"] / group["max_lr"])
    return adam.coefficients({**group, "weight_decay": decay}, step)


_DEFAULTS = {
    **adam.ADAM.example_groups[0], "weight_decay": 0.3, "decoupled_weight_decay": True,
    "max_lr": 0.4, "corrected_decay": True,
}  # fmt: skip

ADAM_C = Rule(
    name="AdamC",
    update=adam.update,
    twin=adam.twin,
    coefficients=coefficients,
    states=adam.states,
    options=adam.ADAM.options,
    option_names=adam.ADAM.option_names,
    hyper=(*adam.ADAM.hyper, "max_lr"),
    coefficient_names=adam.COEFFICIENTS,
    nonnegative=adam.NONNEGATIVE,
    example_groups=(
        _DEFAULTS,
        {**_DEFAULTS, "corrected_decay": False, "maximize": True},
        {**_DEFAULTS, "amsgrad": True, "betas": (0.3, 0.6)},
    ),
)
