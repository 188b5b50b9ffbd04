"""Where an update runs: a loop in PyTorch, or one launch for all tensors.

A backend is handed entries (a parameter with its gradient and states) and makes an executor of
them, which updates them step after step. It sees coefficients, never hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..coefficients import LiveTable
from ..kernels.rule import Rule
from .entry import Coefficients, Draw, Entries, Executor, Inputs, Sums

__all__ = [
    "BACKENDS",
    "Coefficients",
    "Draw",
    "Entries",
    "Executor",
    "Inputs",
    "Sums",
    "check_name",
    "choose",
    "coefficients_on",
    "prepare",
    "reduce_samples",
    "sums_on",
]

BACKENDS = ("auto", "triton", "reference")


def prepare(
    backend: str,
    rule: Rule,
    device: torch.device,
    entries: Sequence[Entries],
    apart: bool = False,
    measures: bool = False,
) -> Executor:
    """Prepare entries of one device for a backend that ``choose`` has named.

    Args:
        backend: the name.
        rule: the update.
        device: where the tensors live.
        entries: what to update.
        apart: whether no two of the tensors are known to reach into each other's memory.
        measures: whether some of the updates are measured.
    """
    if backend == "triton":
        from .triton import TritonExecutor

        return TritonExecutor(rule, device, entries, apart, measures)
    from .reference import ReferenceExecutor

    return ReferenceExecutor(rule, device, entries, measures)


def coefficients_on(
    backend: str, table: LiveTable, counts: Sequence[Tensor]
) -> Coefficients | None:
    """Return what forms the rows of a table by one launch; None where PyTorch is to form them.

    Args:
        backend: the name.
        table: the rows.
        counts: for each tensor, its count of steps on the device; nothing where none are kept.
    """
    if backend != "triton" or not table.part_of:
        return None
    from .triton_coefficients import TritonCoefficients

    return TritonCoefficients(table, counts)


def reduce_samples(
    parameters: Sequence[Tensor], columns: Sequence[Sequence[Tensor]], requested: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """Reduce materialised per-sample gradients, in one launch for each mix of types.

    Args:
        parameters: whose shapes, orders of elements and devices the results have.
        columns: for each parameter its samples, ``[batch, *param.shape]``, in one tensor or more.
        requested: name of a backend.

    Returns:
        Sums over samples, and sums over samples of squares, in float32; in float64 where the
        samples or the parameter are.
    """
    from . import reference

    sums: list[Tensor] = [torch.empty(0)] * len(parameters)
    squares = list(sums)
    rest: dict[torch.device, list[int]] = {}
    for i, p in enumerate(parameters):
        if choose(p.device, requested)[0] == "triton" and p.numel() and not p.is_complex():
            rest.setdefault(p.device, []).append(i)
        else:
            sums[i], squares[i] = reference.reduce_samples(p, columns[i])
    for device, chosen in rest.items():
        from .triton_samples import reduce_samples as reduce_by_kernel

        own = reduce_by_kernel(
            device, [parameters[i] for i in chosen], [columns[i] for i in chosen]
        )
        for i, total, square in zip(chosen, *own, strict=True):
            sums[i], squares[i] = total, square
    return sums, squares


def sums_on(device: torch.device, requested: str = "auto") -> Sums:
    """Return what adds gradients to sums on a device, in one launch for each mix of types.

    Args:
        device: of all tensors.
        requested: name of a backend.
    """
    if choose(device, requested)[0] == "triton":
        from .triton_accumulate import TritonSums

        return TritonSums(device)
    from .reference import ReferenceSums

    return ReferenceSums()


def check_name(requested: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}")


def choose(device: torch.device | str, requested: str = "auto") -> tuple[str, str]:
    """Choose the backend for tensors on ``device``.

    Args:
        device: where parameters live.
        requested: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        The backend's name, and one sentence that says why.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if Triton is asked for and cannot run there.
    """
    check_name(requested)
    device = torch.device(device)
    if requested == "reference":
        return "reference", "asked for"
    available, reason = _triton_runs_on(device)
    if requested == "triton" and not available:
        raise RuntimeError(
            f'backend="triton" cannot update tensors on {device}: {reason}. Use backend="auto",'
            " move the parameters to a GPU, or set TRITON_INTERPRET=1 before the import of"
            " fusedopt to run the kernels on the CPU (slowly)"
        )
    return ("triton" if available else "reference"), reason


def _triton_runs_on(device: torch.device) -> tuple[bool, str]:
    from ..kernels import lang

    if lang.triton is None:
        return False, str(lang.MISSING)
    if lang.INTERPRETED:
        if device.type == "cpu":
            return True, "TRITON_INTERPRET=1 runs the kernels on the CPU"
        return False, "TRITON_INTERPRET=1 runs the kernels on the CPU alone"
    if device.type == "cpu":
        return False, "the tensors are on the CPU, which Triton does not compile for"
    if device.type not in ("cuda", "xpu"):
        return False, f"Triton has no backend for {device.type} tensors"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return False, f"Triton needs compute capability 7.0, the GPU has {major}.{minor}"
    return True, f"the tensors are on a GPU ({device.type}) that Triton compiles for"
