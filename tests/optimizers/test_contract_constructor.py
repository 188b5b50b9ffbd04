"""Constructor: signatures, defaults, groups, states, names and errors are torch.optim's."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from contract import (
    BACKENDS,
    CASES,
    DEVICE,
    OWN,
    PLAIN,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    groups_of,
    ids,
    new_params,
    on_backends,
    set_gradients,
)
from torch import Tensor

import fusedopt
from fusedopt.formats import OPTIONS as PRECISION

# capturable is torch's own, accepted where torch does not have it as well.
COMMON = (
    "backend", "clip", "guard", "telemetry", "average", "state_dtype", "rounding", "master",
    "rounding_seed", "capturable",
)  # fmt: skip
WITH_SQUARES = ("statistics", "virtual_batch_size")
# Names of the public interface that are there from the start, and those that may follow.
CORE = {"SGD", "RMSprop", "Adam", "AdamW", "GlobalNorm", "Rule", "FusedOptimizer"}
LATER = {
    "BatchDecoupledAdam", "BatchDecoupledRMSprop", "PerSampleSquares", "MicroBatchSquares",
    "GradSampleSquares", "BackpackSquares", "SVAG", "scaling", "export_state_dict",
    "gradient_release", "GradientAccumulator", "AdamC", "Lion", "ScheduleFreeAdamW",
    "SpikeGuard", "Telemetry", "WeightAverage",
}  # fmt: skip


def _arguments(cls: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b


# Signature


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_signature_is_torchs(case: Case) -> None:
    """Catches a missing argument, another default, another order, a keyword made positional."""
    ours = [p for p in _arguments(case.ours) if p.kind is not inspect.Parameter.VAR_KEYWORD]
    torchs = _arguments(case.theirs)
    keyword = inspect.Parameter.KEYWORD_ONLY

    def place(arguments: list[inspect.Parameter]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in arguments if p.kind is not keyword]

    def named(arguments: list[inspect.Parameter]) -> dict[str, Any]:
        return {p.name: p.default for p in arguments if p.kind is keyword}

    assert place(ours) == place(torchs)
    # Rules that generalise a class add keywords of their own; torch's are all there.
    assert named(torchs).items() <= named(ours).items()


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_common_arguments_are_the_documented_ones(case: Case) -> None:
    kinds = {p.name: p.kind for p in _arguments(case.ours)}
    # Shown one by one, though handed on by **common.
    assert set(COMMON) <= set(kinds) and not set(WITH_SQUARES) & set(kinds)
    assert inspect.Parameter.VAR_KEYWORD not in kinds.values()
    base = [
        p.name
        for p in _arguments(fusedopt.FusedOptimizer)
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    assert set(base) == {*COMMON, *WITH_SQUARES}
    # For rules that take squares; others say so.
    for name in WITH_SQUARES:
        with pytest.raises(TypeError, match="per-sample squares"):
            case.ours([torch.nn.Parameter(torch.zeros(1))], **{name: 1})


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_positional_arguments_land_where_torch_puts_them(case: Case) -> None:
    values = {
        "lr": 0.25, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.125, "nesterov": True,
        "alpha": 0.75, "eps": 0.5, "centered": True, "capturable": False, "foreach": None,
        "maximize": True, "differentiable": False, "betas": (0.25, 0.5), "amsgrad": True,
    }  # fmt: skip
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [p.name for p in _arguments(case.theirs) if p.kind is not keyword][1:]
    arguments = [values[name] for name in names]
    ours, theirs = (cls(new_params(), *arguments) for cls in (case.ours, case.theirs))
    for name in names:
        assert _equal(ours.param_groups[0][name], theirs.param_groups[0][name]), name


def test_unknown_argument_is_a_type_error() -> None:
    """Catches ``**common`` swallowing a misspelt hyper-parameter."""
    for case in PLAIN:
        with pytest.raises(TypeError, match="learning_rate"):
            case.ours(new_params(), learning_rate=0.1)


# Groups and states


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_groups_are_torchs(case: Case) -> None:
    """Catches an option kept on ``self`` or under another name: checkpoints would not go over."""
    for options in ({}, case.options):
        ours, theirs = case.ours(new_params(), **options), case.theirs(new_params(), **options)
        (mine,), (torchs,) = ours.param_groups, theirs.param_groups
        own = {**OWN[case.theirs.__name__], **PRECISION}
        assert set(mine) == {*torchs, *own}
        assert set(ours.defaults) == {*theirs.defaults, *own}
        assert {key: mine[key] for key in own} == own
        for key in set(torchs) - {"params"}:
            assert _equal(mine[key], torchs[key]), key
            assert key not in theirs.defaults or _equal(ours.defaults[key], theirs.defaults[key])


@on_backends(CASES)
def test_states_are_torchs(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    assert not pair.ours.state, "torch makes states at the first step"
    pair.step()
    assert_same_state(pair.ours, pair.theirs)
    for p in groups_of(pair.ours):
        for key, value in pair.ours.state[p].items() if p in pair.ours.state else ():
            assert isinstance(value, Tensor), key


@pytest.mark.parametrize("case", [c for c in PLAIN if "SGD" not in c.name], ids=ids)
def test_states_take_the_parameters_layout(case: Case) -> None:
    weight = torch.randn(4, 3, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    p = torch.nn.Parameter(weight)
    optimizer = case.ours([p], backend="reference")
    set_gradients([p], 1)
    optimizer.step()
    averages = {k: v for k, v in optimizer.state[p].items() if k != "step"}
    assert averages
    assert all(v.stride() == p.stride() for v in averages.values())


def test_step_counts_follow_the_default_dtype() -> None:
    """torch: float32, which stops at 2^24, and float64 where that is the default."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        pair = Pair(PLAIN[2], dtype=torch.float64)
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs, 1e-12, 1e-12)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_repr_is_torchs(case: Case) -> None:
    ours, theirs = (cls(new_params(), **case.options) for cls in (case.ours, case.theirs))
    own = tuple(f"{option}: " for option in (*OWN[case.theirs.__name__], *PRECISION))
    lines = [line for line in repr(ours).splitlines() if not line.strip().startswith(own)]
    assert lines == repr(theirs).splitlines()


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_the_callers_group_is_adopted(case: Case) -> None:
    group: dict[str, Any] = {"params": new_params()}
    optimizer = case.ours([group])
    assert optimizer.param_groups[0] is group
    assert isinstance(group["params"], list)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_their_own_options(backend: str) -> None:
    """Catches options read from the first group, or from ``defaults``, for every group."""
    sgd, rmsprop, adam, adamw = PLAIN
    tables: list[tuple[Case, Any]] = [
        (sgd, ({}, {"lr": 0.02, "momentum": 0}, {"nesterov": True, "dampening": 0})),
        (rmsprop, ({}, {"centered": True, "alpha": 0.5}, {"momentum": 0.9, "eps": 0.1})),
        (adam, ({}, {"amsgrad": True, "lr": 0.01}, {"betas": (0.1, 0.2), "maximize": True})),
        (adamw, ({}, {"decoupled_weight_decay": False}, {"weight_decay": 0, "eps": 0.1})),
    ]
    for case, groups in tables:
        pair = Pair(case, groups=groups, backend=backend)
        pair.step(4)
        pair.check()


