"""Update rules, one algorithm family a file, and the registry that tests and tools run over."""

from __future__ import annotations

from ..rule import Rule
from .adam import ADAM
from .adam_c import ADAM_C
from .batch_decoupled import BATCH_DECOUPLED_ADAM, BATCH_DECOUPLED_RMSPROP
from .lion import LION
from .rmsprop import RMSPROP
from .schedule_free import SCHEDULE_FREE_ADAMW
from .sgd import SGD
from .svag import PAIRED, SVAG_ADAM, SVAG_RMSPROP, SVAG_SGD

REGISTRY: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule to the registry, so that tests, ``verify`` and ``codegen`` exercise it."""
    if rule.name in REGISTRY and REGISTRY[rule.name] is not rule:
        raise ValueError(f"a rule named {rule.name!r} is registered already")
    REGISTRY[rule.name] = rule
    return rule


for _rule in (
    SGD,
    RMSPROP,
    ADAM,
    BATCH_DECOUPLED_ADAM,
    BATCH_DECOUPLED_RMSPROP,
    SVAG_SGD,
    SVAG_RMSPROP,
    SVAG_ADAM,
    ADAM_C,
    LION,
    SCHEDULE_FREE_ADAMW,
):
    register(_rule)

__all__ = [
    "ADAM",
    "ADAM_C",
    "BATCH_DECOUPLED_ADAM",
    "BATCH_DECOUPLED_RMSPROP",
    "LION",
    "PAIRED",
    "REGISTRY",
    "RMSPROP",
    "SCHEDULE_FREE_ADAMW",
    "SGD",
    "SVAG_ADAM",
    "SVAG_RMSPROP",
    "SVAG_SGD",
    "register",
]
