"""What the optional forms refuse, and that a refusal changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract import BACKENDS, assert_same_bits, assert_unchanged, snapshot
from torch.nn import Parameter
from variants_by_hand import DEVICE

import fusedopt
from fusedopt import GradSampleSquares

FORMS = ("torch", "velocity", "ema")
# Class, option, a value that it has not, and what the message must name.
WRONG: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("SGD", "momentum_form", "heavy-ball", FORMS),
    ("SGD", "momentum_form", "Torch", FORMS),
    ("SGD", "momentum_form", "", FORMS),
    ("SGD", "momentum_form", None, FORMS),
    ("SGD", "momentum_form", True, FORMS),
    ("RMSprop", "denominator", "var", ("std", "variance")),
    ("RMSprop", "denominator", None, ("std", "variance")),
    ("RMSprop", "denominator", True, ("std", "variance")),
    ("RMSprop", "bias_correction", "adam", ("True", "False")),
    ("RMSprop", "bias_correction", "running_mean", ("True", "False")),
    ("RMSprop", "bias_correction", 1, ("True", "False")),
    ("BatchDecoupledRMSprop", "denominator", "var", ("std", "variance")),
    *(
        (name, "bias_correction", value, ("adam", "running_mean", "None"))
        for name in ("Adam", "AdamW", "BatchDecoupledAdam")
        for value in (True, False, "none", "Adam", "mean", 1, 0, "")
    ),
]
each_wrong = pytest.mark.parametrize(
    ("name", "option", "value", "choices"), WRONG, ids=[f"{n}-{o}-{v}" for n, o, v, _ in WRONG]
)


def _more(name: str) -> dict[str, Any]:
    return {"statistics": GradSampleSquares()} if name.startswith("Batch") else {}


def _param(size: int = 3) -> Parameter:
    return Parameter(torch.linspace(-1, 1, size, device=DEVICE))


def _stepped(optimizer: Any, steps: int = 2) -> Any:
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1.0 + step)
                p.grad_sample = p.grad.expand(2, *p.shape)
        optimizer.step()
    return optimizer


@each_wrong
def test_constructor(name: str, option: str, value: Any, choices: tuple[str, ...]) -> None:
    # Catches a value that is taken for a default, and an error that leaves the user guessing.
    with pytest.raises(ValueError) as raised:
        getattr(fusedopt, name)([_param()], **{option: value}, **_more(name))
    message = str(raised.value)
    assert option in message, message
    assert all(choice in message for choice in choices), message


@each_wrong
def test_group_of_the_constructor(
    name: str, option: str, value: Any, choices: tuple[str, ...]
) -> None:
    # Catches a check of the constructor's arguments alone.
    groups = [{"params": [_param()]}, {"params": [_param()], option: value}]
    with pytest.raises(ValueError) as raised:
        getattr(fusedopt, name)(groups, **_more(name))
    assert all(choice in str(raised.value) for choice in choices), raised.value


@each_wrong
def test_added_group(name: str, option: str, value: Any, choices: tuple[str, ...]) -> None:
    # Catches a check that comes after the group has been added.
    optimizer = _stepped(getattr(fusedopt, name)([_param()], backend="reference", **_more(name)))
    before = snapshot(optimizer)
    with pytest.raises(ValueError) as raised:
        optimizer.add_param_group({"params": [_param()], option: value})
    assert all(choice in str(raised.value) for choice in choices), raised.value
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)
    _stepped(optimizer)


def test_averaged_momentum_has_no_dampening() -> None:
    # Catches dampening that is ignored: the average's own 1 - mu stands in its place.
    with pytest.raises(ValueError, match="dampening"):
        fusedopt.SGD([_param()], momentum=0.9, dampening=0.1, momentum_form="ema")
    for form, damp in (("torch", "ema"), ("ema", None)):
        optimizer = _stepped(fusedopt.SGD([_param()], momentum=0.9, momentum_form=form))
        before = snapshot(optimizer)
        group = {"params": [_param()], "dampening": 0.1}
        if damp:
            group["momentum_form"] = damp
        with pytest.raises(ValueError, match="dampening"):
            optimizer.add_param_group(group)
        assert_unchanged(optimizer, before)


@pytest.mark.parametrize("form", FORMS)
def test_torchs_own_checks_hold_in_every_form(form: str) -> None:
    # Catches a form that goes around the checks of torch.
    for options in (
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"momentum": -0.1},
        {"lr": -1.0},
    ):
        with pytest.raises(ValueError):
            fusedopt.SGD([_param()], momentum_form=form, **options)


# Checkpoints


def _torchs_sgd(steps: int = 3, **options: Any) -> dict[str, Any]:
    theirs = _stepped(torch.optim.SGD([_param(), _param(2)], lr=0.1, **options), steps)
    saved: dict[str, Any] = copy.deepcopy(theirs.state_dict())
    return saved


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "stepped"])
@pytest.mark.parametrize("form", ["velocity", "ema"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_momentum_is_no_velocity(backend: str, form: str, fresh: bool) -> None:
    # Catches buffers that change their unit by a load: torch's are 1 / lr or 1 / (1 - mu) larger.
    saved = _torchs_sgd(momentum=0.9)
    kept = copy.deepcopy(saved)
    optimizer = fusedopt.SGD(
        [_param(), _param(2)], lr=0.2, momentum=0.8, momentum_form=form, backend=backend
    )
    if not fresh:
        _stepped(optimizer)
    before = snapshot(optimizer)
    twin = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="momentum_form"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert_same_bits(saved["state"], kept["state"])
    assert saved["param_groups"] == kept["param_groups"]
    for each in (optimizer, twin):
        _stepped(each)
    assert_same_bits(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("forms", [("torch", "ema"), ("velocity", "torch")], ids="-".join)
def test_one_group_of_another_form_is_enough_to_refuse(forms: tuple[str, str]) -> None:
    # Catches a check of the constructor's default or of one group alone.
    groups = [{"params": [_param(i + 1)], "momentum_form": form} for i, form in enumerate(forms)]
    optimizer = fusedopt.SGD(groups, lr=0.2, momentum=0.8)
    theirs = [{"params": [_param(1)]}, {"params": [_param(2)]}]
    saved = _stepped(torch.optim.SGD(theirs, lr=0.1, momentum=0.9)).state_dict()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="momentum_form"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("RMSprop", "denominator", ("std", "variance")),
        ("RMSprop", "bias_correction", (True, False)),
        ("Adam", "bias_correction", ("adam", "running_mean", None)),
    ],
)
def test_torchs_checkpoint_keeps_each_groups_option(
    name: str, option: str, values: tuple[Any, ...]
) -> None:
    # Catches the optimizer's defaults in the place of what a group was made with.
    groups = [{"params": [_param()], option: value} for value in values]
    optimizer = getattr(fusedopt, name)(groups)
    theirs = getattr(torch.optim, name)([{"params": [_param()]} for _ in values], lr=0.25)
    optimizer.load_state_dict(_stepped(theirs).state_dict())
    assert tuple(group[option] for group in optimizer.param_groups) == values
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)


@pytest.mark.parametrize("form", ["velocity", "ema"])
def test_torchs_checkpoint_without_buffers_loads_into_every_form(form: str) -> None:
    # Catches a refusal of what holds nothing in the wrong unit.
    none = _torchs_sgd(momentum=0.9)
    for state in none["state"].values():
        state["momentum_buffer"] = None
    for saved in (_torchs_sgd(0, momentum=0.9), _torchs_sgd(momentum=0.0), none):
        optimizer = fusedopt.SGD([_param(), _param(2)], lr=0.2, momentum_form=form)
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert group["momentum_form"] == form
        assert group["lr"] == 0.1
        group["momentum"] = 0.5
        _stepped(optimizer, 1)
        expected = torch.ones(3, device=DEVICE) * (0.1 if form == "velocity" else 0.5)
        buffer = optimizer.state[group["params"][0]]["momentum_buffer"]
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("form", FORMS)
def test_torchs_momentum_loads_into_torchs_form(form: str) -> None:
    # Catches a refusal of the default form; our own checkpoint brings its form with it.
    optimizer = fusedopt.SGD([_param(), _param(2)], lr=0.2)
    optimizer.load_state_dict(_torchs_sgd(momentum=0.9))
    assert optimizer.param_groups[0]["momentum_form"] == "torch"
    source = _stepped(fusedopt.SGD([_param(), _param(2)], momentum=0.9, momentum_form=form))
    for own in FORMS:
        target = fusedopt.SGD([_param(), _param(2)], momentum=0.5, momentum_form=own)
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0]["momentum_form"] == form


KEPT: list[tuple[str, dict[str, Any]]] = [
    ("RMSprop", {"bias_correction": True}),
    ("RMSprop", {"denominator": "variance"}),
    ("Adam", {"bias_correction": "running_mean"}),
    ("AdamW", {"bias_correction": None}),
]


@pytest.mark.parametrize(("name", "options"), KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_checkpoint_keeps_the_constructors_option(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    # Catches options that fall back to their defaults: torch's checkpoint says nothing of them, and
    # its averages are of the same unit in every form.
    theirs = _stepped(getattr(torch.optim, name)([_param()], lr=0.25, eps=0.5), 2)
    ours = getattr(fusedopt, name)([_param()], **options, backend=backend)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = ours.param_groups[0]
    assert {key: group[key] for key in options} == options
    assert (group["lr"], group["eps"]) == (0.25, 0.5)
    # The same states under the same options, set by hand.
    twin = getattr(fusedopt, name)([_param()], backend=backend)
    twin.load_state_dict(copy.deepcopy(theirs.state_dict()))
    plain = copy.deepcopy(twin)
    twin.param_groups[0].update(options)
    for optimizer in (ours, twin, plain):
        _stepped(optimizer, 2)
    values = [o.param_groups[0]["params"][0].detach() for o in (ours, twin, plain)]
    assert_same_bits(values[0], values[1])
    assert (values[0] - values[2]).abs().min() > 1e-3


def test_averages_forget() -> None:
    # Catches weights of an average that are no weights: nan, or a parameter that ascends.
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="alpha"):
        fusedopt.RMSprop([p], alpha=1.0, bias_correction=True)
    with pytest.raises(ValueError, match="momentum"):
        fusedopt.SGD([p], momentum=1.0, momentum_form="ema")


def test_bad_bound_in_a_checkpoint_changes_nothing() -> None:
    # Catches a bound that is found to be none after the rest was loaded.
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fusedopt.Adam([p])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"lr": 5.0, "clip": {"max_norm": -1.0}}
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nesterov_with_dampening_in_a_group(backend: str) -> None:
    # torch refuses the pair in its constructor only. Catches the weight of d in the buffer, which
    # is dampened, for that in the step.
    pairs = [torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    group = {"dampening": 0.5, "nesterov": True, "momentum": 0.9, "lr": 0.1}
    ours = fusedopt.SGD([{"params": [pairs[0]], **group}], backend=backend)
    theirs = torch.optim.SGD([{"params": [pairs[1]], **group}])
    for step in range(5):
        for p in pairs:
            p.grad = torch.full_like(p, 1.0 + step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(pairs[0], pairs[1])
