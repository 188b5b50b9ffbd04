"""Pairs of what rides along: each two meet in some run, on both backends, or are refused by name.

What must change nothing (telemetry, an average, a guard that skips nothing, a bound of infinity)
and what must be as if it had not been (a step that a guard or a loss scaler leaves out, a loss
scale, a file in the middle, gradients released in backward) is left out of a second run: all bits
are the same. Catches a feature that another one switches off, counts twice, or reads too late.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import FlagOnDevice
from format_cases import bits_of
from formats_by_hand import HALF_UNIT, joined
from marks import numpy_may_warn
from pairwise import covering, pairs_of
from riding import BESIDE, DTYPES, RULES, states_of
from torch import Tensor, nn

import fusedopt

# Type of the parameter, what is kept beside it, states.
FORMATS = {
    "fp32": ("fp32", "nearest", "None"), "int8": ("fp32", "nearest", "int8"),
    "mixed": ("fp32", "nearest", "mixed"), "bf16": ("bf16", "nearest", "None"),
    "stochastic": ("bf16", "stochastic", "fp8"), "kahan": ("fp16", "kahan", "bfloat16"),
    "remainder": ("bf16", "remainder", "None"),
    "remainder8": ("bf16", "remainder8-stochastic", "int8"),
    "float32": ("fp16", "float32", "float16"),
}  # fmt: skip
FACTORS: dict[str, list[Any]] = {
    "rule": list(RULES), "format": list(FORMATS), "clip": ["no", "0.75", "inf"],
    "guard": ["no", "never", "skips"], "average": ["no", "fp32", "bf16"], "telemetry": [0, 1, 2],
    "cautious": ["no", "yes"], "amp": ["no", "scaled", "skipped", "skipped-on-device"],
    "capturable": ["no", "yes"], "release": ["no", "yes"], "file": ["no", "yes"],
}  # fmt: skip
# The interpreter takes up to a second for a step of codes: it has each rule and way of keeping
# numbers, and the reference the rest.
FACTORS_OF = {
    "reference": FACTORS,
    "triton": {**FACTORS, "format": ["fp32", "stochastic", "kahan", "remainder8"]},
}
CAUTIOUS = ("sgd", "adam", "adamw", "batch", "adam_c")
SHAPES = ((2, 75), (9,))
SPIKE, SCALE, DECAY = 100.0, 8.0, 0.75


def _cautious(rule: str) -> Callable[[], Any]:
    name, numbers, other = RULES[rule]
    make = getattr(fusedopt, name)
    return lambda: make(Model("fp32").params, **numbers, **other, cautious_weight_decay=True)


def _released(rule: str = "adamw", step: bool = False, **options: Any) -> Callable[[], Any]:
    def run() -> None:
        case = {name: values[0] for name, values in FACTORS.items()}
        made = Run({**case, "rule": rule, **options}, "reference")
        fusedopt.gradient_release(made.model, made.optimizer)
        made.step(0)

    return run


# What is refused: values of two factors, the error, and its words.
REFUSED: dict[tuple[Any, ...], tuple[Callable[[], Any], type[Exception], str]] = {
    **{
        (("cautious", "yes"), ("rule", rule)): (
            _cautious(rule), TypeError, rf"{RULES[rule][0]}.* unexpected .*cautious_weight_decay",
        )
        for rule in RULES
        if rule not in CAUTIOUS
    },
    **{
        (("clip", bound), ("release", "yes")): (
            _released(clip=bound), ValueError, r'clip=GlobalNorm needs.*clip="previous"',
        )
        for bound in ("0.75", "inf")
    },
    **{
        (("guard", kind), ("release", "yes")): (
            _released(guard=kind), ValueError, "guard=SpikeGuard decides.*pass guard=None",
        )
        for kind in ("never", "skips")
    },
    **{
        (("amp", kind), ("release", "yes")): (
            _released(amp=kind), RuntimeError, "GradScaler decides.*Leave the scaler out",
        )
        for kind in ("scaled", "skipped", "skipped-on-device")
    },
    (("release", "yes"), ("rule", "batch")): (
        _released("batch"), ValueError, r"GradSampleSquares.*PerSampleSquares\(model\) has",
    ),
}  # fmt: skip


def sound(case: dict[str, Any]) -> bool:
    return not any(pair in REFUSED for pair in pairs_of(case))


CASES = {backend: covering(factors, sound) for backend, factors in FACTORS_OF.items()}
RUNS = [(backend, case) for backend, cases in CASES.items() for case in cases]


class Model(nn.Module):
    """Parameters whose gradients are what is asked for, to the bit."""

    def __init__(self, dtype: str, shapes: Any = SHAPES) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(5)
        self.params = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=drawn).to(DTYPES[dtype])) for shape in shapes
        )

    def backward(self, gradients: list[Tensor]) -> None:
        sum((p * g).sum() for p, g in zip(self.params, gradients, strict=True)).backward()


def without(case: dict[str, Any]) -> dict[str, Any]:
    """The case without what must change nothing."""
    plain = {name: FACTORS[name][0] for name in ("guard", "average", "telemetry", "release")}
    plain |= {"file": "no", "amp": "no"}
    if case["clip"] == "inf":
        plain["clip"] = "no"
    if case["amp"] == "skipped-on-device":
        # Where the flag is, counts are, too.
        plain["capturable"] = "yes"
    return {**case, **plain}


class Run:
    """A case on one backend."""

    def __init__(self, case: dict[str, Any], backend: str) -> None:
        self.case, self.backend = case, backend
        self.dtype, self.beside, self.states = FORMATS[case["format"]]
        self.shapes = SHAPES[:1] if self.states in ("int8", "fp8") else SHAPES
        self.model = Model(self.dtype, self.shapes)
        self.optimizer = self._make(self.model)
        self.start = [joined(p, {}) for p in self.model.params]
        # Of which steps this telemetry knows: their gradients' norms, or None for one left out.
        self.known: list[list[float] | None] = []
        self.averages: list[Tensor] = []

    def _make(self, model: Model) -> Any:
        case = self.case
        name, numbers, other = RULES[case["rule"]]
        options: dict[str, Any] = {
            **numbers, **other, **BESIDE[self.beside], "backend": self.backend,
            "state_dtype": states_of(case["rule"], self.states),
            "capturable": case["capturable"] == "yes",
        }  # fmt: skip
        if case["cautious"] == "yes":
            options["cautious_weight_decay"] = True
            if case["rule"] == "adam":
                options["decoupled_weight_decay"] = True
        if case["clip"] != "no":
            options["clip"] = fusedopt.GlobalNorm(float(case["clip"]))
        if case["guard"] != "no":
            bound = 6.0 if case["guard"] == "skips" else 1e30
            options["guard"] = fusedopt.SpikeGuard(bound, 4, 2)
        if case["average"] != "no":
            types = {"fp32": torch.float32, "bf16": torch.bfloat16}
            options["average"] = fusedopt.WeightAverage(DECAY, types[case["average"]])
        if case["telemetry"]:
            options["telemetry"] = fusedopt.Telemetry(case["telemetry"])
        if case["rule"] == "batch":
            options["statistics"] = fusedopt.GradSampleSquares()
        return getattr(fusedopt, name)(model.params, **options)

    def run(self, steps: int) -> Run:
        """Take steps, and before the last one what must leave no trace."""
        if self.case["release"] == "yes":
            fusedopt.gradient_release(self.model, self.optimizer)
        for number in range(steps):
            if number == steps - 1:
                if self.case["file"] == "yes":
                    self._through_a_file()
                if self.case["guard"] == "skips":
                    self._leaves_no_trace(SPIKE, 0.0)
                if self.case["amp"].startswith("skipped"):
                    self._leaves_no_trace(math.inf, 1.0)
            self.step(number)
            self._follow()
        return self

    def step(self, number: int, factor: float = 1.0, found: float = 0.0) -> None:
        drawn = torch.Generator().manual_seed(number)
        amp = self.case["amp"]
        scale = SCALE if amp != "no" else 1.0
        # A loss scale that is a power of 2 changes no bit of a gradient.
        gradients = []
        self.optimizer.zero_grad()
        for p in self.model.params:
            samples = torch.randn((4, *p.shape), generator=drawn).to(p.dtype)
            gradients.append(samples.mean(0) * (scale * factor))
            if self.case["rule"] == "batch":
                p.grad_sample = samples * (scale * factor)
        self.model.backward(gradients)
        if amp != "no":
            flag = FlagOnDevice if amp == "skipped-on-device" else Tensor
            self.optimizer.grad_scale = torch.tensor(scale).as_subclass(flag)
            self.optimizer.found_inf = torch.tensor(found).as_subclass(flag)
        self.optimizer.step()
        norms = [float(g.double().norm() / scale) for g in gradients]
        taken = (found, factor) == (0.0, 1.0)
        # What the host knows to come to nothing is not counted.
        hidden = amp == "skipped-on-device" or (found == 0.0 and self.case["capturable"] == "yes")
        if taken or hidden:
            self.known.append(norms if taken else None)

    def _follow(self) -> None:
        """Average in float64 what the parameters are."""
        now = [joined(p, self.optimizer.state.get(p, {})) for p in self.model.params]
        before = self.averages or now
        self.averages = [DECAY * a + (1 - DECAY) * p for a, p in zip(before, now, strict=True)]

    def _leaves_no_trace(self, factor: float, found: float) -> None:
        before = bits_of(self.optimizer)
        self.step(7, factor, found)
        assert_same(before, bits_of(self.optimizer))

    def _through_a_file(self) -> None:
        model, old = Model(self.dtype, self.shapes), self.optimizer
        if old.gradient_release is not None:
            old.gradient_release.remove()
        model.load_state_dict(self.model.state_dict())
        self.model, self.optimizer = model, self._make(model)
        self.optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
        self.known = []
        if self.case["release"] == "yes":
            fusedopt.gradient_release(model, self.optimizer)

    def check_what_rides(self) -> None:
        """What rides along is there, and is what it is to be."""
        optimizer, case = self.optimizer, self.case
        if case["guard"] != "no":
            assert optimizer.guard.skipped == (case["guard"] == "skips")
        if case["telemetry"]:
            self._check_norms()
        if case["average"] != "no":
            self._check_averages()

    def _check_norms(self) -> None:
        """The latest that was measured and taken; nan where there is none."""
        norms = self.optimizer.telemetry.norms.double()
        assert norms.shape == (len(self.start), 3)
        measured = self.known[:: self.case["telemetry"]]
        taken = [own for own in measured if own is not None]
        if not taken:
            assert norms.isnan().all()
            return
        torch.testing.assert_close(norms[:, 0].tolist(), taken[-1], rtol=1e-3, atol=0)
        assert (norms[:, 2] > 0).all()
        if measured[-1] is self.known[-1]:
            now = [joined(p, self.optimizer.state[p]).norm() for p in self.model.params]
            torch.testing.assert_close(norms[:, 1], torch.stack(now), rtol=0.01, atol=0)

    def _check_averages(self) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.case["average"]]
        for p, wanted in zip(self.model.params, self.averages, strict=True):
            found = self.optimizer.state[p]["ema"]
            assert found.dtype == dtype
            unit = 4 * max(HALF_UNIT[p.dtype], HALF_UNIT[dtype]) * wanted.abs().amax()
            assert (found.double() - wanted).abs().amax() <= unit


Bits = list[tuple[Tensor, dict[str, Any]]]


def assert_same(full: Bits, bare: Bits) -> None:
    """Equal in all bits; what there is of an average alone is in neither, or in the first."""
    for i, ((p, one), (q, other)) in enumerate(zip(full, bare, strict=True)):
        assert torch.equal(p, q), f"parameter {i}: {int((p != q).sum())} of {p.numel()}"
        assert one.keys() - other.keys() <= {"ema", "step"} and other.keys() <= one.keys()
        for name, (dtype, value) in other.items():
            assert dtype == one[name][0] and torch.equal(value, one[name][1]), (i, name)


@pytest.mark.parametrize("backend", CASES)
def test_each_pair_is_in_a_case_or_refused(backend: str) -> None:
    factors, seen = FACTORS_OF[backend], set().union(*map(pairs_of, CASES[backend]))
    for a, b in itertools.combinations(sorted(factors), 2):
        for x, y in itertools.product(factors[a], factors[b]):
            pair = (a, x), (b, y)
            # The error is tried below.
            assert (pair in seen) != (pair in REFUSED), pair
    assert len(CASES[backend]) < 100


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(str(value[name]) for name in FACTORS)


@numpy_may_warn
@pytest.mark.parametrize(("backend", "case"), RUNS, ids=_name)
def test_a_case(backend: str, case: dict[str, Any]) -> None:
    # A guard decides by two norms at least.
    steps = 3 if case["guard"] == "skips" else 2
    full, bare = (Run(own, backend).run(steps) for own in (case, without(case)))
    assert_same(bits_of(full.optimizer), bits_of(bare.optimizer))
    full.check_what_rides()
    if backend == "triton":
        assert_close(Run(without(case), "reference").run(steps), bare)


def assert_close(reference: Run, kernels: Run) -> None:
    """As of tests/formats/test_pairs.py: a code that turned is a seventh of a state of 8 bits."""
    for i, start in enumerate(reference.start):
        params = [run.model.params[i] for run in (reference, kernels)]
        states = [
            run.optimizer.state.get(p, {})
            for run, p in zip((reference, kernels), params, strict=True)
        ]
        a, b = map(joined, params, states)
        way = (a - start).abs().amax()
        unit = 2 * HALF_UNIT[params[0].dtype] * a.abs()
        assert way > 0
        assert ((a - b).abs() <= 2 * unit + 0.15 * way).all()
        assert ((a - b).abs() > 1e-5 * way).double().mean() < 0.1


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: "-".join(f"{n}={v}" for n, v in pair))
def test_what_is_refused(pair: Any) -> None:
    run, error, message = REFUSED[pair]
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("guard", fusedopt.SpikeGuard),
        ("telemetry", fusedopt.Telemetry),
        ("average", fusedopt.WeightAverage),
    ],
)
def test_what_one_optimizer_has_another_may_have_afterwards(role: str, kind: type) -> None:
    """Catches a part that two have, and one that nobody can have who has not had it first."""
    part = kind()
    one, other = (fusedopt.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(2))
    setattr(one, role, part)
    with pytest.raises(ValueError, match=f"{role} is one optimizer's: make a {kind.__name__}"):
        setattr(other, role, part)
    setattr(one, role, None)
    setattr(other, role, part)
    assert getattr(other, role) is part and getattr(one, role) is None
    with pytest.raises(ValueError, match="one optimizer's"):
        setattr(one, role, part)
