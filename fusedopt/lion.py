"""Lion, whose step is the sign of an average of gradients."""

from __future__ import annotations

from typing import Any

from .arguments import (
    Number,
    Params,
    check_betas,
    check_flags,
    check_lr,
    check_names,
    require,
    showing_common,
)
from .kernels.rules import LION
from .optimizer import FusedOptimizer


class Lion(FusedOptimizer):
    """Lion (Chen et al., arXiv 2302.06675), with one state of a parameter's size.

    See ``kernels/rules/lion.py`` for the update. In float32 a step moves 20 bytes a parameter.

    Args:
        params: parameters or groups.
        lr: the length of a step, in units of the parameter: three to ten times less than AdamW's.
        betas: weight of the average in the step, and decay of the average.
        weight_decay: the parameter is multiplied by 1 - lr * weight_decay.
        foreach: ignored; an error together with ``fused``, as in torch.
        fused: changes no update; ``torch.amp.GradScaler`` leaves unscaling to the step.
        differentiable: must be False.
        **common: ``backend`` (``"auto"``, ``"triton"`` or ``"reference"``), ``clip``
            (``fusedopt.GlobalNorm(max_norm)``), ``capturable`` and the options of precision: see
            ``FusedOptimizer``.

    Raises:
        RuntimeError: for ``foreach`` and ``fused`` together.
        TypeError: for an argument that does not exist.
        ValueError: for a hyper-parameter out of range.
    """

    rule = LION
    own_options = ("capturable",)

    @showing_common
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **common: Any,
    ) -> None:
        check_names(self, common)
        check_lr(lr)
        check_betas(betas)
        require(weight_decay >= 0.0, "weight_decay", "at least 0", weight_decay)
        check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **common)
