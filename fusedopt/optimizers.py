"""SGD, RMSprop, Adam and AdamW with the signatures, groups and states of torch.optim.

Arguments that torch has and that change no update here (``foreach``, ``fused``) are kept in the
parameter groups, so that checkpoints go both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .arguments import (
    Number,
    Params,
    check_betas,
    check_flags,
    check_lr,
    check_names,
    require,
    showing,
    showing_common,
)
from .checkpoint import saved_form
from .kernels.rules import ADAM, RMSPROP
from .kernels.rules import SGD as SGD_RULE
from .kernels.rules.averages import CORRECTIONS
from .kernels.rules.cautious import NAME as CAUTIOUS
from .kernels.rules.rmsprop import DENOMINATORS
from .kernels.rules.sgd import MOMENTUM_FORMS
from .optimizer import FusedOptimizer


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum: ``torch.optim.SGD``, fused.

    See ``kernels/rules/sgd.py`` for the update. Arguments are torch's, in particular:

    Args:
        params: parameters or groups.
        lr: learning rate, in units of parameter per gradient.
        momentum: decay of the momentum buffer, dimensionless.
        dampening: the new gradient enters the buffer with weight 1 - dampening.
        weight_decay: added to the gradient as weight_decay * parameter.
        nesterov: look ahead by one momentum step; needs momentum > 0 and no dampening.
        maximize: ascend.
        foreach: ignored; an error together with ``fused``, as in torch.
        differentiable: must be False.
        fused: changes no update; ``torch.amp.GradScaler`` leaves unscaling to the step.
        momentum_form: where the learning rate stands. ``"torch"``: outside the momentum buffer.
            ``"velocity"``: inside, so that the buffer keeps what it was given when lr changes.
            ``"ema"``: outside, and the buffer is an average of gradients, in which lr has the
            meaning that it has without momentum; no dampening then. The buffers of these forms are
            not of one unit: before it is loaded into torch's class (which does not complain) or
            into another form, or the form is changed in the middle of a run, a buffer has to be
            converted. ``load_state_dict`` takes the checkpoint's form where it has one. A file of
            distributed checkpoint loads into the form that wrote it, and is refused for a missing
            key (``momentum_form``, or ``differentiable``) between torch's and the others.
        cautious_weight_decay: decay elements that the step takes towards zero, and no others (Chen
            et al., arXiv 2510.12402): p - lr (u + weight_decay [u p >= 0] p), with the step's
            direction u, into whose momentum the decay then does not go.
        **common: ``backend`` (``"auto"``, ``"triton"`` or ``"reference"``) and ``clip``
            (``fusedopt.GlobalNorm(max_norm)``): see ``FusedOptimizer``.

    Raises:
        RuntimeError: for ``foreach`` and ``fused`` together.
        TypeError: for an argument that does not exist.
        ValueError: for a hyper-parameter out of range.
    """

    rule = SGD_RULE
    choices: ClassVar = {"momentum_form": MOMENTUM_FORMS, CAUTIOUS: (False, True)}
    # torch's SGD has no capturable.
    own_options: ClassVar[tuple[str, ...]] = ("momentum_form", CAUTIOUS, "capturable")
    form: ClassVar[str | None] = "momentum_form"

    @showing_common
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_form: str = "torch",
        cautious_weight_decay: bool = False,
        **common: Any,
    ) -> None:
        check_names(self, common)
        check_lr(lr)
        require(not momentum < 0.0, "momentum", "at least 0", momentum)
        require(not weight_decay < 0.0, "weight_decay", "at least 0", weight_decay)
        check_flags(foreach, fused)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_form": momentum_form,
            CAUTIOUS: cautious_weight_decay,
        }
        super().__init__(params, defaults, **common)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group that has no meaning."""
        super().check_group(group)
        if group["momentum_form"] == "ema":
            if group["dampening"] != 0:
                raise ValueError('momentum_form="ema" has weights of its own: dampening must be 0')
            require(
                group["momentum"] < 1.0, "momentum", "below 1, for an average", group["momentum"]
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by ``torch.optim.SGD``.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: for momentum buffers of torch's, where this optimizer has another form.
        """
        # Anything that has not the form of a checkpoint is refused below.
        whole = state_dict if isinstance(state_dict, Mapping) else {}
        states = whole.get("state")
        values = states.values() if isinstance(states, Mapping) else ()
        if "param_groups" in whole and any(
            isinstance(x, Mapping) and x.get("momentum_buffer") is not None for x in values
        ):
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
                form = saved_form(saved, "momentum_form")
                if form is None and group["momentum_form"] != "torch":
                    raise ValueError(_not_torchs(group["momentum_form"]))
        super().load_state_dict(state_dict)


def _not_torchs(form: str) -> str:
    factor = {"velocity": "lr", "ema": "1 - momentum"}[form]
    return (
        "the checkpoint's momentum buffers are those of torch.optim.SGD, and this optimizer has"
        f' momentum_form="{form}": load it with momentum_form="torch", or multiply the buffers by'
        f' {factor} and set "momentum_form" in its param_groups'
    )


