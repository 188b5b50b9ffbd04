"""Adam and RMSprop whose second moment is decoupled from the batch size.

An optimizer of torch's sees the gradient of the batch, whose square depends on how many samples it
is the mean of: hyper-parameters found at one batch size do not hold at another. Here the second
moment is that of a virtual batch of ``virtual_batch_size`` samples, whatever the size of the real
one, and lr, betas, eps and decay carry over by ``fusedopt.scaling.rescale(..., rule="decoupled")``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .arguments import Number, Params, showing
from .kernels.rules import BATCH_DECOUPLED_ADAM, BATCH_DECOUPLED_RMSPROP
from .optimizers import AdamW, RMSprop
from .statistics import Statistics


class BatchDecoupledAdam(AdamW):
    """AdamW with the second moment of a virtual batch.

    See ``kernels/rules/batch_decoupled.py`` for the update. Arguments and state are those of
    ``AdamW``, whose checkpoints it loads, and in addition:

    Args:
        statistics: where the samples' squared gradients come from: ``PerSampleSquares(model)``,
            ``MicroBatchSquares()``, ``GradSampleSquares()`` or ``BackpackSquares()``.
        virtual_batch_size: in samples (with ``MicroBatchSquares`` in micro-batches), at least 1.
            The batch size that hyper-parameters were found at makes this AdamW at that size, and
            keeps it so as the batch grows. 1, the default, is the mean of per-sample squares, which
            is AdamW at batch size 1 alone. An entry of the parameter groups.
        **common: AdamW's other keywords, ``backend`` (``"auto"``, ``"triton"`` or
            ``"reference"``) and ``clip`` (``fusedopt.GlobalNorm(max_norm)``) among them: see
            ``AdamW`` and ``FusedOptimizer``.

    Raises:
        TypeError: without statistics.
        ValueError: for a hyper-parameter out of range.
    """

    rule = BATCH_DECOUPLED_ADAM
    own_options: ClassVar[tuple[str, ...]] = (*AdamW.own_options, "virtual_batch_size")

    @showing(AdamW.__init__)
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        statistics: Statistics | None = None,
        virtual_batch_size: float = 1,
        **common: Any,
    ) -> None:
        common |= {"statistics": statistics, "virtual_batch_size": virtual_batch_size}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **common)


class BatchDecoupledRMSprop(RMSprop):
    """RMSprop with the second moment of a virtual batch.

    See ``kernels/rules/batch_decoupled.py`` for the update. Arguments and state are those of
    ``RMSprop``, whose checkpoints it loads, and in addition:

    Args:
        statistics: as of ``BatchDecoupledAdam``.
        virtual_batch_size: as of ``BatchDecoupledAdam``; 1, the mean of per-sample squares, by
            default.
        **common: RMSprop's other keywords, ``backend`` (``"auto"``, ``"triton"`` or
            ``"reference"``) and ``clip`` (``fusedopt.GlobalNorm(max_norm)``) among them: see
            ``RMSprop`` and ``FusedOptimizer``.

    Raises:
        TypeError: without statistics.
        ValueError: for a hyper-parameter out of range.
    """

    rule = BATCH_DECOUPLED_RMSPROP
    own_options: ClassVar[tuple[str, ...]] = (*RMSprop.own_options, "virtual_batch_size")

    @showing(RMSprop.__init__)
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        *,
        statistics: Statistics | None = None,
        virtual_batch_size: float = 1,
        **common: Any,
    ) -> None:
        common |= {"statistics": statistics, "virtual_batch_size": virtual_batch_size}
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, **common
        )