# Public names


def test_public_names() -> None:
    names = fusedopt.__all__
    assert len(set(names)) == len(names)
    assert CORE <= set(names) <= CORE | LATER
    assert all(hasattr(fusedopt, name) for name in names)
    namespace: dict[str, Any] = {}
    exec("from fusedopt import *", namespace)
    assert set(names) <= set(namespace)


def test_classes_are_torch_optimizers() -> None:
    """Schedulers, DCP and trainers ask with isinstance."""
    for case in PLAIN:
        assert issubclass(case.ours, torch.optim.Optimizer)
        assert issubclass(case.ours, fusedopt.FusedOptimizer)
        assert case.ours.__name__ == case.theirs.__name__


# Errors

NAN, INF = math.nan, math.inf
TWO = torch.tensor([0.1, 0.2])
HYPERS: dict[str, list[Any]] = {
    "lr": [-1e-3, -0.0, 0, NAN, INF, -INF, TWO, torch.tensor(-0.1), torch.tensor([[0.1]]), None],
    "weight_decay": [-1, -1e-9, 0, NAN, INF, None],
    "momentum": [-0.1, 0, 1.5, NAN],
    "dampening": [-1.0, 2.0, NAN],
    "alpha": [-0.1, 1.5, NAN],
    "eps": [-1e-8, 0, NAN, None],
    "betas": [
        (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (NAN, 0.9), (0.9, NAN), (0.0, 0.0),
        (0, 0.9), (0.9, 0), (0.9,), 0.9, None, [0.9, 0.99], (TWO, TWO),
        (torch.tensor(0.9), 0.99), (0.9, torch.tensor(0.99)), (torch.tensor(0.9),) * 2,
        (torch.tensor([0.9]),) * 2, (torch.tensor(1.5),) * 2,
    ],
}  # fmt: skip
COMBINATIONS: list[dict[str, Any]] = [
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"nesterov": True, "momentum": 0.9},
    {"nesterov": True, "momentum": -0.9},
]


