"""The variants of the norm kernels, and of the one that adds up what telemetry has measured."""

from __future__ import annotations

from collections.abc import Iterator

from .. import guard, norms, telemetry
from ..codecs import compute_type
from .update import TABLE
from .variant import DTYPES, Budget, Variant, alignment_suffix, element_type

_FACTOR = {
    "partials": "*fp64",
    "count": "i32",
    "inverse_scale": "*fp64",
    "max_norm": "*fp64",
    "control": "*fp64",
    "norm": "*fp32",
}


def variants() -> Iterator[Variant]:
    """Both stages, the second with a guard and without, with either norm; and telemetry's."""
    for infinity_norm in (False, True):
        for dtype in DTYPES:
            yield partial_norms(dtype, infinity_norm)
        yield partial_norms("fp32", infinity_norm, aligned=False)
        yield clip_factor(infinity_norm)
        yield guarded_factor(infinity_norm)
    for dtype in ("fp32", "fp64"):
        yield add_up(dtype)


def partial_norms(dtype: str, infinity_norm: bool, aligned: bool = True) -> Variant:
    """Stage 1 of the norm, which reads each gradient once."""
    kind = element_type(dtype)
    form = "inf" if infinity_norm else "2"
    return Variant(
        name=f"partial_norms ({form}) {dtype}{alignment_suffix(aligned)}",
        kernel=norms.partial_norms,
        arguments={
            **TABLE,
            "inverse_scale": "*fp64",
            "partials": "*fp64",
        },
        constants=norms.partial_norms_constants(
            kind, compute_type((kind,)), aligned, infinity_norm
        ),
        threads=norms.NORM_THREADS,
        block=norms.NORM_BLOCK,
        budget=Budget(bytes_per_element=DTYPES[dtype] if aligned else None),
    )


def clip_factor(infinity_norm: bool) -> Variant:
    """Stage 2 of the norm, one program."""
    return Variant(
        name=f"clip_factor ({'inf' if infinity_norm else '2'})",
        kernel=norms.clip_factor,
        arguments=_FACTOR,
        constants=norms.clip_factor_constants(infinity_norm),
        threads=norms.REDUCE_THREADS,
        block=norms.REDUCE_BLOCK,
    )


def guarded_factor(infinity_norm: bool) -> Variant:
    """Stage 2 of the norm with the decision of a guard, one program."""
    return Variant(
        name=f"guarded_factor ({'inf' if infinity_norm else '2'})",
        kernel=guard.guarded_factor,
        arguments={
            **_FACTOR,
            "record": "*fp64",
            "window": "i32",
            "min_steps": "i32",
            "scaled": "i32",
        },
        constants=guard.guarded_factor_constants(infinity_norm),
        threads=norms.REDUCE_THREADS,
        block=norms.REDUCE_BLOCK,
    )


def add_up(dtype: str) -> Variant:
    """What telemetry's partial sums are added up by, one program a tensor."""
    return Variant(
        name=f"add_up {dtype}",
        kernel=telemetry.add_up,
        arguments={"sums": f"*{dtype}", "first": "*i64", "totals": "*fp64"},
        constants=telemetry.add_up_constants(),
        threads=telemetry.THREADS,
        block=telemetry.BLOCK,
    )
