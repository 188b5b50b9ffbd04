"""SVAG: an optimizer with more gradient noise and a smaller step, and the same SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .kernels.rules import PAIRED, SGD
from .memory.storage import addresses, local_tensors
from .optimizer import FusedOptimizer
from .scaling import rescale_
from .source import MissingInput, RuleInputs, Source

# Beyond it, weights of nearly 10^6 cost float32 most of the digits that their sum of 1 leaves.
_LARGEST = 10**6
# The entry of the parameter groups that says for which ell their hyper-parameters are.
_MARK = "svag_ell"
# Entries of the parameter groups, and the values for which the differential equation is known.
_COVERED: dict[str, tuple[Any, ...]] = {
    "momentum": (0,),
    "centered": (False,),
    "amsgrad": (False,),
    "denominator": ("std",),
    "cautious_weight_decay": (False,),
    "average_decay": (None,),
    # Adam's, and RMSprop's switch.
    "bias_correction": ("adam", None, False, True),
}


class SVAG:
    """Stochastic variance amplified gradient, around an optimizer.

    An optimizer with learning rate lr and gradient noise sigma is a discrete form of a stochastic
    differential equation, if both are small enough. SVAG with a larger ell is a finer one of the
    same equation: smaller steps, more of them, and noise that is amplified accordingly, which two
    gradients of independent batches make, r1 g1 + r2 g2. Where trajectories for several ell
    coincide, the equation holds, and with it the batch-size rule that is derived from it.

    ==========================  ======================  ==========================================
    what                        SGD                     Adam, AdamW, RMSprop
    ==========================  ======================  ==========================================
    covariance of the noise     times ell               times ell^2
    r1, r2                      (1 +- root(2 ell-1))/2  (1 +- root(2 ell^2-1))/2
    lr                          lr / ell                lr / ell
    decay of an average         none                    1 - (1 - beta) / ell^2
    eps                         none                    eps ell
    decoupled weight decay      none                    weight_decay / ell
    steps for one               ell                     ell^2
    ==========================  ======================  ==========================================

    Li, Malladi and Arora, arXiv 2102.12470 (SGD); Malladi et al., arXiv 2205.10287 (adaptive
    methods). Decoupled decay is not in either; over the ell^2 steps it adds up to what it was.

    The optimizer's hyper-parameters and state are rescaled at once, in place (parameter groups have
    to be there by then). Both gradients are read, mixed and used in the one launch of the update;
    the first is kept in memory from ``hold()`` to ``step()``::

        svag = fusedopt.SVAG(fusedopt.Adam(model.parameters()), ell=2)
        for first, second in pairs_of_batches:
            loss(first).backward()
            svag.hold()
            loss(second).backward()
            svag.step()
            svag.zero_grad()

    or, with a closure that draws a batch each time it is called, ``svag.step(closure)``. With
    ell = 1 the step is that of the first gradient alone. Schedulers and gradient scalers take
    ``svag.optimizer``, whose ``step()`` is the same; make schedulers afterwards, as they keep the
    lr that they find. An overflow in either gradient skips the step, but a scaler sees only that of
    the last, and lowers its scale for no other. Both gradients are divided by the scale of the
    step: no ``scaler.update()`` may come between the two backwards, not for another optimizer that
    shares the scaler, either.

    A gradient is held as it is, without a copy, so that writing to it before the step is an error.
    Only a view of memory that others write, as DDP's buckets are with
    ``gradient_as_bucket_view=True``, is copied.

    Args:
        optimizer: ``fusedopt.SGD``, ``RMSprop``, ``Adam`` or ``AdamW``.
        ell: at least 1; the equation is approached as it grows.

    Raises:
        TypeError: for another optimizer.
        ValueError: for ell outside 1 to 10^6, or for what the theory does not cover: momentum,
            centred RMSprop, AMSGrad, a variance for a denominator, running means, clipping.
    """

    def __init__(self, optimizer: FusedOptimizer, ell: float) -> None:
        if not isinstance(ell, (int, float)) or isinstance(ell, bool):
            raise TypeError(f"ell must be a number, got {ell!r}")
        if not 1 <= ell <= _LARGEST:
            raise ValueError(f"ell must be from 1 to {_LARGEST:,}, got {ell}")
        _check_kind(optimizer)
        _check_covered(optimizer)
        if any(_MARK in group for group in optimizer.param_groups):
            raise ValueError("the hyper-parameters are those of another SVAG's optimizer already")
        adaptive = optimizer.rule is not SGD
        self._optimizer = optimizer
        self._ell = ell
        self._steps_per_step = ell**2 if adaptive else ell
        root = math.sqrt(2 * self._steps_per_step - 1)
        self._weights = (1 + root) / 2, (1 - root) / 2
        _rescale_(optimizer, ell, adaptive)
        for group in optimizer.param_groups:
            group[_MARK] = ell
        self._pair = _Pair(self._weights, ell)
        optimizer._feed(PAIRED[optimizer.rule.name], self._pair)

    # Hyper-parameters and states are rescaled for these: another SVAG has others.

    @property
    def optimizer(self) -> FusedOptimizer:
        """The optimizer, rescaled."""
        return self._optimizer

    @property
    def ell(self) -> float:
        """As given."""
        return self._ell

    @property
    def weights(self) -> tuple[float, float]:
        """The factors r1 and r2, of the gradient held and of the last one."""
        return self._weights

    @property
    def steps_per_step(self) -> float:
        """How many of these steps make one of the original optimizer's."""
        return self._steps_per_step

    def __getattr__(self, name: str) -> NoReturn:
        # Called for what is not found: param_groups, for example, by a scaler.
        raise _NoOptimizer(
            f"an SVAG is no optimizer and has no attribute {name!r}: what takes an optimizer, as"
            " schedulers and gradient scalers do, takes svag.optimizer"
        )

    def hold(self) -> None:
        """Set the gradients aside as the first of the two; the next backward makes the second.

        They must not be written to until the step. Of a ``GradScaler``, the scale must stay what it
        is until then, too: it is the step that divides both, by the scale that it finds.

        Raises:
            RuntimeError: where there is none, or a first one is held already.
        """
        self._pair.hold()

    def step(self, closure: Callable[[], Any] | None = None) -> tuple[Any, Any] | None:
        """Update every parameter that has both gradients.

        Args:
            closure: clears the gradients, reevaluates the model on a batch of its own and returns
                the loss. It is called twice.

        Returns:
            What both calls of the closure returned, or None without one.

        Raises:
            RuntimeError: for a parameter with one gradient only, or whose first one was written to
                since; nothing has changed then.
            ValueError: for groups that were changed to what SVAG does not cover.
        """
        if closure is None:
            self.optimizer.step()
            return None
        with torch.enable_grad():
            first = closure()
            self.hold()
            held = dict(self._pair.held)
            second = closure()
        # The closure's zero_grad has dropped them.
        self._pair.held = held
        self.optimizer.step()
        return first, second

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, held ones included.

        Args:
            set_to_none: set gradients to None instead of zero.
        """
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return ell and the optimizer's state; gradients that are held are not part of it."""
        return {"ell": self.ell, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            TypeError: for anything but a dictionary.
            ValueError: where it is no such state, or that of another ell, whose hyper-parameters it
                has.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"the state is what svag.state_dict() returned, got {type(state_dict).__name__}"
            )
        if "ell" not in state_dict:
            raise ValueError(
                "this is no state of an SVAG: load it into svag.optimizer, or wrap anew"
            )
        if state_dict["ell"] != self.ell:
            raise ValueError(f"the state is that of ell = {state_dict['ell']}, not {self.ell}")
        inner = state_dict.get("optimizer")
        if not isinstance(inner, Mapping) or not {"state", "param_groups"} <= inner.keys():
            raise ValueError(
                "this is no whole state of an SVAG: under 'optimizer' it has no"
                " svag.optimizer.state_dict()"
            )
        self.optimizer.load_state_dict(inner)  # type: ignore[arg-type]
        self._pair.reset()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an SVAG cannot be copied or pickled, only its state_dict(): copies of optimizers are"
            " plain ones"
        )


