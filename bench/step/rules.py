"""The optimizers of the benchmark, by the names and arguments that this library and torch share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt
from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import PAIRED

# So large that two steps, and the decay alone, move elements by many units of bfloat16.
_ADAM = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
_RMSPROP = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8}


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        name: on the command line and in results.
        ours: the class in ``fusedopt``.
        arguments: of both classes.
        theirs: the class in ``torch.optim``; None where torch has none.
        fused: whether torch has a fused kernel for it.
        ell: of SVAG around it, which takes two gradients a step; None without.
    """

    name: str
    ours: type[fusedopt.FusedOptimizer]
    arguments: Mapping[str, Any] = field(hash=False)
    theirs: type[torch.optim.Optimizer] | None = None
    fused: bool = False
    ell: float | None = None

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self.ours.rule if self.ell is None else PAIRED[self.ours.rule.name]

    @property
    def takes_pairs(self) -> bool:
        """Whether the rule reads a gradient besides that was held before."""
        return self.ell is not None

    @property
    def takes_squares(self) -> bool:
        """Whether the rule reads squares of samples' gradients besides."""
        return len(self.ours.rule.degrees) > 1

    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in torch's spelling."""
        probe = torch.nn.Parameter(torch.empty(1, device="meta"))
        options = {"statistics": fusedopt.BackpackSquares()} if self.takes_squares else {}
        optimizer = self.ours([probe], **self.arguments, backend="reference", **options)
        return self.ours.rule.states(optimizer.param_groups[0])


def _sgd(name: str, **arguments: Any) -> Row:
    options = {"lr": 0.3, **arguments}
    return Row(name, fusedopt.SGD, options, torch.optim.SGD, fused=True)


def _rmsprop(name: str, **arguments: Any) -> Row:
    return Row(name, fusedopt.RMSprop, {**_RMSPROP, **arguments}, torch.optim.RMSprop)


def _adam(name: str, ours: type, theirs: type, **arguments: Any) -> Row:
    return Row(name, ours, {**_ADAM, **arguments}, theirs, fused=True)


_ROWS = (
    _sgd("SGD"),
    _sgd("SGD-momentum", momentum=0.9),
    _sgd("SGD-nesterov", momentum=0.9, nesterov=True),
    _rmsprop("RMSprop"),
    _rmsprop("RMSprop-momentum", momentum=0.9),
    _rmsprop("RMSprop-centered", centered=True),
    _adam("Adam", fusedopt.Adam, torch.optim.Adam),
    _adam("AdamW", fusedopt.AdamW, torch.optim.AdamW, weight_decay=1.0),
    _adam("AMSGrad", fusedopt.AdamW, torch.optim.AdamW, weight_decay=1.0, amsgrad=True),
    Row("BatchDecoupledAdam", fusedopt.BatchDecoupledAdam, {**_ADAM, "weight_decay": 1.0}),
    Row("BatchDecoupledRMSprop", fusedopt.BatchDecoupledRMSprop, _RMSPROP),
    # SVAG divides the learning rate by ell.
    Row("SVAG-SGD", fusedopt.SGD, {"lr": 0.6}, ell=2.0),
    Row("SVAG-RMSprop", fusedopt.RMSprop, {**_RMSPROP, "lr": 0.3}, ell=2.0),
    Row("SVAG-AdamW", fusedopt.AdamW, {**_ADAM, "lr": 0.3, "weight_decay": 1.0}, ell=2.0),
)
RULES = {row.name: row for row in _ROWS}
