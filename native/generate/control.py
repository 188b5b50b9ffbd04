"""What a step takes from a loss scaler, made on the device: the library has no torch to do it."""

from __future__ import annotations

from fusedopt.kernels.aot import Variant
from fusedopt.kernels.lang import jit, tl


@jit
def load_scaler(
    grad_scale,  # int64: address of the loss scale, float32, or 0 for none
    found_inf,  # int64: address of the overflow flag, float32, or 0 for none
    inverse_scale,  # float64 [1], written with 1 / loss scale
    control,  # float64 [2], written with the same and with the flag
):
    """Form the control values of a step from a loss scale and an overflow flag."""
    # Addresses travel as integers, for the caller's need not be multiples of 16 as pointers must.
    inverse = tl.full((), 1.0, tl.float64)
    if grad_scale != 0:
        inverse = inverse / tl.load(grad_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
    skip = tl.full((), 0.0, tl.float64)
    if found_inf != 0:
        skip = tl.load(found_inf.to(tl.pointer_type(tl.float32))).to(tl.float64)
    tl.store(inverse_scale, inverse)
    tl.store(control, inverse)
    tl.store(control + 1, skip)


def variant() -> Variant:
    """The one variant of it; a program of one warp."""
    return Variant(
        name="load_scaler",
        kernel=load_scaler,
        arguments={
            "grad_scale": "i64",
            "found_inf": "i64",
            "inverse_scale": "*fp64",
            "control": "*fp64",
        },
        constants={},
        threads=32,
    )