def _outcome(cls: Any, arguments: dict[str, Any]) -> tuple[type | None, str]:
    try:
        cls(new_params(), **arguments)
    except Exception as error:
        return type(error), str(error)
    return None, ""


def _hyper_cases() -> list[Any]:
    rows = []
    for case in PLAIN:
        accepted = inspect.signature(case.theirs).parameters
        single = [{k: v} for k, values in HYPERS.items() if k in accepted for v in values]
        both = [c for c in COMBINATIONS if set(c) <= set(accepted)]
        for arguments in single + both:
            text = re.sub(r"\s+", "", f"{case.name}-{arguments}")
            rows.append(pytest.param(case, arguments, id=text))
    return rows


@pytest.mark.parametrize(("case", "arguments"), _hyper_cases())
def test_a_bad_hyper_parameter_raises_what_torch_raises(
    case: Case, arguments: dict[str, Any]
) -> None:
    """torch decides which values are bad: both ways, nothing else is refused or let through."""
    expected, _ = _outcome(case.theirs, arguments)
    got, message = _outcome(case.ours, arguments)
    assert got is expected, message
    if expected is ValueError:
        names = [*arguments, "nesterov", *arguments]
        assert any(name.split("_")[0] in message for name in names), message


def _bad_params() -> dict[str, Any]:
    a, b, c = new_params([(2,), (3,), (4,)])
    leafless = a * 2
    return {
        "a tensor": a,
        "nothing": [],
        "numbers": [0.1],
        "no leaf": [leafless],
        "twice over groups": [{"params": [a]}, {"params": [a, b]}],
        "a set in a group": [{"params": {a, b}}],
        "names on some": [("a", a), b],
        "names in one group": [{"params": [("a", a)]}, {"params": [b]}],
        "a group without params": [{"lr": 0.1}],
        "integers": [1, 2],
        "no iterable": 3,
        "a pair too long": [("a", a, c)],
    }


@pytest.mark.parametrize("kind", sorted(_bad_params()))
@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_bad_parameters_raise_what_torch_raises(case: Case, kind: str) -> None:
    def outcome(cls: Any) -> type | None:
        try:
            cls(_bad_params()[kind])
        except Exception as error:
            return type(error)
        return None

    assert outcome(case.ours) is outcome(case.theirs)


def test_the_same_parameter_twice_in_a_group_warns_as_in_torch() -> None:
    (p,) = new_params([(3,)])
    for case in PLAIN:
        with pytest.warns(UserWarning, match="duplicate parameters"):
            case.ours([p, p])


_TORCHS_OWN_ERRORS = """
import sys, types, unittest, warnings
warnings.simplefilter("ignore")
# Needed for the base class of torch's own test cases alone.
stub = types.ModuleType("expecttest")
stub.TestCase = unittest.TestCase
sys.modules.setdefault("expecttest", stub)
import torch, fusedopt
from torch.testing._internal.common_optimizers import optim_db

count = 0
for info in optim_db:
    name = info.optim_cls.__name__
    for row in info.optim_error_inputs_func("cpu", torch.float32) if name in NAMES else ():
        inputs = row.optimizer_error_input
        if inputs.kwargs.get("foreach"):
            continue  # ignored here, so nothing clashes with it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                getattr(fusedopt, name)(inputs.params, **inputs.kwargs)
        except Exception as error:
            assert type(error) is row.error_type, (name, inputs, error)
        else:
            raise AssertionError(f"{name} accepts {inputs}")
        count += 1
assert count > 20, count
"""


def test_error_inputs_of_torchs_own_suite() -> None:
    """In a process of its own: importing that suite changes global state."""
    _run(f"NAMES = {[c.name for c in PLAIN]}\n{_TORCHS_OWN_ERRORS}")


# Our own arguments


@pytest.mark.parametrize("case", PLAIN, ids=ids)
@pytest.mark.parametrize("backend", ["Triton", "cuda", "", None, 1])
def test_unknown_backend(case: Case, backend: Any) -> None:
    with pytest.raises(ValueError, match="backend"):
        case.ours(new_params(), backend=backend)


