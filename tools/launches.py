"""What a step hands to the device: ``python -m tools.launches [--write]``, for docs/launches.md.

Counted, not timed: Triton's launches, PyTorch's operations on memory of the device, and copies to
it. No GPU is needed: parameters lie on the CPU, which ``TRITON_INTERPRET=1`` has the Triton backend
take, launches are noted and left out, and what is the device's memory is told by who uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.backends import triton, triton_coefficients, triton_samples
from fusedopt.kernels import launch as launching
from tools.readme import Section

# Imported above: otherwise the first step that needs one does it, with what stands for a launch.
LAUNCHERS = (triton, triton_coefficients, triton_samples)
# Tensors of an optimizer.
TENSORS = 6
HEADINGS = (
    "step", "Triton launches", "PyTorch's operations", "copies to the device",
    "first step: launches, operations on host and device",
)  # fmt: skip


@dataclass
class Count:
    """What one step hands to the device.

    Attributes:
        kernels: names of Triton's, in order.
        operations: names of PyTorch's operations that run there.
        copies: how many copies there are from the host.
        everything: how many operations of PyTorch's there are, on the host, too.
    """

    kernels: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    copies: int = 0
    everything: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many there are of each."""
        return len(self.kernels), len(self.operations), self.copies


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    Attributes:
        name: what the table calls it.
        options: of the optimizer.
        dtypes: of parameters, in turn.
        groups: how many parameter groups there are.
        moves: whether gradients are elsewhere at every step.
        scales: whether a loss scaler leaves its scale and flag on the device.
        live: hyper-parameters that are tensors on the device.
        strided: whether parameters have gaps between their elements.
        statistics: makes what feeds BatchDecoupledAdam of parameters, or of the model that they are
            of, and gives them what it reads.
        backward: makes gradients anew before each step, of statistics and optimizer.
    """

    name: str
    options: Callable[[], dict[str, Any]] = dict
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    groups: int = 1
    moves: bool = False
    scales: bool = False
    live: tuple[str, ...] = ()
    strided: bool = False
    statistics: Callable[[nn.ParameterList], Any] | None = None
    backward: Callable[[Any, Any], None] | None = None


def _model(params: nn.ParameterList) -> nn.Module:
    """Return linear layers one after the other, over the weights of a list."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in params))
    for layer, p in zip(model, params, strict=True):
        layer.weight = p
    return model


def _observed(params: nn.ParameterList) -> Any:
    return fusedopt.PerSampleSquares(_model(params), backend="reference")