class _NoOptimizer(TypeError, AttributeError):
    """An SVAG where an optimizer belongs; an AttributeError so that ``hasattr`` says no."""


class _Held(NamedTuple):
    """A gradient that is set aside, and what tells whether it was written to since."""

    gradient: Tensor
    version: tuple[int, int]


class _Pair(Source):
    """The gradients of two batches: one held, one in ``p.grad``."""

    names = ("gradient", "gradient held")

    def __init__(self, weights: tuple[float, float], ell: float) -> None:
        super().__init__()
        self.weights = weights
        self.ell = ell
        self.held: dict[Tensor, _Held] = {}

    @torch.no_grad()
    def hold(self) -> None:
        """Move the gradients aside."""
        if self.held:
            raise RuntimeError("a first gradient is held already: call step() or zero_grad() first")
        with_gradient = [p for p in self._all_parameters() if p.grad is not None]
        if not with_gradient:
            raise RuntimeError("no parameter has a gradient: call backward before hold()")
        for p in with_gradient:
            assert p.grad is not None
            gradient = p.grad.clone() if _is_part(p.grad) else p.grad
            self.held[p] = _Held(gradient, *_versions([gradient]))
            p.grad = None

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where a parameter has one gradient only, or a group is not what it was."""
        for optimizer in filter(None, (ref() for ref in self._optimizers)):
            _check_covered(optimizer)
            if any(group.get(_MARK) != self.ell for group in optimizer.param_groups):
                raise ValueError(
                    f"a parameter group was added or loaded that is not rescaled for ell ="
                    f" {self.ell}: groups have to be there before SVAG, and states are loaded into"
                    " the SVAG"
                )
        if not self.held:
            raise RuntimeError(
                "SVAG's step takes two gradients: call hold() after the first backward, and then"
                " backward on another batch"
            )
        present = set(parameters)
        for p in self._all_parameters():
            if (p in self.held) != (p in present):
                which = "first" if p in self.held else "second"
                raise MissingInput(
                    p,
                    f"it has the {which} of SVAG's two gradients only: both batches have to reach"
                    " it, or its gradient has to be set to zeros",
                )
        self._check_kept(parameters)

    def _check_kept(self, parameters: Sequence[Tensor]) -> None:
        """Raise where a gradient held is no longer what it was, or is the second one, too."""
        held = [self.held[p] for p in parameters]
        first = [one.gradient for one in held]
        second = [p.grad for p in parameters if p.grad is not None]
        now, places = _versions(first), zip(_addresses(first), _addresses(second), strict=True)
        for p, one, version, (a, b) in zip(parameters, held, now, places, strict=True):
            if version != one.version or a == b != 0:
                raise MissingInput(
                    p,
                    "the first of SVAG's two gradients was written to after hold(), or is the"
                    " second one, too: call zero_grad(), and where one buffer is used for both, set"
                    " p.grad = p.grad.clone() before hold()",
                )

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return both gradients, the last one first."""
        return RuleInputs([gradients, [self.held[p].gradient for p in parameters]])

    def factors(self, virtual_batch_size: float, count: int) -> dict[str, float]:
        """Return the weights of both gradients."""
        held, last = self.weights
        return {"held_weight": held, "last_weight": last}

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Let go of the held gradients: the next step takes two new ones."""
        self.held = {}

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Let go of the held gradients of some parameters."""
        for p in list(self.held) if parameters is None else parameters:
            self.held.pop(p, None)


