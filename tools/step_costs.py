"""What a step costs with what is around it: ``python -m tools.step_costs [--write]``.

For docs/riding_along.md: bytes a parameter in float32, of PyTorch's operations and of ours. Those
of PyTorch are counted as they run: each reads the tensors that it is handed, and writes what its
schema says that it writes, or returns. Ours are of the tables that the kernels are generated from,
to which ``codegen`` holds the machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt.formats.footprint import of_element, total
from fusedopt.kernels import telemetry
from fusedopt.kernels.rules import ADAM
from fusedopt.kernels.weight_average import DECAY, DTYPE, START
from tools.readme import Section

# Parameters of a tensor, and how many tensors: what is a number a tensor is not seen in a table.
NUMEL, TENSORS = 1 << 16, 2
# Operations that write without reading what was there.
_OVERWRITE = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
# What a schema says is written, and is so with a loss scale alone.
_KEPT = {("_fused_adamw_", "grads")}
# Of parameters with gradients, what takes one step.
Prepared = Callable[[Sequence[nn.Parameter]], Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """What one thing costs.

    Attributes:
        name: what the table calls it.
        torch: does it as it is usually done; None for what moves nothing.
        how: by what.
        ours: bytes a parameter that it adds to a step.
        launches: how many it adds to a step of ours.
    """

    name: str
    torch: Prepared | None
    how: str
    ours: float
    launches: int = 0


class _Bytes(TorchDispatchMode):
    """Counts the bytes that PyTorch's operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        aliases = [x.alias_info for x in schema.returns]
        if "empty" in name or (aliases and all(x is not None and not x.is_write for x in aliases)):
            return result
        for argument, given in _given(schema, args, kwargs or {}):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (writes and (name in _OVERWRITE or argument.kwarg_only))
            writes = writes and (name, argument.name) not in _KEPT
            self.count += sum(t.nbytes for t in _tensors(given)) * (writes + reads)
        if not any(x is not None for x in aliases):
            self.count += sum(t.nbytes for t in _tensors(result))
        return result


def _given(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Pair the arguments of an operation with what they were given."""
    by_name = {argument.name: argument for argument in schema.arguments}
    yield from zip(schema.arguments, args, strict=False)
    for name, value in kwargs.items():
        yield by_name[name], value


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            yield from _tensors(one)


def counted(prepare: Prepared) -> float:
    """Return the bytes a parameter that a step of something moves."""
    params = [nn.Parameter(torch.ones(NUMEL)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    step = prepare(params)
    with torch.no_grad(), _Bytes() as found:
        step()
    return found.count / (NUMEL * TENSORS)


def _adamw(**options: Any) -> Prepared:
    def prepared(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(params, **options)
        # States are made by the first.
        optimizer.step()
        return optimizer.step

    return prepared


def _clip(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
    return lambda: nn.utils.clip_grad_norm_(params, 1.0, foreach=True)


def _unscale(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
    gradients = [p.grad for p in params if p.grad is not None]
    found, inverse = torch.zeros(1), torch.ones(1)
    operation = torch._amp_foreach_non_finite_check_and_unscale_
    return lambda: operation(gradients, found, inverse)


def _average(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
    model = nn.ParameterList(params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(model)
    return lambda: averaged.update_parameters(model)


def _norms(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
    own: list[Tensor] = list(params)
    gradients = [p.grad for p in own if p.grad is not None]

    def logged() -> None:
        before = torch._foreach_clone(own)
        # Here lies the step.
        torch._foreach_norm(gradients)
        torch._foreach_norm(own)
        torch._foreach_sub_(before, own)
        torch._foreach_norm(before)

    return logged


def ours(**more: Any) -> float:
    """Return the bytes a parameter that a step of ours moves."""
    clip = more.pop("clip", False)
    group = {**ADAM.example_groups[0], **more}
    return total(of_element(ADAM, group, torch.float32, torch.float32, clip))[1]


AVERAGE = {DECAY: 0.999, DTYPE: torch.float32, START: 0}
SUMS = 4 * telemetry.COUNT / telemetry.SMALLEST_BLOCK


def rows() -> list[Row]:
    """List what is around an update, and the update itself."""
    step = ours()
    return [
        Row("the update", _adamw(fused=True), "`AdamW(fused=True)`", step, 1),
        Row("clipping by the global norm", _clip, "`clip_grad_norm_`", ours(clip=True) - step, 2),
        Row("loss scale, before clipping", _unscale, "`GradScaler.unscale_`", 0.0),
        Row("steps left out by that norm", None, "the host, which waits for it", 0.0),
        Row("average of the weights", _average, "`AveragedModel`", ours(**AVERAGE) - step),
        Row("norms of gradient, parameter and update", _norms, "`_foreach_norm`", SUMS),
    ]


def text() -> str:
    """Return the table, in Markdown."""
    lines = [
        "| bytes a float32 parameter | PyTorch | by | fusedopt | launches of ours |",
        "|---|---|---|---|---|",
    ]
    found = rows()
    theirs = [0.0 if row.torch is None else counted(row.torch) for row in found]
    for row, count in zip(found, theirs, strict=True):
        lines.append(
            f"| {row.name} | {count:.0f} | {row.how} | {row.ours:.3g} | {row.launches or ''} |"
        )
    whole = sum(row.ours for row in found)
    launches = sum(row.launches for row in found)
    lines.append(f"| **all of it** | **{sum(theirs):.0f}** | | **{whole:.2f}** | **{launches}** |")
    default = counted(_adamw(foreach=True))
    lines += ["", f"`torch.optim.AdamW` without `fused=True` moves {default:.0f} for the update."]
    return "\n".join(lines)


SECTION = Section("step costs", "what a step costs", text, "docs/riding_along.md")

if __name__ == "__main__":
    raise SystemExit(SECTION.main())
