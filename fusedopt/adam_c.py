"""AdamW whose weight decay is corrected for a learning rate that changes."""

from __future__ import annotations

from typing import Any, ClassVar

from .arguments import Number, Params, require, showing
from .coefficients import number
from .kernels.rules import ADAM_C
from .optimizers import AdamW


class AdamC(AdamW):
    """AdamC (Defazio, arXiv 2506.02285): decay by lr^2 / max_lr, before normalisations.

    With AdamW the balance of decay and steps, and so the size of such weights and of their
    gradients, goes by the learning rate; here it does not. See ``kernels/rules/adam_c.py``.
    Arguments and state are those of ``AdamW``, whose checkpoints it loads, and in addition:

    Args:
        max_lr: the largest learning rate of the schedule; what ``lr`` is at construction, by
            default. A number, or None. torch's ``OneCycleLR`` writes its own into the groups.
        corrected_decay: False in a group makes it AdamW's, to the bit: for weights that no
            normalisation follows, as of the output layer.
        **common: AdamW's other keywords, ``backend`` (``"auto"``, ``"triton"`` or
            ``"reference"``) and ``clip`` (``fusedopt.GlobalNorm(max_norm)``) among them: see
            ``AdamW`` and ``FusedOptimizer``.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    rule = ADAM_C
    choices: ClassVar = {**AdamW.choices, "corrected_decay": (True, False)}
    own_options: ClassVar[tuple[str, ...]] = (*AdamW.own_options, "max_lr", "corrected_decay")

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
        max_lr: float | None = None,
        corrected_decay: bool = True,
        **common: Any,
    ) -> None:
        self._corrected = {"max_lr": max_lr, "corrected_decay": corrected_decay}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; without ``max_lr``, its learning rate now is taken for that.

        Args:
            param_group: as of ``FusedOptimizer``, which raises what there is to raise.
        """
        # Adam's constructor does not know of them.
        self.defaults.update(self.__dict__.pop("_corrected", {}))
        if isinstance(param_group, dict):
            if param_group.get("max_lr", self.defaults["max_lr"]) is None:
                param_group["max_lr"] = float(number(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group that has no meaning."""
        super().check_group(group)
        require(group["max_lr"] > 0.0, "max_lr", "above 0", group["max_lr"])
