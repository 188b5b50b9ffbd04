"""Making modules observable, and ordinary again.

A module is observed by a change of its class: a subclass made on the spot, which differs in what it
runs when it is called. Nothing is registered and no attribute of the module is replaced, so that
copies and pickles, which are made of the original class, are ordinary modules.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...tracing import untraced
from .unknown import NOT_TRACED

_KEY = "_fusedopt_observer"


class Observer:
    """What is run in the place of a module.

    Args:
        forward: called as ``forward(module, plain, arguments, keywords)`` in the place of
            ``module.forward``, which is ``plain``; or None.
        call: called as ``call(plain, arguments, keywords)`` in the place of ``module(...)``, hooks
            included; or None.
    """

    def __init__(
        self,
        forward: Callable[..., Any] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.forward = forward
        self.call = call
        self.original: type[nn.Module] = nn.Module
        self.observed: type[nn.Module] = nn.Module


class Observed:
    """Mixed into the class of every observed module."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Describe the module as one of its original class, for copy and pickle."""
        observed = type(self)
        observer: Observer = self.__dict__.pop(_KEY)
        _set_class(self, observer.original)
        try:
            described = self.__reduce_ex__(protocol)
            return _detached(described)
        finally:
            _set_class(self, observed)
            self.__dict__[_KEY] = observer

    def __prepare_scriptable__(self) -> Any:
        """Refuse ``torch.jit.script``, which would put compiled modules in the place of others."""
        raise RuntimeError(
            f"{type(self).__name__} is observed by PerSampleSquares, and torch.jit.script cannot"
            " compile what observes it. Call remove() on the statistics before, or script a"
            " copy.deepcopy of the model, which is a plain one"
        )


def _copied(self: Any, memo: Any) -> Any:
    """Copy a module as one of its original class, which does that in a way of its own."""
    observed = type(self)
    observer: Observer = self.__dict__.pop(_KEY)
    _set_class(self, observer.original)
    try:
        return copy.deepcopy(self, memo)
    finally:
        _set_class(self, observed)
        self.__dict__[_KEY] = observer


def _set_class(module: Any, kind: type) -> None:
    """Change a module's class; a wrapper's own ``__setattr__`` may pass it on to what it wraps."""
    object.__setattr__(module, "__class__", kind)


def _detached(described: Any) -> Any:
    """Make a description hold for the original class, whatever the module now is."""
    if not isinstance(described, tuple) or len(described) < 3:
        return described
    make, arguments, state, *rest = described
    # pickle compares the class that __newobj__ is given with the object's own.
    make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
    # A copy: the observer is about to return into the dictionary that this may be.
    return (make, arguments, dict(state) if isinstance(state, dict) else state, *rest)


def _new(kind: type, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


class _ForwardObserved:
    """Mixed into the class of a module whose forward is replaced."""

    @untraced
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the observer's forward."""
        observer: Observer = self.__dict__[_KEY]
        assert observer.forward is not None
        plain = observer.original.forward.__get__(self)
        return observer.forward(self, plain, arguments, keywords)

    # Read where a graph must not break there.
    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    forward._torchdynamo_disable_msg = NOT_TRACED  # type: ignore[attr-defined]


class _CallObserved:
    """Mixed into the class of a module whose calls are batches of samples."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        observer: Observer = self.__dict__[_KEY]
        assert observer.call is not None
        return observer.call(super().__call__, arguments, keywords)  # type: ignore[misc]


def _guarded(kind: type) -> type:
    """Make a metaclass of which classes lose nothing: ``remove_parametrizations`` would try."""

    class Guarded(kind):  # type: ignore[misc]
        def __delattr__(cls, name: str) -> None:
            raise RuntimeError(
                f"a {cls.__name__} is observed by PerSampleSquares, and what computes its {name}"
                " cannot be taken off: call remove() on the statistics before, and make them anew"
            )

    return Guarded


def observe_module(module: nn.Module, observer: Observer) -> None:
    """Let an observer see the calls of a module.

    Raises:
        RuntimeError: for a module compiled by TorchScript.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError("a TorchScript module cannot be observed: pass the Python module")
    original = type(module)
    bases: list[type] = [Observed]
    if observer.call is not None:
        bases.append(_CallObserved)
    if observer.forward is not None:
        bases.append(_ForwardObserved)
    observer.original = original
    # Under its own name: nobody who prints a model need know.
    body: dict[str, Any] = {
        "__module__": original.__module__, "__qualname__": original.__qualname__
    }  # fmt: skip
    if hasattr(original, "__deepcopy__"):
        # Not of others: torch gives one to the classes that it parametrizes, where there is none.
        body["__deepcopy__"] = _copied
    module.__dict__[_KEY] = observer
    make = _guarded(type(original))
    observer.observed = make(original.__name__, (*bases, original), body)
    _set_class(module, observer.observed)


def is_observed(module: nn.Module) -> bool:
    """Whether an observer sees the calls of the module."""
    return isinstance(module, Observed)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has when nobody observes it."""
    if not isinstance(module, Observed):
        return type(module)
    observer: Observer = module.__dict__[_KEY]
    return observer.original


def restore_module(module: nn.Module) -> None:
    """Give a module its class back."""
    if not isinstance(module, Observed):
        return
    observer: Observer = module.__dict__.pop(_KEY)
    if type(module) is observer.observed:
        _set_class(module, observer.original)
        return
    # Somebody has derived a class from it since, as a parametrization does.
    for kind in type(module).__mro__:
        if observer.observed in kind.__bases__:
            own = (
                observer.original if base is observer.observed else base for base in kind.__bases__
            )
            kind.__bases__ = tuple(own)
            return
