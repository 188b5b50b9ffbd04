"""How far results may lie apart, in one table, and the comparisons that use it.

Distances are counted in ulps: units in the last place of the type that the value is *stored* in,
at the size of the largest of the value expected, the value before, and the update between them.
An update that cancels most of the old value is thus measured against what was cancelled, which
is where its rounding comes from, and not against the small remainder.

Every comparison is handed the value *before* as well, and demands that a kernel that did nothing
would have failed it: a tolerance wider than the update lets everything pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusedopt.testing import STEP, TRAJECTORY, Tolerance, distance, ulp

__all__ = ["STEP", "TRAJECTORY", "Tolerance", "assert_close_ulps", "distance", "ulp"]


# The device function's formula against the twin's, both in float64: 1e-13 relative. Wider than
# STEP so that no order of operations matters, and far below any slip in the formula, even below a
# coefficient that went through float32.
FORMULA = Tolerance(450, "1e-13 / 2^-52")

# Arithmetic in the storage type, with a rounding at every operation as torch.optim does it on
# bfloat16 and float16 parameters, against one rounding a step: the distance between the ends of
# two trajectories as a share of the way that they went. AdamW is the worst: its decay of 0.1 % a
# step is less than half an ulp, and torch, which rounds the decayed parameter, never decays.
EVERY_OPERATION_ROUNDED: Mapping[torch.dtype, float] = {
    torch.bfloat16: 0.15,
    torch.float16: 0.05,
}


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _size(tensor: Tensor) -> Tensor:
    """Magnitudes in float64, 0 for what is not finite."""
    return tensor.double().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def assert_close_ulps(
    actual: Tensor,
    expected: Tensor,
    before: Tensor | None,
    tolerance: Tolerance,
    name: str,
    *,
    scale: Tensor | None = None,
    moved: float = 0.5,
) -> None:
    """Assert that two tensors agree, and that ``before`` in the place of ``actual`` would not.

    Args:
        actual: what is tested.
        expected: of the same shape and type.
        before: what the tensor held before the update, or None where there was nothing.
        tolerance: an entry of a table above.
        name: the parameter or state, for the message.
        scale: largest magnitude that each element (real and imaginary part apart) had on its way,
            where that was long: rounding of a large value stays when the value has become small.
        moved: the share of elements at least for which ``before`` must fail.
    """
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    actual, expected = _real(actual.detach()), _real(expected.detach())
    size = _size(expected) if scale is None else torch.maximum(_size(expected), _size(scale))
    if before is not None:
        before = _real(before.detach())
        step = _size(expected.double() - before.double())
        size = torch.maximum(size, torch.maximum(_size(before), step))
    apart = distance(actual, expected, size)
    if apart.numel() == 0:
        return
    if apart.max() > tolerance.ulps:
        raise AssertionError(_report(actual, expected, before, apart, tolerance, name))
    if before is not None:
        caught = (distance(before, expected, size) > tolerance.ulps).double().mean()
        assert caught >= moved, (
            f"{name}: leaving it unchanged would pass for {1 - caught:.0%} of the elements:"
            f" the update is too small for a tolerance of {tolerance.ulps} ulps"
        )


def _report(
    actual: Tensor,
    expected: Tensor,
    before: Tensor | None,
    apart: Tensor,
    tolerance: Tolerance,
    name: str,
) -> str:
    worst = int(apart.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), apart.shape))
    values = [f"got {actual[index].item()!r}", f"expected {expected[index].item()!r}"]
    if before is not None:
        values.append(f"before {before[index].item()!r}")
    bad = int((apart > tolerance.ulps).sum())
    return (
        f"{name}{list(index)}: {', '.join(values)}: {apart[index].item():.3g} ulps of"
        f" {expected.dtype}, allowed {tolerance.ulps} ({tolerance.reason});"
        f" {bad} of {apart.numel()} elements are beyond"
    )


def assert_equal(actual: Tensor, expected: Tensor, before: Tensor | None, name: str) -> None:
    """Assert equal values, nan for nan, and that ``before`` differs from them somewhere."""
    exact = Tolerance(0, "the same operations in the same order")
    numel = max(expected.numel(), 1)
    assert_close_ulps(actual, expected, before, exact, name, moved=min(1.0, 0.5 / numel))


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of the elements, in logical order."""
    real = _real(tensor.detach()).contiguous()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return real.view(integers[real.element_size()])


def assert_untouched(actual: Tensor, before: Tensor, name: str) -> None:
    """Assert that no bit has changed, of a nan neither."""
    changed = bits(actual) != bits(before)
    assert not changed.any(), f"{name}: {int(changed.sum())} of {changed.numel()} elements changed"


def assert_travelled_alike(actual: Tensor, expected: Tensor, start: Tensor, name: str) -> None:
    """Compare the ends of two trajectories by the share of the way that they went.

    Standing still has a distance of 100 %.
    """
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    allowed = EVERY_OPERATION_ROUNDED[expected.dtype]
    a, e, s = actual.detach().double(), expected.detach().double(), start.detach().double()
    share = ((a - e).norm() / (e - s).norm()).item()
    assert share <= allowed, f"{name}: {share:.1%} of the way apart, allowed {allowed:.1%}"