class RMSprop(FusedOptimizer):
    """RMSprop, plain or centred, with momentum: ``torch.optim.RMSprop``, fused.

    See ``kernels/rules/rmsprop.py`` for the update. Arguments are torch's, in particular:

    Args:
        params: parameters or groups.
        lr: learning rate, in units of the parameter.
        alpha: decay of the moving averages; the horizon is 1 / (1 - alpha) steps.
        eps: added to the root, in units of the gradient.
        weight_decay: added to the gradient as weight_decay * parameter.
        momentum: decay of the momentum buffer.
        centered: divide by the standard deviation instead of the root mean square.
        capturable: keep step counts and hyper-parameters on the device, for CUDA graphs.
        foreach: ignored.
        maximize: ascend.
        differentiable: must be False.
        bias_correction: divide the averages by the sum of their weights, 1 - alpha^t. Not with
            ``centered``: the variance of the first gradient alone is zero.
        denominator: ``"std"``, the root of the second moment (centred, the standard deviation), or
            ``"variance"``, without the root: eps then has units of the gradient squared, and lr
            those of the loss, so that the trajectory does not depend on the unit of the parameters
            (McAllester, TTIC 31230, "RMSProp is Theoretically Mysterious", form 2).
        **common: ``backend`` (``"auto"``, ``"triton"`` or ``"reference"``) and ``clip``
            (``fusedopt.GlobalNorm(max_norm)``): see ``FusedOptimizer``.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    rule = RMSPROP
    choices: ClassVar = {"bias_correction": (False, True), "denominator": DENOMINATORS}
    own_options: ClassVar[tuple[str, ...]] = ("bias_correction", "denominator")

    @showing_common
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
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        bias_correction: bool = False,
        denominator: str = "std",
        **common: Any,
    ) -> None:
        check_names(self, common)
        check_lr(lr)
        require(lr >= 0.0, "lr", "at least 0", lr)
        for name, value in (("eps", eps), ("momentum", momentum), ("alpha", alpha)):
            require(value >= 0.0, name, "at least 0", value)
        require(weight_decay >= 0.0, "weight_decay", "at least 0", weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "bias_correction": bias_correction,
            "denominator": denominator,
        }
        super().__init__(params, defaults, **common)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group that has no meaning."""
        super().check_group(group)
        if group["bias_correction"]:
            require(group["alpha"] < 1.0, "alpha", "below 1, for a correction", group["alpha"])
        if group["bias_correction"] and group["centered"]:
            raise ValueError(
                "bias_correction=True and centered=True: the variance of the first gradient alone"
                " is zero, and the first step would be lr * gradient / eps. Leave out one of them"
            )


class Adam(FusedOptimizer):
    """Adam: ``torch.optim.Adam``, fused.

    See ``kernels/rules/adam.py`` for the update. Arguments are torch's, in particular:

    Args:
        params: parameters or groups.
        lr: learning rate, in units of the parameter.
        betas: decays of the first and second moment.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: added to the gradient as weight_decay * parameter, or applied to the
            parameter directly with ``decoupled_weight_decay``.
        amsgrad: divide by the largest second moment so far.
        foreach: ignored; an error together with ``fused``, as in torch.
        maximize: ascend.
        capturable: keep step counts and hyper-parameters on the device, for CUDA graphs.
        differentiable: must be False.
        fused: changes no update; ``torch.amp.GradScaler`` leaves unscaling to the step.
        decoupled_weight_decay: multiply the parameter by 1 - lr * weight_decay instead (AdamW).
        bias_correction: how the averages get over their start from zero. ``"adam"``: they are
            divided by 1 - beta^t. ``"running_mean"``: they are plain means for the first
            1 / (1 - beta) steps. None: not at all.
        cautious_weight_decay: with decoupled decay alone: decay elements that the step takes
            towards zero, and no others (Chen et al., arXiv 2510.12402):
            p - lr (u + weight_decay [u p >= 0] p), with the step's direction u.
        **common: ``backend`` (``"auto"``, ``"triton"`` or ``"reference"``) and ``clip``
            (``fusedopt.GlobalNorm(max_norm)``): see ``FusedOptimizer``.

    Raises:
        RuntimeError: for ``foreach`` and ``fused`` together.
        TypeError: for an argument that does not exist.
        ValueError: for a hyper-parameter out of range.
    """

    rule = ADAM
    choices: ClassVar = {"bias_correction": CORRECTIONS, CAUTIOUS: (False, True)}
    own_options: ClassVar[tuple[str, ...]] = ("bias_correction", CAUTIOUS)

    @showing_common
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: str | None = "adam",
        cautious_weight_decay: bool = False,
        **common: Any,
    ) -> None:
        check_names(self, common)
        check_lr(lr)
        require(lr >= 0.0, "lr", "at least 0", lr)
        require(eps >= 0.0, "eps", "at least 0", eps)
        check_betas(betas)
        require(weight_decay >= 0.0, "weight_decay", "at least 0", weight_decay)
        check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            CAUTIOUS: cautious_weight_decay,
        }
        super().__init__(params, defaults, **common)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group that has no meaning."""
        super().check_group(group)
        if group[CAUTIOUS] and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"{CAUTIOUS}=True is for decoupled decay, which does not go into the gradient: take"
                " AdamW, or decoupled_weight_decay=True"
            )


class AdamW(Adam):
    """Adam with decoupled weight decay: ``torch.optim.AdamW``, fused.

    Arguments are those of ``Adam``; ``weight_decay`` multiplies the parameter by
    1 - lr * weight_decay before the update (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        **common: ``bias_correction``, ``cautious_weight_decay``: as Adam's. ``backend``
            (``"auto"``, ``"triton"`` or ``"reference"``) and ``clip``
            (``fusedopt.GlobalNorm(max_norm)``): see ``FusedOptimizer``.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    @showing(Adam.__init__, without=("decoupled_weight_decay",))
    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **common,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of Adam says otherwise; the class decides, as in torch.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
