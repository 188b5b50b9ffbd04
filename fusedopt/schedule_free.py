"""Schedule-free AdamW, and which of its two points the parameters hold."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

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
from .coefficients import number
from .formats import format_of
from .formats.convert import decoded
from .formats.fitting import fit_states
from .kernels.rules import SCHEDULE_FREE_ADAMW
from .memory import parameter
from .memory.dtensor import is_dtensor, local_of
from .optimizer import FusedOptimizer
from .step.checks import describe


class ScheduleFreeAdamW(FusedOptimizer):
    """Schedule-free AdamW (Defazio et al., arXiv 2405.15682): no schedule, and no last step.

    Gradients are taken at one point, y, and models evaluated at another, the average x. Parameters
    hold y until ``eval()``, and again after ``train()``: call them beside the model's own. A new
    optimizer is in train mode. See ``kernels/rules/schedule_free.py`` for the update; its states
    are ``exp_avg_sq`` and ``z_minus_x``, and in float32 a step moves 28 bytes a parameter.

    Args:
        params: parameters or groups.
        lr: learning rate, in units of the parameter; one to ten times that of AdamW. If it changes,
            steps follow at once, and their weights in the average stay those of a constant one.
        betas: weight of the average in y, and decay of the second moment.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: times lr and y, is taken off.
        warmup_steps: in which lr rises from lr / warmup_steps; counted for each parameter.
        foreach: ignored; an error together with ``fused``, as in torch.
        fused: changes no update; ``torch.amp.GradScaler`` leaves unscaling to the step.
        differentiable: must be False.
        **common: ``backend`` (``"auto"``, ``"triton"`` or ``"reference"``), ``clip``
            (``fusedopt.GlobalNorm(max_norm)``), ``capturable`` and the options of precision: see
            ``FusedOptimizer``. ``z_minus_x`` is a sum of small steps: no 8 bits, and for bfloat16
            parameters ``state_dtype={"z_minus_x": torch.float32}``.

    Raises:
        RuntimeError: for ``foreach`` and ``fused`` together.
        TypeError: for an argument that does not exist.
        ValueError: for a hyper-parameter out of range.
    """

    rule = SCHEDULE_FREE_ADAMW
    choices: ClassVar = {"mode": ("train", "eval")}
    own_options: ClassVar[tuple[str, ...]] = ("mode", "capturable")
    # A file says which point the parameters in it are.
    form: ClassVar[str | None] = "mode"

    @showing_common
    def __init__(
        self,
        params: Params,
        lr: Number = 2.5e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        warmup_steps: float = 0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **common: Any,
    ) -> None:
        check_names(self, common)
        check_lr(lr)
        check_betas(betas)
        require(eps >= 0.0, "eps", "at least 0", eps)
        require(weight_decay >= 0.0, "weight_decay", "at least 0", weight_decay)
        require(warmup_steps >= 0, "warmup_steps", "at least 0", warmup_steps)
        check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "mode": "train",
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, in the mode of the others; see ``FusedOptimizer``."""
        if isinstance(param_group, dict) and self.param_groups:
            param_group.setdefault("mode", self.param_groups[0]["mode"])
        super().add_param_group(param_group)

    def check_ready(self) -> None:
        """Raise RuntimeError in eval mode."""
        if any(group.get("mode") == "eval" for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode, in which parameters hold the average that"
                " models are evaluated by, and not the point that steps start from: call"
                " optimizer.train() before the forward pass of a training step"
            )

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters; twice is as once.

        What they held is kept as a state ``y`` until ``train()``, and in checkpoints: one more
        tensor of a parameter's size. x is rounded to nearest.

        Raises:
            ValueError: for states that are no states of this optimizer's; nothing has changed then.
        """
        self._switch("train", "eval")

    @torch.no_grad()
    def train(self) -> None:
        """Put back what the parameters held before ``eval()``, to the bit; twice is as once.

        Where a checkpoint has lost ``y``, it is worked out from the average, exact to rounding.

        Raises:
            RuntimeError: where that is not possible; nothing has changed then.
            ValueError: for states that are no states of this optimizer's; the same.
        """
        self._switch("eval", "train")

    def _switch(self, old: str, new: str) -> None:
        groups = self.param_groups
        chosen = [index for index, group in enumerate(groups) if group["mode"] == old]
        found = [(p, i) for i in chosen for p in groups[i]["params"] if self._has_moved(p)]
        params = [p for p, _ in found]
        fit_states(self, params, [index for _, index in found], describe)
        if new == "eval":
            kept = [p.detach().clone() for p in params]
            for p, y in zip(params, kept, strict=True):
                self.state[p]["y"] = y
        else:
            for p in params:
                self._check_companion(p)
        # First: what stops half-way can be undone by the way back.
        for index in chosen:
            groups[index]["mode"] = new
        for p, index in found:
            y = self.state[p].pop("y", None) if new == "train" else None
            if y is not None:
                p.copy_(y)
            else:
                sign = 1.0 if new == "train" else -1.0
                self._move(p, groups[index], sign * (1.0 - number(groups[index]["betas"][0])))

    def _has_moved(self, p: Tensor) -> bool:
        state = self.state.get(p)
        return state is not None and state.get("z_minus_x") is not None

    def _check_companion(self, p: Tensor) -> None:
        state = self.state[p]
        name = next((n for n in ("master", "compensation") if n in state), None)
        if name is not None and "y" not in state:
            raise RuntimeError(
                f"{describe(self, p)}: its state has {name!r}, the rest of what the parameter held"
                " before eval(), and no 'y', which is that: load a checkpoint of train mode, or one"
                " of this optimizer's state_dict() as it was"
            )

    def _move(self, p: Tensor, group: dict[str, Any], weight: float) -> None:
        """Add a part of z - x to a parameter, alone of what is kept of it."""
        state, format = self.state[p], format_of(self.rule, group)
        ahead = decoded(p, state, "z_minus_x", self.rule)
        companion = None if format.companion is None else state.get(format.companion)
        own, ahead, companion = (_local(x) for x in (p.detach(), ahead, companion))
        wide = torch.promote_types(own.dtype, torch.float32)
        if companion is None:
            value = own.to(wide)
        else:
            value = parameter.load(own, companion, format.device.parameter)
        own.copy_(value + weight * ahead.to(wide))


def _local(tensor: Any) -> Any:
    return local_of(tensor) if tensor is not None and is_dtensor(tensor) else tensor
