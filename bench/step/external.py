"""Optimizers of other libraries, each by its own interface; none of them need be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bench.harness.contenders import load

from .correctness import max_norm
from .protocol import TimedStep, Unsupported, loss_scaler, timed_step
from .rules import Row
from .workload import Workload

Build = Callable[[ModuleType, list[torch.nn.Parameter], Row], torch.optim.Optimizer]


@dataclass(frozen=True)
class ExternalLibrary:
    """Another library.

    Attributes:
        module: to import.
        build: the optimizer of a row; raises ``Unsupported`` where there is none.
        eager_on_cpu: whether it has its kernels on GPUs alone, and torch's operations elsewhere.
    """

    module: str
    build: Build
    eager_on_cpu: bool = False

    def reason_missing(self) -> str | None:
        """Return why the library cannot be used; None where it can."""
        return load(self.module)[1]

    def make(self, workload: Workload, clip: bool, scale: float | None) -> TimedStep:
        """Return its step behind torch's clipping and unscaling."""
        if workload.codec.state != workload.codec.param:
            raise Unsupported("its states take the parameter's type")
        module = importlib.import_module(self.module)
        optimizer = self.build(module, workload.params, workload.row)
        bound = max_norm(workload) if clip else None
        scaler = None if scale is None else loss_scaler(workload.device, scale)
        return timed_step(optimizer, workload.params, optimizer.step, bound, scaler)


def _options(row: Row, *names: str) -> dict[str, Any]:
    """Return the row's arguments; raise where one of them has no name there."""
    unknown = set(row.arguments) - set(names)
    if unknown:
        raise Unsupported(f"it has no {', '.join(sorted(unknown))}")
    return dict(row.arguments)


def _choose(row: Row, *known: str) -> str:
    """Return the name of the class in torch and there."""
    name = "" if row.theirs is None else row.theirs.__name__
    if name not in known:
        raise Unsupported(f"it has no {row.name}")
    return name


def _optimi(module: ModuleType, params: list[Any], row: Row) -> torch.optim.Optimizer:
    # Kahan summation, its default in bfloat16, moves more bytes for another result.
    name = _choose(row, "SGD", "Adam", "AdamW")
    options = _options(row, "lr", "momentum", "betas", "eps", "weight_decay")
    return getattr(module, name)(params, **options, kahan_sum=False)


def _torchao(module: ModuleType, params: list[Any], row: Row) -> torch.optim.Optimizer:
    # The rest of its optimizers have states of 8 bits and fewer.
    _choose(row, "AdamW")
    options = _options(row, "lr", "betas", "eps", "weight_decay", "amsgrad")
    return module._AdamW(params, **options)


def _heavyball(module: ModuleType, params: list[Any], row: Row) -> torch.optim.Optimizer:
    # Its RMSprop corrects the bias, which torch's does not.
    name = _choose(row, "AdamW")
    options = _options(row, "lr", "betas", "eps", "weight_decay")
    dtype = str(params[0].dtype).removeprefix("torch.")
    # Otherwise it sets gradients to None, which the others' steps do not.
    options |= {"storage_dtype": dtype, "consume_grad": False}
    return getattr(module, name)(params, **options)


def _bitsandbytes(module: ModuleType, params: list[Any], row: Row) -> torch.optim.Optimizer:
    name = _choose(row, "SGD", "RMSprop", "Adam", "AdamW")
    options = _options(row, "lr", "momentum", "alpha", "betas", "eps", "weight_decay", "amsgrad")
    if name == "SGD" and not options.get("momentum"):
        raise Unsupported("it has no SGD without momentum")
    return getattr(module.optim, name)(params, **options, optim_bits=32)


LIBRARIES = {
    "optimi": ExternalLibrary("optimi", _optimi, eager_on_cpu=True),
    "torchao": ExternalLibrary("torchao.optim", _torchao),
    "heavyball": ExternalLibrary("heavyball", _heavyball),
    "bitsandbytes": ExternalLibrary("bitsandbytes", _bitsandbytes),
}
