"""Arguments that are none: an error that names them. Tensors of one number: that number."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning')


def make():
    return torch.optim.AdamW([Parameter(torch.zeros(3))], lr=0.1)


def constant(optimizer):
    return lrs.LambdaLR(optimizer, lambda t: 1.0)


# What is no optimizer


TAKERS = {
    "rescale_": lambda o: scaling.rescale_(o, 8, 16, "linear"),
    "samples_schedule": lambda o: scaling.samples_schedule(constant, o, 8),
    "BatchSizeWarmup": lambda o: scaling.BatchSizeWarmup(o, {0: 8}, "linear"),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=list(TAKERS))
def test_svag_is_no_optimizer(take) -> None:
    # Catches an AttributeError that names an attribute in place of the way out.
    svag = fusedopt.SVAG(fusedopt.SGD([Parameter(torch.zeros(3))], lr=0.1), ell=2)
    with pytest.raises(TypeError, match=r"got SVAG: pass svag\.optimizer"):
        take(svag)
    take(svag.optimizer)


@pytest.mark.parametrize("take", TAKERS.values(), ids=list(TAKERS))
@pytest.mark.parametrize("thing", [None, [], torch.nn.Linear(1, 1), SimpleNamespace(optimizer=1)])
def test_what_is_no_optimizer(thing, take) -> None:
    # Catches a hint where there is no optimizer to pass.
    kind = type(thing).__name__
    with pytest.raises(TypeError, match=f"must be a torch.optim.Optimizer, got {kind}$"):
        take(thing)


# What is no number


def sizes(optimizer):
    """Return what takes a size, by the name of the argument."""
    schedule = scaling.samples_schedule(constant, optimizer, 8)
    warmup = scaling.BatchSizeWarmup(optimizer, {0: 8, 16: 16}, "linear")
    return [
        ("from_batch", lambda x: scaling.rescale_(optimizer, x, 16, "linear")),
        ("to_batch", lambda x: scaling.rescale_(optimizer, 8, x, "linear")),
        ("from_batch", lambda x: scaling.rescale({"lr": 0.1}, x, 16, "linear")),
        ("from_batch", lambda x: scaling.samples_schedule(constant, optimizer, x)),
        ("batch_size", lambda x: scaling.samples_schedule(constant, optimizer, 8, x)),
        ("batch_size", schedule.step),
        ("count", warmup.step),
    ]


@pytest.mark.parametrize("value", ["8", None, True, torch.tensor(True), [8], torch.ones(2), 8j])
def test_sizes_that_are_no_numbers(value) -> None:
    # Catches a comparison of str and int that names no argument, and a flag that counts as 1.
    optimizer = make()
    for name, call in sizes(optimizer):
        if value is None and name not in ("from_batch", "to_batch"):
            continue  # The default.
        with pytest.raises(TypeError, match=f"^{name} must be a number, got "):
            call(value)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_size_beyond_floats() -> None:
    # Catches an OverflowError of a division.
    for name, call in sizes(make()):
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            call(10**400)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        ("temperature_lr", ("a", 0.9, 32), "eta0"),
        ("temperature_lr", (0.1, None, 32), "momentum"),
        ("temperature_lr", (0.1, 0.9, True), "batch_size"),
        ("average_lr", ("a", 0.5), "lr"),
        ("beta_from_horizon", ("3",), "horizon"),
        ("horizon_from_beta", (None,), "beta"),
        ("half_life", ("a", 1), "beta"),
        ("beta_from_half_life", (1, "a"), "tokens_per_step"),
        ("epsilon_decoupled_lr", (0.1, "a"), "eps"),
    ],
)
def test_conversions_of_what_is_no_number(function, arguments, name) -> None:
    # Catches the same in the conversions.
    with pytest.raises(TypeError, match=f"^{name} must be a number, got "):
        getattr(scaling, function)(*arguments)


@pytest.mark.parametrize("kind", ["tensor", "numpy", "array"])
def test_number_in_a_tensor(kind) -> None:
    # Catches an lr, a count or a place on a curve that becomes a tensor, and stays one.
    if kind == "tensor":
        boxed = torch.tensor
    else:
        numpy = pytest.importorskip("numpy")
        boxed = numpy.float64 if kind == "numpy" else numpy.array
    optimizer, expected = make(), make()
    warmup = scaling.BatchSizeWarmup(optimizer, {0: 8, 16: 16}, "linear")
    schedule = scaling.samples_schedule(constant, optimizer, boxed(8), boxed(16))
    warmup.step(boxed(8))
    schedule.step(boxed(4))
    found = [warmup.samples, schedule.from_batch, schedule.samples, schedule.batch_size]
    assert found == [8, 8, 16, 4]
    assert all(type(x) in (int, float) for x in found)
    scaling.rescale_(optimizer, boxed(8), boxed(16), "decoupled")
    scaling.rescale_(expected, 8, 16, "decoupled")
    for name in ("lr", "betas", "eps"):
        assert optimizer.param_groups[0][name] == expected.param_groups[0][name]
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert scaling.average_lr(boxed(0.5), boxed(0.75)) == 2.0
    assert type(scaling.average_lr(boxed(0.5), boxed(0.75))) is float


# Hyper-parameters


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        ({"betas": 0.9}, TypeError, "betas must be a sequence of decays, got 0.9"),
        ({"betas": (0.9, "x")}, TypeError, r"betas\[1\] must be a number, got 'x'"),
        ({"betas": None}, TypeError, "betas must be a sequence"),
        ({"alpha": None}, TypeError, "alpha must be a number, got None"),
        ({"momentum": "x"}, TypeError, "momentum must be a number, got 'x'"),
        ({"lr": None}, TypeError, "lr must be a number, got None"),
        ({"lr": "x"}, TypeError, "lr must be a number, got 'x'"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0 and finite, got nan"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be at least 0 and finite"),
        ({"initial_lr": -1.0}, ValueError, "initial_lr must be at least 0"),
        ({"eps": -1}, ValueError, "eps must be at least 0 and finite, got -1"),
        ({"eps": (1e-8, 1e-3)}, TypeError, "eps must be a number"),
        (
            {"weight_decay": float("nan"), "decoupled_weight_decay": True},
            ValueError,
            "weight_decay must be at least 0 and finite, got nan",
        ),
    ],
)
def test_what_is_no_hyper_parameter(hyper, error, message) -> None:
    # Catches an operation on what is no number that names no option, and numbers that no optimizer
    # takes handed on, multiplied.
    with pytest.raises(error, match=message):
        scaling.rescale(hyper, 8, 16, "sqrt")


def test_what_a_rule_leaves_alone_is_handed_on() -> None:
    # Catches a check of options that mean something else in other optimizers: Adafactor's eps.
    hyper = {"eps": (None, 1e-3), "betas": 0.9, "momentum": None}
    assert scaling.rescale(hyper, 8, 16, "linear") == hyper
    optimizer = torch.optim.Adafactor([Parameter(torch.zeros(3))], lr=0.1)
    before = copy.deepcopy(optimizer.param_groups[0]["eps"])
    scaling.rescale_(optimizer, 8, 16, "linear")
    assert optimizer.param_groups[0]["eps"] == before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