def _is_part(gradient: Tensor) -> bool:
    """Whether it is a part of memory that may be written through others, as DDP's buckets are."""
    # The gradients that autograd makes have their memory for themselves.
    (t,) = local_tensors([gradient])
    if t._is_view() or t.layout != torch.strided:
        return t.layout == torch.strided
    try:
        return t.untyped_storage().nbytes() > t.numel() * t.element_size()
    except RuntimeError:
        # The step refuses by name what has no memory of its own.
        return False


def _versions(gradients: list[Tensor]) -> list[tuple[int, int]]:
    """Return counters that a write changes, whatever tensor of that memory it goes through."""
    pairs = zip(gradients, local_tensors(gradients), strict=True)
    return [(_version(g), _version(t)) for g, t in pairs]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _addresses(gradients: list[Tensor]) -> list[int]:
    """Return where their values begin; 0 where there are none, or none that can be read."""
    return [_address(t) for t in local_tensors(gradients)]


def _address(t: Tensor) -> int:
    try:
        return addresses([t])[0]
    except RuntimeError:
        return 0


def _check_kind(optimizer: Any) -> None:
    """Raise for an optimizer without a form of its own for two gradients."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"SVAG needs an optimizer of fusedopt, got {kind}")
    if isinstance(optimizer.statistics, _Pair):
        raise TypeError(f"this {kind} is under SVAG already")
    if optimizer.rule.name not in PAIRED:
        raise TypeError(f"SVAG takes SGD, RMSprop, Adam and AdamW of fusedopt, got {kind}")


def _check_covered(optimizer: FusedOptimizer) -> None:
    """Raise for what the theory does not cover."""
    if optimizer.clip is not None:
        raise ValueError("SVAG does not cover clipping, which is no SDE: pass clip=None")
    if optimizer.guard is not None:
        raise ValueError("SVAG does not cover steps left out, which no SDE has: pass guard=None")
    for group in optimizer.param_groups:
        for name, covered in _COVERED.items():
            if name in group and group[name] not in covered:
                raise ValueError(
                    f"SVAG's theory covers only {name}={covered[0]!r}, got {group[name]!r}"
                )


def _rescale_(optimizer: FusedOptimizer, ell: float, adaptive: bool) -> None:
    """Give the optimizer the hyper-parameters of a batch that makes the noise ell times as large.

    The square-root rule keeps the SDE whatever the batch; so does this, at the same batch.
    """
    if not adaptive:
        rescale_(optimizer, ell, 1, "linear")
        return
    rescale_(optimizer, ell**2, 1, "sqrt")
