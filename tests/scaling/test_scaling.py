"""Hyper-parameters for another batch size, against values worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning')

ADAM = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": True}
UNCHANGED = {"weight_decay": 0.1, "amsgrad": True}


@pytest.mark.parametrize(
    ("rule", "beta_form", "expected"),
    [
        ("decoupled", None, {"lr": 4e-3, "betas": (0.6561, 0.96059601), "eps": 1e-8}),
        ("decoupled", "linear", {"lr": 4e-3, "betas": (0.6, 0.96), "eps": 1e-8}),
        ("sqrt", None, {"lr": 2e-3, "betas": (0.6, 0.96), "eps": 5e-9}),
        ("sqrt", "power", {"lr": 2e-3, "betas": (0.6561, 0.96059601), "eps": 5e-9}),
        ("linear", None, {"lr": 4e-3, "betas": (0.9, 0.99), "eps": 1e-8}),
        ("constant", None, {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}),
    ],
)
def test_four_times_the_batch(rule, beta_form, expected) -> None:
    new = scaling.rescale(ADAM, 32, 128, rule, beta_form=beta_form)
    assert new.keys() == ADAM.keys()
    for name, value in (expected | UNCHANGED).items():
        assert new[name] == pytest.approx(value, rel=1e-14), name


def test_a_quarter_of_the_batch() -> None:
    new = scaling.rescale(ADAM, 128, 32, "sqrt")
    assert new["lr"] == pytest.approx(5e-4)
    assert new["betas"] == pytest.approx((0.975, 0.9975))
    assert new["eps"] == pytest.approx(2e-8)
    new = scaling.rescale({"betas": (0.81, 0.9801)}, 2, 1, "decoupled")
    assert new == {"betas": pytest.approx((0.9, 0.99))}


def test_momentum_is_the_decay_of_a_sum() -> None:
    """What one gradient adds up to, lr / (1 - momentum), grows as lr does without momentum."""
    new = scaling.rescale({"lr": 0.1, "momentum": 0.9}, 8, 16, "decoupled")
    assert new["momentum"] == pytest.approx(0.81)
    assert new["lr"] == pytest.approx(0.38)
    new = scaling.rescale({"lr": 0.1, "alpha": 0.99, "momentum": 0.9}, 8, 32, "sqrt")
    assert new == {
        "lr": pytest.approx(0.8),  # sqrt(4) * 0.1 * 0.4 / 0.1
        "alpha": pytest.approx(0.96),
        "momentum": pytest.approx(0.6),
    }


def test_momentum_of_an_average_leaves_lr_alone() -> None:
    # Catches the factor (1 - mu')/(1 - mu), which belongs to sums, applied to an average; the lr of
    # a velocity needs it as torch's does.
    hyper = {"lr": 0.1, "momentum": 0.9}
    new = scaling.rescale({**hyper, "momentum_form": "ema"}, 8, 16, "decoupled")
    assert new == {
        "lr": pytest.approx(0.2),
        "momentum": pytest.approx(0.81),
        "momentum_form": "ema",
    }
    for form in ("torch", "velocity"):
        new = scaling.rescale({**hyper, "momentum_form": form}, 8, 16, "decoupled")
        assert new["lr"] == pytest.approx(0.38)


@pytest.mark.parametrize(
    ("options", "rule", "message"),
    [
        ({"momentum_form": "average"}, "linear", "one of torch, velocity, ema, got 'average'"),
        ({"denominator": "variance"}, "sqrt", "for a denominator that is a standard deviation"),
        ({"virtual_batch_size": 8}, "sqrt", 'use rule="decoupled"'),
    ],
)
def test_what_a_rule_does_not_hold_for(options, rule, message) -> None:
    # Catches the square-root rule where the denominator does not fall as 1/sqrt(batch).
    with pytest.raises(ValueError, match=message):
        scaling.rescale({"lr": 0.1, **options}, 8, 16, rule)


def test_initial_lr_follows_lr() -> None:
    # Catches a schedule that goes on from the old learning rate.
    new = scaling.rescale({"lr": 0.1, "initial_lr": 0.4, "momentum": 0.9}, 8, 16, "decoupled")
    assert new["initial_lr"] == pytest.approx(1.52)
    assert new["lr"] == pytest.approx(0.38)


def test_linear_keeps_momentum_and_alpha() -> None:
    new = scaling.rescale({"lr": 0.1, "alpha": 0.99, "momentum": 0.9}, 8, 32, "linear")
    assert new == {"lr": pytest.approx(0.4), "alpha": 0.99, "momentum": 0.9}


@pytest.mark.parametrize("rule", scaling.RULES)
def test_no_momentum_stays_none(rule) -> None:
    assert scaling.rescale({"momentum": 0}, 8, 512, rule) == {"momentum": 0}


def test_momentum_follows_the_samples() -> None:
    """SGD on a slope: the lag behind a run without momentum is the same number of samples."""

    def travelled(batch: int) -> float:
        hyper = scaling.rescale({"lr": 1e-3, "momentum": 0.98}, 1, batch, "decoupled")
        p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([p], **hyper)
        for _ in range(240 // batch):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return -p.item()

    assert travelled(1) == pytest.approx(9.6, rel=0.01)
    assert travelled(4) == pytest.approx(travelled(1), rel=0.02)


def test_argument_is_not_altered() -> None:
    group = {**ADAM, "lr": torch.tensor(1e-3), "betas": [torch.tensor(0.9), torch.tensor(0.99)]}
    before = copy.deepcopy(group)
    for rule in scaling.RULES:
        new = scaling.rescale(group, 8, 16, rule)
        assert new["lr"] is not group["lr"], "writing into the result would alter the argument"
    assert group == before
    assert new is not group


def test_tensors_stay_tensors() -> None:
    group = {"lr": torch.tensor(1e-3), "betas": (torch.tensor(0.9), torch.tensor(0.99))}
    new = scaling.rescale(group, 1, 2, "decoupled")
    torch.testing.assert_close(new["lr"], torch.tensor(2e-3))
    torch.testing.assert_close(new["betas"], (torch.tensor(0.81), torch.tensor(0.9801)))


@pytest.mark.parametrize("from_batch, to_batch", [(0, 8), (8, 0), (-8, 8), (8, math.nan)])
def test_batches_must_be_positive(from_batch, to_batch) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        scaling.rescale(ADAM, from_batch, to_batch, "constant")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "cubic"}, "rule must be one of decoupled, sqrt, linear, constant, got 'cubic'"),
        ({"rule": "sqrt", "beta_form": "log"}, "beta_form must be one of linear, power, got 'log'"),
        ({"rule": "linear", "beta_form": "power"}, "it keeps decays"),
    ],
)
def test_unknown_names(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.rescale(ADAM, 8, 16, **arguments)


@pytest.mark.parametrize(
    ("hyper", "name"),
    [
        ({"betas": (0.9, 0.999)}, r"betas\[0\]"),
        ({"betas": (0.999, 0.9)}, r"betas\[1\]"),
        ({"alpha": 0.9}, "alpha"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_negative_decay_names_the_remedy(hyper, name) -> None:
    with pytest.raises(ValueError, match=rf'{name} = 0.9 would become.*beta_form="power", beta\*'):
        scaling.rescale(hyper, 8, 512, "sqrt")
    scaling.rescale(hyper, 8, 512, "sqrt", beta_form="power")


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_decay_out_of_range(beta) -> None:
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\)"):
        scaling.rescale({"betas": (0.9, beta)}, 8, 16, "decoupled")


def two_groups() -> list[dict]:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    return [{"params": [first]}, {"params": [second], "lr": 1e-2, "weight_decay": 0.0}]


@pytest.mark.parametrize("module", [torch.optim, fusedopt], ids=["torch", "fusedopt"])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_every_group_is_rescaled(module, name) -> None:
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(module, name)(two_groups(), lr=1e-3, weight_decay=0.1, **options)
    before = [dict(group) for group in optimizer.param_groups]
    scaling.rescale_(optimizer, 8, 32, "decoupled")
    for old, new in zip(before, optimizer.param_groups, strict=True):
        assert new == scaling.rescale(old, 8, 32, "decoupled")
        assert new["params"] is old["params"]
        assert new["lr"] != old["lr"]
    assert optimizer.param_groups[0]["lr"] != optimizer.param_groups[1]["lr"]


@pytest.mark.parametrize("module", [torch.optim, fusedopt], ids=["torch", "fusedopt"])
def test_shared_tensor_is_rescaled_once_in_place(module) -> None:
    lr = torch.tensor(1e-3)
    groups = [{"params": group["params"]} for group in two_groups()]
    optimizer = module.AdamW(groups, lr=lr, capturable=True)
    scaling.rescale_(optimizer, 8, 32, "decoupled")
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    torch.testing.assert_close(lr, torch.tensor(4e-3))


def test_shared_tensor_with_two_momenta_is_an_error() -> None:
    lr = torch.tensor(1e-3)
    first, second = two_groups()
    groups = [{**first, "lr": lr, "momentum": 0.5}, {**second, "lr": lr, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(ValueError, match="share one lr tensor"):
        scaling.rescale_(optimizer, 8, 32, "decoupled")
    torch.testing.assert_close(lr, torch.tensor(1e-3))
    scaling.rescale_(optimizer, 8, 32, "linear")
    torch.testing.assert_close(lr, torch.tensor(4e-3))


def test_error_changes_no_group() -> None:
    groups = two_groups()
    groups[1]["betas"] = (0.5, 0.999)
    optimizer = fusedopt.AdamW(groups, lr=torch.tensor(1e-3), capturable=True)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"betas\[0\] = 0.5 would become"):
        scaling.rescale_(optimizer, 8, 64, "sqrt")
    assert optimizer.state_dict() == before


def test_next_step_uses_the_new_values() -> None:
    optimizers = [fusedopt.AdamW(two_groups(), lr=1e-3, backend="reference") for _ in range(2)]
    for i, optimizer in enumerate(optimizers):
        if i == 0:
            scaling.rescale_(optimizer, 8, 32, "sqrt")
        else:
            for group in optimizer.param_groups:
                group |= {"lr": group["lr"] * 2, "betas": (0.6, 0.996), "eps": group["eps"] / 2}
                # Decoupled: lr * weight_decay goes with kappa.
                group["weight_decay"] *= 2
        for _ in range(3):
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.tensor([1.0, -2.0])
            optimizer.step()
    for ours, theirs in zip(*(o.param_groups for o in optimizers), strict=True):
        torch.testing.assert_close(ours["params"], theirs["params"])


def test_virtual_batch_size_stays() -> None:
    optimizer = fusedopt.BatchDecoupledAdam(
        two_groups(), statistics=fusedopt.MicroBatchSquares(), virtual_batch_size=8
    )
    scaling.rescale_(optimizer, 8, 64, "decoupled")
    for group in optimizer.param_groups:
        assert group["virtual_batch_size"] == 8
        assert group["betas"] == pytest.approx((0.9**8, 0.999**8))
