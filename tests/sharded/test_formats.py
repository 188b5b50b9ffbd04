"""Compressed states of sharded parameters: to the bit those of one process, given its gradients.

Where groups of 8-bit codes are not those of one process, by ``OTHERS`` below, states are within the
rounding of the code instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from contract import assert_same_bits
from kept_shards import ALONE, FORMATS, Parameters, build, own, train
from ranks import in_worlds
from sharded import everything, world
from torch import Tensor

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WORLDS = (2, 4)
# Of each layout and number of processes, whose groups are not those of one process. Columns are cut
# between groups where a process has 128 of them.
COLUMNS = ("odd rows", "few rows", "short rows")
OTHERS: Mapping[tuple[str, int], tuple[str, ...]] = {
    ("rows", 2): ALONE,
    ("hsdp", 2): ALONE,
    ("replicas", 2): (),
    ("columns", 2): COLUMNS,
    ("rows", 4): ALONE,
    ("hsdp", 4): ALONE,
    ("fsdp+rows", 4): ALONE,
    ("columns", 4): ("rows", *COLUMNS),
    ("fsdp+columns", 4): (*ALONE, *COLUMNS),
}
# Of squares of errors over squares of values, after all steps.
POWER_BOUND, FLOAT8_BOUND = 8e-4, 7e-3
STEPS = 3
# In Triton's interpreter, for seconds each.
KERNELS = (("columns", 2),)
CLIPPED = ("int8, stochastic", "remainder8, fp8")


def _made(
    layout: str, format: str, clipped: bool = False, backend: str = "reference"
) -> tuple[Parameters, Any]:
    model = build(layout)
    # Of order infinity: sums of squares are rounded otherwise in another order.
    clip = fusedopt.GlobalNorm(0.5, norm_type=float("inf")) if clipped else None
    optimizer = fusedopt.AdamW(
        model.named_parameters(),
        lr=0.05,
        weight_decay=0.1,
        clip=clip,
        backend=backend,
        **FORMATS[format],
    )
    return model, optimizer


def _numbers(model: Parameters, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Return what this process has of parameters, what is beside them, and decoded states."""
    exported = fusedopt.export_state_dict(optimizer)["state"]
    found = {}
    for i, (name, p) in enumerate(model.own().items()):
        beside = {n: optimizer.state[p].get(n) for n in ("master", "compensation")}
        kept = {"parameter": p.detach(), **exported[i], **beside}
        found[name] = {key: own(x) for key, x in kept.items() if x is not None}
    return found


@cache
def _plain(format: str, clipped: bool) -> dict[str, dict[str, Tensor]]:
    """The numbers of one process that has all, which no layout changes."""
    model, optimizer = _made("plain", format, clipped)
    train(model, optimizer, range(STEPS))
    return _numbers(model, optimizer)


def _compare(layout: str, format: str, clipped: bool) -> None:
    found = _made(layout, format, clipped)
    train(*found, range(STEPS))
    places = {name: p.places for name, p in found[0].own().items()}
    ours, whole = _numbers(*found), _plain(format, clipped)
    coded = "state_dtype" in FORMATS[format] and format != "kahan"
    for name, values in whole.items():
        other = coded and name in OTHERS[layout, world()]
        mine = {key: x if key == "step" else x.flatten()[places[name]] for key, x in values.items()}
        if not other:
            assert_same_bits(ours[name], mine, name)
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            error = (ours[name][key] - mine[key]).square().sum() / values[key].square().sum()
            bound = FLOAT8_BOUND if "fp8" in format else POWER_BOUND
            assert error <= bound, f"{name}, {key}: {error}"


def _scales(layout: str) -> None:
    """A scale for each 128 elements of what is here of a row; where parts differ, for each one."""
    model, optimizer = _made(layout, "int8")
    train(model, optimizer, range(1))
    for name, p in model.own().items():
        here, scale = own(p.detach()), own(optimizer.state[p]["exp_avg_scale"])
        row = here.shape[-1]
        uneven = (layout, world(), name) == ("columns", 4, "few rows")
        if uneven or (name == "vector" and name in OTHERS[layout, world()]):
            assert scale.numel() == here.numel(), name
        elif name not in ALONE:
            assert scale.numel() == here.numel() // row * -(-row // 128), name


def _kernels(layout: str) -> None:
    """The update kernel, which walks rows by the same table, against the reference."""
    for format in ("int8, stochastic", "fp8"):
        ends = []
        for backend in ("triton", "reference"):
            model = build(layout)
            # Exact in any order of operations.
            optimizer = fusedopt.SGD(
                model.parameters(), lr=0.125, momentum=0.5, backend=backend, **FORMATS[format]
            )
            train(model, optimizer, range(2))
            ends.append(everything(model, optimizer))
        assert_same_bits(*ends, f"{layout}, {format}")


def _all(stop: int) -> None:
    for (layout, count), _ in OTHERS.items():
        if count != world():
            continue
        _scales(layout)
        if (layout, count) in KERNELS:
            _kernels(layout)
        for format in FORMATS:
            for clipped in (False, True) if format in CLIPPED else (False,):
                try:
                    _compare(layout, format, clipped)
                except BaseException as error:
                    error.add_note(f"{layout}, {format}, {clipped=}, {count} processes")
                    raise


def test_as_in_one_process(tmp_path: Path) -> None:
    # Catches random bits by place in the shard, groups that reach over a border, scales of another
    # row, replicas that draw for themselves.
    in_worlds(WORLDS, tmp_path, _all)