@pytest.mark.parametrize("case", PLAIN, ids=ids)
@pytest.mark.parametrize(
    ("name", "value"),
    [("state_dtype", "int4"), ("state_dtype", torch.int8), ("rounding", True), ("master", "int8")],
)
def test_precision_that_means_nothing_is_refused(case: Case, name: str, value: Any) -> None:
    assert case.ours(new_params(), **{name: None}).param_groups[0][name] is None
    with pytest.raises(ValueError, match=name):
        case.ours(new_params(), **{name: value})


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_clip_must_be_a_global_norm(case: Case) -> None:
    with pytest.raises(TypeError, match="GlobalNorm"):
        case.ours(new_params(), clip=1.0)


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_differentiable_is_refused(case: Case) -> None:
    error = pytest.raises((ValueError, RuntimeError), match="differentiable")
    with error:
        case.ours(new_params(), differentiable=True)
    with pytest.raises((ValueError, RuntimeError), match="differentiable"):
        case.ours([{"params": new_params(), "differentiable": True}])
    optimizer = case.ours(new_params())
    with pytest.raises((ValueError, RuntimeError), match="differentiable"):
        optimizer.add_param_group({"params": new_params(), "differentiable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_foreach_and_fused_change_nothing(case: Case) -> None:
    flags = {"foreach", "fused"} & set(inspect.signature(case.ours).parameters)
    for flag in sorted(flags):
        for value in (True, False):
            pair = Pair(case, shapes=[(7,)])
            options = {**case.options, flag: value}
            ours = case.ours(new_params([(7,)], seed=0), **options, backend="reference")
            for seed in range(1, 4):
                pair.step()
                set_gradients(groups_of(ours), seed)
                ours.step()
            assert_same_state(ours, pair.theirs)
            assert ours.param_groups[0][flag] is value


_WITHOUT_INTERPRETER = """
import pytest, torch, fusedopt

def params():
    return [torch.nn.Parameter(torch.ones(3))]

for name in ("SGD", "RMSprop", "Adam", "AdamW"):
    with pytest.raises(RuntimeError) as error:
        getattr(fusedopt, name)(params(), backend="triton")
    text = str(error.value)
    assert "the tensors are on the CPU" in text and "TRITON_INTERPRET" in text, text
    optimizer = getattr(fusedopt, name)(params(), lr=0.5)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    optimizer.step()
    assert p[0] < 0.9, p

optimizer = fusedopt.SGD(params(), lr=0.5)
optimizer.backend = "triton"
with pytest.raises(RuntimeError):
    optimizer.add_param_group({"params": params()})
assert len(optimizer.param_groups) == 1
"""


def _run(script: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_triton_on_the_cpu_without_the_interpreter_is_a_clear_error() -> None:
    """And ``auto`` runs there, on the reference."""
    _run(_WITHOUT_INTERPRETER)


# Named parameters


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_named_parameters(case: Case) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(DEVICE)
    ours = case.ours(model.named_parameters(), **case.options, backend="reference")
    names = [name for name, _ in model.named_parameters()]
    assert ours.param_groups[0]["param_names"] == names
    set_gradients(list(model.parameters()), 1)
    ours.step()
    saved = ours.state_dict()
    assert saved["param_groups"][0]["param_names"] == names
    theirs = case.theirs(model.named_parameters())
    theirs.load_state_dict(saved)
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours.param_groups[0]["params"], list(model.parameters()))


def test_named_parameters_in_groups() -> None:
    for case in PLAIN:
        pair = Pair(case, shapes=[(3,)])
        (a,), (b,) = pair.params[0], new_params([(4,)])
        optimizer = case.ours([{"params": [("a", a)], "lr": 0.5}, {"params": [("b", b)]}])
        assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["b"]]
        optimizer.add_param_group({"params": [("c", new_params([(2,)])[0])]})
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": new_params([(2,)])})


@pytest.mark.parametrize("name", ["backend", "clip", "statistics"])
def test_what_is_one_for_all_groups(name: str) -> None:
    """Catches a clip in a group that is never looked at."""
    p, q = new_params([(2,), (3,)])
    given = {"params": [p], name: fusedopt.GlobalNorm(1.0)}
    with pytest.raises(ValueError, match=f"{name} is one for all groups"):
        fusedopt.SGD([given], lr=1.0)
    optimizer = fusedopt.SGD([q], lr=1.0)
    with pytest.raises(ValueError, match=f"{name} is one for all groups"):
        optimizer.add_param_group(given)
    assert len(optimizer.param_groups) == 1
