"""Pairs of features: each two of them meet in some case, on both backends.

A case is held against float64 step by step with the bounds of its formats, and kernel against
reference. Catches what works alone: a scale of a transposed parameter, an overflow that leaves a
code changed, clipping that is missed by a master, a group that takes another's format.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import FlagOnDevice
from dyadic import DYADIC_LOOPS, Dyadic
from format_cases import (
    RULES,
    assert_same_bits_of,
    bits_of,
    states_for,
)
from formats_by_hand import ARITHMETIC, HALF_UNIT, joined
from lockstep import Lockstep
from pairwise import covering, pairs_of
from torch import Tensor

import fusedopt

ALL_RULES = {**RULES, "own": ("Dyadic", {"lr": 0.125})}
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "nearest": {}, "stochastic": {"rounding": "stochastic"}, "kahan": {"rounding": "kahan"},
    "remainder": {"master": "remainder"}, "remainder8": {"master": "remainder8"},
    "remainder8-stochastic": {"master": "remainder8", "rounding": "stochastic"},
    "float32": {"master": "float32"},
}  # fmt: skip
LAYOUTS = {
    "rows": lambda: torch.randn(2, 150), "transposed": lambda: torch.randn(150, 2).t(),
    "channels_last": lambda: torch.randn(4, 3, 3, 5).to(memory_format=torch.channels_last),
    "slice": lambda: torch.randn(4, 300)[::2, ::2], "0-d": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4), "1": lambda: torch.randn(1),
    "127": lambda: torch.randn(127), "128": lambda: torch.randn(128),
    "129": lambda: torch.randn(129), "1025": lambda: torch.randn(1025),
    "inner": lambda: torch.randn(2, 3, 50),
}  # fmt: skip
FACTORS = {
    "rule": list(ALL_RULES), "dtype": list(DTYPES), "beside": list(BESIDE),
    "states": ["None", "float32", "bfloat16", "float16", "int8", "fp8", "mixed"],
    "clip": ["no", "yes"], "amp": ["no", "scaled", "skipped"], "capturable": ["no", "yes"],
    "layout": list(LAYOUTS), "groups": ["one", "several"],
}  # fmt: skip
MAX_NORM = 0.75


def sound(case: dict[str, Any]) -> bool:
    dtype, beside = case.get("dtype"), case.get("beside", "nearest")
    if beside.startswith("remainder"):
        return dtype in (None, "bf16")
    return beside == "nearest" or dtype in (None, "bf16", "fp16")


CASES = covering(FACTORS, sound)


def option_of(states: str, rule: str) -> Any:
    if states == "None":
        return None
    if states == "mixed" and rule == "own":
        return {"size": "int8"}
    return states_for(states, rule)


class Run:
    """A case on one backend: one or two parameters in groups of their own formats, in lockstep."""

    def __init__(self, case: dict[str, Any], backend: str) -> None:
        name, hyper = ALL_RULES[case["rule"]]
        self.case = case
        torch.manual_seed(7)
        formats = {
            "state_dtype": option_of(case["states"], case["rule"]),
            "rounding": None, "master": None, **BESIDE[case["beside"]],
        }  # fmt: skip
        wide = LAYOUTS[case["layout"]]()
        dtype = DTYPES[case["dtype"]]
        narrow = torch.empty_strided(wide.shape, wide.stride(), dtype=dtype).copy_(wide)
        if case["layout"] == "slice":
            narrow = torch.zeros(4, 300, dtype=dtype)[::2, ::2].copy_(wide)
        assert narrow.stride() == wide.stride()
        params, every = [torch.nn.Parameter(narrow)], [formats]
        if case["groups"] == "several":
            params.append(torch.nn.Parameter(torch.randn(3, 50).bfloat16()))
            codes = option_of("int8", case["rule"])
            every.append({"state_dtype": codes, "rounding": "stochastic", "master": None})
        sampled = name.startswith("BatchDecoupled")
        common: dict[str, Any] = {"backend": backend}
        if case["capturable"] == "yes":
            common["capturable"] = True
        if sampled:
            common |= {"statistics": fusedopt.GradSampleSquares(), "virtual_batch_size": 1}
        if case["clip"] == "yes":
            common["clip"] = fusedopt.GlobalNorm(MAX_NORM)
        groups = [{"params": [p], **f} for p, f in zip(params, every, strict=True)]
        make = Dyadic if name == "Dyadic" else getattr(fusedopt, name)
        self.optimizer = make(groups, **hyper, **common)
        self.pairs = [
            Lockstep(
                name, p, f, hyper, DYADIC_LOOPS, optimizer=self.optimizer,
                arithmetic=ARITHMETIC * (4 if case["clip"] == "yes" else 1),
            )
            for p, f in zip(params, every, strict=True)
        ]  # fmt: skip

    def step(self, number: int) -> None:
        scale = 1.0 if self.case["amp"] == "no" else 8.0
        generator = torch.Generator().manual_seed(number)
        drawn = [torch.randn(x.p.shape, generator=generator).to(x.p.dtype) for x in self.pairs]
        if self.case["amp"] == "skipped":
            self._skip(drawn)
        for pair, g in zip(self.pairs, drawn, strict=True):
            pair.give(g, scale)
        if self.case["amp"] != "no":
            self._scaler(scale, 0.0)
        self.optimizer.step()
        factor = 1.0
        if self.case["clip"] == "yes":
            norm = sum(pair.g.square().sum() for pair in self.pairs).sqrt()
            factor = min(1.0, float(MAX_NORM / (norm + 1e-6)))
        for pair in self.pairs:
            pair.follow(factor)

    def _scaler(self, scale: float, found: float, flag: type[Tensor] = Tensor) -> None:
        self.optimizer.grad_scale = torch.tensor(scale).as_subclass(flag)
        self.optimizer.found_inf = torch.tensor(found).as_subclass(flag)

    def _skip(self, drawn: list[Tensor]) -> None:
        """An overflow changes no bit, of codes, scales, masters and counts neither."""
        for flag in (torch.Tensor, FlagOnDevice):
            self._overflow(drawn, flag)

    def _overflow(self, drawn: list[Tensor], flag: type[Tensor]) -> None:
        """On the host, which does not launch, and on the device, where the kernel decides."""
        before = bits_of(self.optimizer)
        for pair, g in zip(self.pairs, drawn, strict=True):
            pair.give(g, 8.0)
            spoilt = pair.p.grad_sample if pair.sampled else pair.p.grad
            spoilt.view(-1)[:1] = torch.inf
        self._scaler(8.0, 1.0, flag)
        self.optimizer.step()
        assert_same_bits_of(before, self.optimizer)

    def values(self) -> list[Tensor]:
        return [joined(pair.p, pair.state) for pair in self.pairs]


def test_each_pair_is_in_a_case() -> None:
    # Catches a generator that leaves pairs out, or makes cases that are refused.
    seen = set().union(*map(pairs_of, CASES))
    wanted = set()
    for a in FACTORS:
        for b in FACTORS:
            for x in FACTORS[a]:
                for y in FACTORS[b]:
                    if a < b and sound({a: x, b: y}):
                        wanted.add(((a, x), (b, y)))
    assert seen == wanted and len(CASES) < 150
    assert all(case.keys() == FACTORS.keys() and sound(case) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(case.get, FACTORS)))
def test_a_case(case: dict[str, Any]) -> None:
    runs = [Run(case, backend) for backend in ("reference", "triton")]
    for number in range(2):
        for run in runs:
            run.step(number)
    if case["rule"] == "own" and case["clip"] == "no":
        assert_same_bits_of(*(run.optimizer for run in runs))
    for pair, a, b in zip(runs[0].pairs, *(run.values() for run in runs), strict=True):
        if not a.numel():
            continue
        way = (a - pair.start).abs().amax()
        assert way > 0
        unit = 2 * HALF_UNIT[pair.p.dtype] * a.abs()
        # A code that turned, at worst a seventh of a state of 8 bits, is that of an update.
        assert ((a - b).abs() <= 2 * unit + 0.15 * way).all()
        assert ((a - b).abs() > 1e-5 * way).double().mean() < 0.1
