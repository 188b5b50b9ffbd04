"""The pairs of codes that are compared."""

from __future__ import annotations

import torch

from .eight_bits import (
    Exact,
    Expanded,
    Pair,
    Shipped,
    Table,
    bfloat16,
    dynamic,
    float8,
    logarithmic,
    power,
    softsign,
)
from .minifloat import Minifloat

# int8 and fp8, as the optimizers have them.
M_INT8, V_INT8 = Shipped("signed", True, 127), Shipped("unsigned", False, 255)
M_FP8, V_FP8 = Shipped("float8", True, 126), Shipped("positive float8", False, 126)
M34, V44 = Minifloat(3, 4, True), Minifloat(4, 4, False)
# Scales of a group of 128 in float32, for both states.
BYTES = 2 + 2 * 4 / 128


def _power(m: int, v: int, root: bool = True) -> Pair:
    codes = (
        Table(power(127, m), True, root=m if root else 1),
        Table(power(255, v), False, root=v if root else 1),
    )
    where = "" if root else ", midpoints of values"
    return Pair(f"power code, m 1/{m}, v 1/{v}{where}", *codes, BYTES)


def _exact(title: str, codes: tuple, m: str, v: str) -> Pair:
    how = m if m == v else f"m {m}, v {v}"
    return Pair(f"{title}, {how}", Exact(codes[0], m), Exact(codes[1], v), BYTES)


def pairs() -> dict[str, Pair]:
    """Return new ones by name; random bits begin anew."""
    e4m3, e5m2 = float8(torch.float8_e4m3fn), float8(torch.float8_e5m2)
    int8, small, fp8 = (M_INT8, V_INT8), (M34, V44), (M_FP8, V_FP8)
    names = "power code in bits", "minifloat, m E3M4, v E4M4", "e4m3"
    return {
        "bfloat16": Pair("bfloat16", bfloat16, bfloat16, 4.0),
        "softsign, zero": Pair(
            "softsign m, sqrt v, groups of 32, fp16 scales",
            Table(softsign(127), True, group=32, scale=torch.float16),
            Table(power(255, 1), False, group=32, zero=True, scale=torch.float16, form=2),
            2.125,
        ),
        "softsign": Pair(
            "the same, v > 0 never 0, fp32 scales",
            Table(softsign(127), True, group=32),
            Table(power(255, 1), False, group=32, form=2),
            2.25,
        ),
        "dynamic": Pair(
            "dynamic map, groups of 256",
            Table(dynamic(True), True, group=256),
            Table(dynamic(False), False, group=256, zero=True),
            2 + 2 * 4 / 256,
        ),
        "e4m3, zero": Pair(
            "e4m3, v > 0 may be 0, groups of 256",
            Table(e4m3, True, group=256),
            Table(e4m3, False, group=256, zero=True),
            2 + 2 * 4 / 256,
        ),
        "expanded": Pair("e4m3 with range expansion", Expanded(True), Expanded(False), 2.19),
        "power 2 4": _power(2, 4),
        "power 3 6": _power(3, 6),
        "power 3 6, value": _power(3, 6, root=False),
        "power 4 8": _power(4, 8),
        "logarithmic": Pair(
            "logarithmic, m 12 octaves, v 20",
            Table(logarithmic(127, 12), True),
            Table(logarithmic(255, 20), False),
            BYTES,
        ),
        "e4m3, root": Pair(
            "e4m3 of m and sqrt v", Table(e4m3, True), Table(e4m3, False, form=2), BYTES
        ),
        "e5m2": Pair("e5m2", Table(e5m2, True), Table(e5m2, False), BYTES),
        "e4m3": _exact(names[2], fp8, "nearest", "nearest"),
        "minifloat": _exact(names[1], small, "nearest", "nearest"),
        "bits": _exact(names[0], int8, "nearest", "nearest"),
        "joint": Pair(
            "m / sqrt v by softsign, nearest",
            Table(softsign(127), True),
            Exact(V_INT8),
            BYTES,
            True,
        ),
        "bits, random v": _exact(names[0], int8, "nearest", "random"),
        "bits, random": _exact(names[0], int8, "random", "random"),
        "bits, dither v": _exact(names[0], int8, "nearest", "dither"),
        "bits, dither": _exact(names[0], int8, "dither", "dither"),
        "minifloat, dither": _exact(names[1], small, "dither", "dither"),
        "e4m3, dither": _exact(names[2], fp8, "dither", "dither"),
        "e5m2, dither": Pair(
            "e5m2, dither", Table(e5m2, True, "dither"), Table(e5m2, False, "dither"), BYTES
        ),
        "joint, dither": Pair(
            "m / sqrt v by softsign, dither",
            Table(softsign(127), True, "dither"),
            Exact(V_INT8, "dither"),
            BYTES,
            True,
        ),
    }