def _backward(statistics: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    statistics.model(torch.ones(4, 8)).sum().backward()


def _accumulate(statistics: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1
        statistics.accumulate(optimizer)


def _clip(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"clip": fusedopt.GlobalNorm(1.0), **more}


def _clip_and_more() -> dict[str, Any]:
    return {
        "clip": fusedopt.GlobalNorm(1.0),
        "average": fusedopt.WeightAverage(),
        "telemetry": fusedopt.Telemetry(),
    }


def _backpack(params: nn.ParameterList) -> Any:
    for p in params:
        p.sum_grad_squared = torch.ones_like(p)  # type: ignore[attr-defined]
    return fusedopt.BackpackSquares(batch_size=4)


def _materialised(params: nn.ParameterList) -> Any:
    for p in params:
        p.grad_sample = torch.ones(4, *p.shape)  # type: ignore[attr-defined]
    return fusedopt.GradSampleSquares()


HALF = (torch.bfloat16,)
BOTH = (torch.float32, torch.bfloat16)
CAPTURABLE = {"capturable": True}

KINDS = (
    Kind("plain"),
    Kind("three groups", groups=3),
    Kind("gradients elsewhere at every step", moves=True),
    Kind("clipped", _clip()),
    Kind("clipped, three groups", _clip(), groups=3),
    Kind("loss scale", scales=True),
    Kind("loss scale, clipped", _clip(), scales=True),
    Kind("`WeightAverage`", lambda: {"average": fusedopt.WeightAverage()}),
    Kind("`Telemetry`", lambda: {"telemetry": fusedopt.Telemetry()}),
    Kind("`WeightAverage`, `Telemetry`, clipped", _clip_and_more),
    Kind("`capturable=True`", lambda: CAPTURABLE),
    Kind("`capturable=True`, three groups", lambda: CAPTURABLE, groups=3),
    Kind("`capturable=True`, `lr` a tensor", lambda: CAPTURABLE, live=("lr",)),
    Kind("`capturable=True`, `lr` a tensor, three groups", lambda: CAPTURABLE, (torch.float32,), 3,
         live=("lr",)),
    Kind("`capturable=True`, clipped", _clip(**CAPTURABLE)),
    Kind("float32 and bfloat16", dtypes=BOTH),
    Kind("float32 and bfloat16, clipped", _clip(), dtypes=BOTH),
    Kind("elements with gaps", strided=True),
    Kind("`state_dtype=\"int8\"`", lambda: {"state_dtype": "int8"}, HALF),
    Kind("`master=\"remainder8\"`", lambda: {"master": "remainder8"}, HALF),
    Kind("`rounding=\"stochastic\"`, clipped", _clip(rounding="stochastic"), HALF),
    Kind("`BackpackSquares`", statistics=_backpack),
    Kind("`BackpackSquares`, clipped", _clip(), statistics=_backpack),
    Kind("`GradSampleSquares`", statistics=_materialised),
    Kind("`PerSampleSquares`", statistics=_observed, backward=_backward),
    Kind(
        "`MicroBatchSquares`",
        statistics=lambda params: fusedopt.MicroBatchSquares(),
        backward=_accumulate,
    ),
)  # fmt: skip


class _OnDevice(Tensor):
    """A tensor on the CPU that says it lives on an accelerator: the host must not wait for it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("xpu")


class _Operations(TorchDispatchMode):
    """Notes the operations that read or write memory of the device."""

    def __init__(self, memory: set[int], count: Count) -> None:
        super().__init__()
        self._memory = memory
        self._count = count
        self._held: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_nothing(func):
            return result
        self._count.everything += 1
        given = list(_tensors((args, kwargs or {})))
        if not any(map(self._is_there, given)):
            return result
        name = func._schema.name.removeprefix("aten::")
        if name == "copy_" and not self._is_there(given[1]):
            self._count.copies += 1
        else:
            self._count.operations.append(name)
        for tensor in _tensors(result):
            self._memory.add(_address(tensor))
            # Its address must not be given to what is on the host.
            self._held.append(tensor)
        return result

    def _is_there(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._memory


def _is_nothing(func: Any) -> bool:
    """Whether an operation runs no kernel: it allocates, or looks at the same memory."""
    schema = func._schema
    if "empty" in schema.name:
        return True
    aliases = [x.alias_info for x in schema.returns]
    return bool(aliases) and all(x is not None and not x.is_write for x in aliases)


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            yield from _tensors(one)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Case:
    """An optimizer that takes one kind of step.

    Args:
        kind: the kind.
        count: how many tensors it has.
    """

    def __init__(self, kind: Kind, count: int) -> None:
        self.kind = kind
        self.params = nn.ParameterList(self._parameter(i) for i in range(count))
        cut = [self.params[i :: kind.groups] for i in range(kind.groups)]
        groups = [{"params": list(p), "weight_decay": 0.1 * i} for i, p in enumerate(cut)]
        options = {"lr": 0.1, "backend": "triton", **kind.options()}
        self._shared: list[Tensor] = []
        for name in kind.live:
            options[name] = torch.tensor(options[name])
            self._shared.append(options[name])
        if kind.statistics is None:
            self.optimizer: Any = fusedopt.AdamW(groups, **options)
        else:
            options["statistics"] = kind.statistics(self.params)
            self.optimizer = fusedopt.BatchDecoupledAdam(groups, **options)
        self._scale = torch.full((1,), 8.0).as_subclass(_OnDevice)
        self._flag = torch.zeros(1).as_subclass(_OnDevice)

    def _parameter(self, place: int) -> nn.Parameter:
        dtype = self.kind.dtypes[place % len(self.kind.dtypes)]
        values = torch.ones(8, 8, dtype=dtype)
        p = nn.Parameter(values[:, ::2] if self.kind.strided else values)
        p.grad = torch.ones_like(p)
        return p

    def step(self) -> Count:
        """Take a step, and count what it hands to the device."""
        if self.kind.backward is not None:
            self.kind.backward(self.optimizer.statistics, self.optimizer)
        if self.kind.moves:
            for p in self.params:
                p.grad = torch.ones_like(p)
        if self.kind.scales:
            self.optimizer.grad_scale, self.optimizer.found_inf = self._scale, self._flag
        count = Count()
        with _noted(count), _Operations(set(self._memory()), count):
            self.optimizer.step()
        return count

    def _memory(self) -> Iterator[int]:
        """Yield what is the device's, by address."""
        found: list[Any] = [*self.params, *(p.grad for p in self.params), *self._shared]
        found += [self._scale, self._flag]
        for state in self.optimizer.state.values():
            found += [value for name, value in state.items() if name != "step"]
        plan = self.optimizer._engine.plan
        if self.optimizer.clip is not None and self.optimizer.clip.last is not None:
            found.append(self.optimizer.clip.last)
        host: set[int] = set()
        for group in plan.device_groups if plan is not None else ():
            found += group.memory()
            if not group.on_device and group.counter is not None:
                host.update(map(_address, group.counter.memory()))
        yield from set(map(_address, found)) - host


@contextmanager
def _noted(count: Count) -> Iterator[None]:
    """Note launches instead of taking them, whichever module takes them."""

    def note(kernel: Any, *arguments: Any, **meta: Any) -> None:
        count.kernels.append(kernel.__name__)

    original = launching.launch
    modules = [module for module in LAUNCHERS if vars(module)["launch"] is original]
    for module in modules:
        vars(module)["launch"] = note
    try:
        yield
    finally:
        for module in modules:
            vars(module)["launch"] = original


def measure(kind: Kind, tensors: int) -> tuple[Count, Count]:
    """Return what the first step of a kind hands over, and what every later one does.

    Raises:
        RuntimeError: where later steps differ.
    """
    with _noted(Count()):
        case = Case(kind, tensors)
    first, *later = (case.step() for _ in range(4))
    # The second may still set what the first has left.
    if later[1].sizes != later[2].sizes:
        raise RuntimeError(f"{kind.name}: steps differ: {later[1]} and {later[2]}")
    return first, later[2]


def text() -> str:
    """Return the table, in Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for kind in KINDS:
        first, later = measure(kind, TENSORS)
        launches = f"{len(later.kernels)}: {_listed(later.kernels)}"
        operations = f"{len(later.operations)}"
        if later.operations:
            operations += f": {_listed(later.operations)}"
        numbers = f"{len(first.kernels)}, {first.everything}"
        lines.append(f"| {kind.name} | {launches} | {operations} | {later.copies} | {numbers} |")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    found = {name: names.count(name) for name in names}
    return ", ".join(f"`{name}`" + (f" x {n}" if n > 1 else "") for name, n in found.items())


SECTION = Section("launches", "the table of launches", text, "docs/launches.md")

if __name__ == "__main__":
    sys.exit(SECTION.main())
