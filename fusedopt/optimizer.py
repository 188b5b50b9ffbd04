"""The optimizer base class: groups, states, checks and checkpoints around a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends
from .averaging import Averaged, WeightAverage, check_kind
from .checkpoint import (
    as_floats,
    as_patterns,
    check_flattened,
    claim,
    kept_states,
    put_aside,
    saved_form,
    show_formats,
    unpacked,
)
from .clipping import GlobalNorm
from .completion import TORCHS, Lent, flat_state, is_completed, is_completing
from .engine import Engine
from .formats import OPTIONS as PRECISION
from .formats import check_options, check_parameters
from .guard import SpikeGuard
from .kernels.rule import Rule
from .kernels.weight_average import OPTIONS as AVERAGE
from .normed import TakesNorm, check_guard
from .source import Source
from .statistics.base import Statistics
from .step.checks import check_source, check_statistics, check_virtual_batch_size
from .step.counts import new_step
from .step.scale import GradScale
from .step.span import Span
from .step.wrappers import watch
from .telemetry import Measured, Telemetry, check_telemetry
from .tracing import untraced


class FusedOptimizer(Averaged, Measured, TakesNorm, Optimizer):
    """A ``torch.optim.Optimizer`` whose step is one launch for all parameters.

    A subclass names its ``rule`` and passes its hyper-parameters on::

        class SignSGD(fusedopt.FusedOptimizer):
            rule = SIGN

            def __init__(self, params, lr=1e-3, **common):
                super().__init__(params, {"lr": lr}, **common)

    Args:
        params: parameters or parameter groups, as for every ``torch.optim`` optimizer.
        defaults: hyper-parameters for groups that do not set their own.
        backend: ``"auto"`` (Triton for tensors on a GPU, else the reference), ``"triton"`` or
            ``"reference"``.
        clip: ``fusedopt.GlobalNorm(max_norm)``, or None.
        guard: ``fusedopt.SpikeGuard()``, which leaves out steps by their norm, or None.
        statistics: where per-sample squares come from, for rules that take them.
        virtual_batch_size: for such rules, the batch whose second moment is to be averaged.
        state_dtype: in what states are kept: None for the parameter's type, a floating
            ``torch.dtype``, ``"int8"`` or ``"fp8"`` (8 bits, and a float32 for each 128 elements),
            or a dictionary from names of states to these. See docs/precision.md, also for what
            follows.
        rounding: how bfloat16 and float16 parameters are rounded: None to nearest,
            ``"stochastic"``, or ``"kahan"``, which keeps what is left over in a state.
        master: what is kept beside such a parameter so that none of it is rounded away:
            ``"remainder"`` (2 bytes, for bfloat16: a float32 in all), ``"remainder8"`` (1 byte: 24
            bits of one), ``"float32"``, or None.
        rounding_seed: seed of stochastic rounding, an int of 64 bits.
        average: ``fusedopt.WeightAverage(decay)``, or None. See docs/riding_along.md.
        telemetry: ``fusedopt.Telemetry()``, which norms are measured for, or None.
        capturable: keep step counts and hyper-parameters on the device, for CUDA graphs.

    Raises:
        ValueError: for an unknown backend, and for options of precision that mean nothing, do not
            go together, or do not fit a parameter's type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.
    """

    rule: ClassVar[Rule]
    # Entries of the parameter groups that take one of a few values.
    choices: ClassVar[Mapping[str, Collection[Any]]] = {}
    # Entries of the parameter groups that torch's class has not: a checkpoint may lack them.
    own_options: ClassVar[Collection[str]] = ()
    # Of these, one that decides what the states mean: a checkpoint may lack it in torch's form.
    form: ClassVar[str | None] = None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        backend: str = "auto",
        clip: GlobalNorm | None = None,
        guard: SpikeGuard | None = None,
        telemetry: Telemetry | None = None,
        statistics: Statistics | None = None,
        virtual_batch_size: float | None = None,
        state_dtype: Any = None,
        rounding: str | None = None,
        master: str | None = None,
        rounding_seed: int = 0,
        average: WeightAverage | None = None,
        capturable: bool | None = None,
    ) -> None:
        if capturable is not None:
            defaults = {**defaults, "capturable": capturable}
        backends.check_name(backend)
        check_guard(self, guard)
        # Its owner is an optimizer that was made, not one of which something is wrong.
        self.clip, self._guard = clip, guard
        defaults = {
            **defaults,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "rounding_seed": rounding_seed,
        }
        check_kind(average)
        if average is not None:
            average.check_free(self)
            defaults |= average.options()
        self._average = average
        if defaults.get(TORCHS):
            raise ValueError("differentiable=True is not supported: a fused step has no derivative")
        # torch's classes have it, and torch gives it to any that a state is loaded into.
        defaults.setdefault(TORCHS, False)
        check_statistics(type(self).__name__, self.rule, statistics, virtual_batch_size)
        if virtual_batch_size is not None:
            defaults = {**defaults, "virtual_batch_size": virtual_batch_size}
        self.backend = backend
        self._statistics: Source | None = statistics
        self._engine = Engine()
        self._lent: Lent | None = None
        # What steps parameters within backward; see ``fusedopt.gradient_release``.
        self.gradient_release: Any = None
        # Whether the loss scaler keeps its overflow flag on the device, and so counts, too.
        self.scaler_on_device = False
        # The processes among which a wrapper has dealt out the parameters; see step/wrappers.py.
        self.wrapper_group: Any = None
        check_telemetry(self, telemetry)
        self._telemetry = telemetry
        super().__init__(params, defaults)
        self.guard, self.telemetry = guard, telemetry
        if average is not None:
            average.attach(self)
        watch(FusedOptimizer)
        if statistics is not None:
            statistics.attach(self)

    @property
    def whole(self) -> FusedOptimizer:
        """The optimizer itself: what gradient release steps is a part of one."""
        return self

    def scale_for(self, device: torch.device) -> GradScale:
        """Return what launches on a device are to read besides coefficients."""
        return GradScale(device)

    def find_span(self) -> Span | None:
        """Return the processes whose gradients are clipped together; None for this one."""
        return self._engine.find_span(self)

    @property
    def extra_options(self) -> tuple[str, ...]:
        """Entries of the parameter groups that torch's class has not."""
        return (*self.own_options, *PRECISION, *AVERAGE)

    @property
    def statistics(self) -> Source | None:
        """Where the inputs of the rule besides ``p.grad`` come from; None for none.

        May be set, as on a copy, which comes without: the optimizer then is fed by it from the next
        step on.
        """
        return self._statistics

    @statistics.setter
    def statistics(self, source: Source | None) -> None:
        check_source(type(self).__name__, self.rule, source)
        if self._statistics is not None:
            self._statistics.detach(self)
        self._statistics = source
        if source is not None:
            source.attach(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` hands over its scale and flag instead of unscaling.

        As of torch's optimizers, with ``fused=True`` alone: who unscales and clips by hand tells
        from this whether gradients are the true ones. Clipping and statistics of ours need both.
        """
        folded = self.step_norm is not None or self._statistics is not None
        # Which says what is wrong with it.
        folded = folded or self.gradient_release is not None
        return folded or any(group.get("fused") for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; the next step takes it in.

        Args:
            param_group: parameters under ``"params"`` and hyper-parameters that differ.

        Raises:
            RuntimeError: for parameters that the backend asked for cannot update, and while
                gradients are released in backward.
            TypeError: for anything but a dictionary.
            ValueError: for hyper-parameters without meaning.
        """
        if self.gradient_release is not None:
            raise RuntimeError(
                "gradient release steps the parameters that there were: call remove() of what"
                " gradient_release() returned before add_param_group(), and gradient_release()"
                " again afterwards"
            )
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        for name in ("backend", "clip", "guard", "statistics", "_average", "_telemetry"):
            own, name = getattr(self, name), name.removeprefix("_")
            # Wrappers put all arguments of the constructor into groups.
            if param_group.get(name, own) != own:
                raise ValueError(f"{name} is one for all groups: pass it to the optimizer")
        if param_group.get("differentiable"):
            raise ValueError("differentiable=True is not supported: a fused step has no derivative")
        check_virtual_batch_size(param_group.get("virtual_batch_size"))
        super().add_param_group(param_group)
        types = self.param_groups[-1].get("state_dtype")
        if isinstance(types, dict):
            # Not the caller's, or another group's: changed there, it would change here.
            self.param_groups[-1]["state_dtype"] = dict(types)
        try:
            self.check_entries(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                # Where they will be on another device by the first step, that decides.
                if parameter.device.type != "meta":
                    backends.choose(parameter.device, self.backend)
        except (RuntimeError, ValueError):
            self.param_groups.pop()
            raise

    def check_entries(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group without meaning, or for its parameters."""
        self.check_group(group)
        check_parameters(group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter group that has no meaning.

        Args:
            group: an entry of ``param_groups``, with the defaults filled in.
        """
        for name, allowed in self.choices.items():
            value = group[name]
            # By type, too: True is no 1.
            if not any(value == choice and type(value) is type(choice) for choice in allowed):
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        check_options(self.rule, group)

    def check_ready(self) -> None:
        """Raise RuntimeError where no step may be taken now.

        Asked where a plan is made, as it is after any entry of a group has changed.
        """

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``step`` as torch does, and leave no loss scale behind where it raises.

        torch.amp.GradScaler takes its scale back only after a step that ends well. Hooks are called
        by torch's wrapper, so that this has to stand around it.
        """
        wrapped = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return wrapped(self, *args, **kwargs)
            except BaseException:
                self.__dict__.pop("grad_scale", None)
                self.__dict__.pop("found_inf", None)
                raise

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. Gradients are not written.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for gradients that cannot be used; nothing has changed then.
            KeyError: for a parameter whose state is partly there, or a group that lacks an option.
            TypeError: for an option that is no number.
            ValueError: for one without meaning.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @untraced
    def _update(self) -> None:
        self.refuse_if_applied("no step can be taken")
        grad_scale, found_inf = self._load_scaler()
        release = self.gradient_release
        if release is None and self.telemetry is not None:
            self.telemetry.begin()
        if release is None or release.before_step(self, grad_scale, found_inf):
            self._engine.step(self, grad_scale, found_inf)

    def push_hyperparameters(self) -> None:
        """Make hyper-parameters that are Python numbers current for a captured CUDA graph.

        With ``capturable=True`` the graph reads lr, weight decay, betas and the like from device
        memory. Tensors in ``param_groups`` are read directly; call this between replays after
        changing a number, as a scheduler does, or ``clip.max_norm``.
        """
        self._engine.push(self)
        if self.gradient_release is not None:
            self.gradient_release.push()

    def release_graphs(self) -> None:
        """Free what captured CUDA graphs read: call this when none will be replayed again.

        Tables and staging buffers of a captured step are kept for as long as the optimizer lives,
        since nothing says when a graph has been replayed for the last time.
        """
        self._engine.release()
        if self.gradient_release is not None:
            self.gradient_release.release_graphs()

    def _load_scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """Take what torch.amp.GradScaler left on the optimizer for this step."""
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):
            # A sum over no gradients; squares may be of samples that no gradient was made from.
            found_inf = torch.zeros((), device=None if grad_scale is None else grad_scale.device)
        counted = self._statistics is not None and self._statistics.every > 1
        if found_inf is not None and found_inf.device.type != "cpu" and not counted:
            # The host must not read the flag, so that step counts move to the device for good.
            self.scaler_on_device = True
        return grad_scale, found_inf

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what statistics have gathered beside them.

        Args:
            set_to_none: set gradients to None instead of zero.
        """
        super().zero_grad(set_to_none)
        if self._statistics is not None:
            self._statistics.cleared([p for group in self.param_groups for p in group["params"]])

    def _feed(self, rule: Rule, source: Source) -> None:
        """Update by another rule from now on, with a source of what that reads."""
        self._engine.drop()
        # On the instance: copies and pickles are plain, as they come without a source.
        self.rule = rule  # type: ignore[misc]
        self.statistics = source

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer of the same name does, with the clipping bound.

        And with what a guard counts and remembers. Both, and options that torch's class has not,
        are saved aside: see ``fusedopt.checkpoint.aside``.

        Returns:
            A dictionary of plain values and tensors that both load.

        Raises:
            ValueError: for codes without scales, for a master or the like that was taken away, and
                where ``FullyShardedDataParallel`` gathers what it could not load.
        """
        check_flattened(self)
        state_dict: dict[str, Any] = super().state_dict()
        show_formats(self, state_dict, self._known_of)
        config = None if self.clip is None else self.clip.config()
        guard = None if self.guard is None else self.guard.state()
        for group in state_dict["param_groups"]:
            group["clip"] = config
            # Wrappers may have put objects there; an average's options are entries of their own.
            group.pop("average", None)
            group.pop("guard", None)
            group.pop("telemetry", None)
            if guard is not None:
                group["guard"] = guard
            put_aside(group, ["clip", "guard", *self.extra_options])
            if self.form is not None and saved_form(group, self.form) not in (None, "torch"):
                claim(group, self.form)
        self._lent = Lent(state_dict) if is_completing() else None
        return state_dict

    def _known_of(self, p: Tensor) -> frozenset[str]:
        """Return the entries that the state of a parameter had when it was last looked at."""
        release = self.gradient_release
        known = self._engine.known_of(p)
        return known if release is None else known | release.known_of(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by torch's optimizer of the same name.

        Args:
            state_dict: what ``state_dict()`` returned. Options that it does not have, as torch's
                and distributed checkpoints do not, stay what they are.

        Raises:
            ValueError: for groups that do not fit, or have no meaning; nothing has changed then.
            KeyError: for a state that is partly there, or another algorithm's; the same.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dictionary, got {state_dict!r}")
        self.refuse_if_applied("no state can be loaded")
        beside: dict[str, Any] = {}
        lent, self._lent = self._lent, None
        if lent is not None and is_completed():
            state_dict = lent.returned(state_dict, self.form)

        flat = flat_state()
        kept: list[tuple[Tensor, dict[str, Any]]] = []

        def unpack(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded, found = unpacked(self, saved, flat)
            beside.update(found)
            kept.extend(kept_states(self, loaded))
            return loaded

        # The last of the hooks: another's may complete what is checked here.
        handle = self.register_load_state_dict_pre_hook(unpack)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts states to the parameter's type, which these are not to go through.
        for p, state in kept:
            rest = {n: x for n, x in self.state[p].items() if n == "step" or not torch.is_tensor(x)}
            self.state[p] = {**rest, **state}
        self.take_norm(beside)

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "backend": self.backend}
        state |= {"clip": self.clip, "guard": self.guard, "telemetry": self.telemetry}
        states, patterns = as_patterns(self.state)
        return {**state, "state": states, "patterns": patterns} if patterns else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        as_floats(self.state, self.__dict__.pop("patterns", ()))
        if "_engine" in self.__dict__:
            self._engine.reset()
        else:
            self._engine = Engine()
        self.scaler_on_device = False
        self.wrapper_group = None
        self._lent = None
        self.__dict__.setdefault("gradient_release", None)
        # States of a pickle have them under their public names; older ones have no guard.
        self.__dict__.setdefault("_guard", None)
        for name in ("clip", "guard", "telemetry"):
            if name in self.__dict__:
                setattr(self, name, self.__dict__.pop(name))
        # Pickles of before had it under its public name.
        self.__dict__.setdefault("_statistics", self.__dict__.pop("statistics", None))
        # Keys that an older or a torch checkpoint does not have.
        for group in self.param_groups:
            for name, value in {**PRECISION, **self.defaults}.items():
                group.setdefault(name, value)
            # Pickles of before an option had what comes first.
            for name, allowed in self.choices.items():
                group.setdefault(name, next(iter(allowed)))
        for values in self.state.values():
            step = values.get("step") if isinstance(values, dict) else None
            if step is not None and not isinstance(step, Tensor):
                values["step"] = new_step() + float(step)
        self._engine.look_at_states(self)
        if self.gradient_release is not None:
            self.gradient_release.reset()
