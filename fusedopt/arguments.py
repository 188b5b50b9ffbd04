"""What constructors share: arguments that every optimizer takes, and checks in torch's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from torch import Tensor

from .optimizer import FusedOptimizer

Params = Iterable[Any]
Number = float | Tensor
Constructor = TypeVar("Constructor", bound=Callable[..., None])

# What every optimizer takes, as the base class states it; of that, what is for rules that read
# squares, and an error for others.
_COMMON = [
    p.name
    for p in inspect.signature(FusedOptimizer).parameters.values()
    if p.kind is inspect.Parameter.KEYWORD_ONLY
]
_FOR_SQUARES = ("statistics", "virtual_batch_size")


def showing(
    of: Callable[..., None], without: Collection[str] = ()
) -> Callable[[Constructor], Constructor]:
    """Decorate a constructor: its signature shows what ``**common`` hands on.

    Written on the function and not on the class, whose subclasses would inherit it as theirs.

    Args:
        of: the constructor that ``**common`` goes to.
        without: names of its keywords that are not to be given.
    """

    def decorate(init: Constructor) -> Constructor:
        own = inspect.signature(init)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(of).parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name not in {*own.parameters, *without}
        ]
        init.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return init

    return decorate


showing_common = showing(FusedOptimizer.__init__, without=("defaults", *_FOR_SQUARES))


def check_names(optimizer: FusedOptimizer, common: Iterable[str]) -> None:
    """Raise TypeError for an argument that does not exist, in the name of the class called."""
    for name in common:
        if name not in _COMMON:
            raise TypeError(
                f"{type(optimizer).__name__}() got an unexpected keyword argument {name!r}"
            )


def check_flags(foreach: bool | None, fused: bool | None) -> None:
    """Raise RuntimeError for both of torch's flags."""
    # In torch's words: neither changes an update here, but code with both does not run there.
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def require(condition: bool | Tensor, name: str, bound: str, value: Any) -> None:
    """Raise ValueError for an argument out of its bound."""
    # Written so that nan fails, as it does in torch.
    if not condition:
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_lr(lr: Number) -> None:
    """Raise ValueError for a learning rate that is none."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}")
    require(not lr < 0.0, "lr", "at least 0", lr)


def check_betas(betas: tuple[Number, Number]) -> None:
    """Raise ValueError for what are no two decays."""
    kinds = {Tensor if isinstance(beta, Tensor) else type(beta) for beta in betas[:2]}
    if kinds not in ({float}, {Tensor}):
        raise ValueError(f"betas must be two floats, or two tensors, got {betas}")
    for name, beta in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        require(0.0 <= beta < 1.0, name, "in [0, 1)", beta)
