"""The optional forms together with everything else: defaults, groups, clipping, scaling."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from contract import OWN, FlagOnDevice, assert_same_bits, assert_unchanged, snapshot
from marks import both_backends
from torch.amp import GradScaler
from variants_by_hand import DEVICE, VARIANTS, Beside, beside, run_all
from watching import watched

import fusedopt
from fusedopt import coefficients, engine
from fusedopt.memory import device as memory_device
from fusedopt.step import plan, scale

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_class = pytest.mark.parametrize("name", OWN)
HYPER = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.03, "alpha": 0.7, "momentum": 0.6, "centered": True, "maximize": True},
    "Adam": {"lr": 0.1, "betas": (0.6, 0.8), "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "betas": (0.6, 0.8), "maximize": True, "weight_decay": 0.3},
}


def _params(sizes: tuple[int, ...] = (5, 1), dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE, dtype)) for n in sizes
    ]


# Defaults


@each_class
def test_defaults_written_out_are_torchs_bits(name: str) -> None:
    # Catches a default form that computes the same in another order, or a state more.
    ours = getattr(fusedopt, name)(_params(), **HYPER[name], **OWN[name], backend="reference")
    theirs = getattr(torch.optim, name)(_params(), **HYPER[name], foreach=False)
    run_all([ours, theirs], 12)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        close = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(p, q, **close)
        assert set(ours.state[p]) == set(theirs.state[q])
        for key, value in ours.state[p].items():
            torch.testing.assert_close(value, theirs.state[q][key], check_device=False, **close)


@each_class
@both_backends
def test_defaults_left_out_are_defaults_written_out(backend: str, name: str) -> None:
    # Catches a default that differs between the constructor and the group, or a variant's branch
    # that is taken for it.
    explicit = getattr(fusedopt, name)(_params(), **HYPER[name], **OWN[name], backend=backend)
    implicit = getattr(fusedopt, name)(_params(), **HYPER[name], backend=backend)
    run_all([explicit, implicit], 4)
    assert_same_bits(snapshot(explicit), snapshot(implicit))


@pytest.mark.parametrize("name", [*OWN, "BatchDecoupledAdam", "BatchDecoupledRMSprop"])
def test_options_are_entries_of_every_group(name: str) -> None:
    # Catches an option that lives on the optimizer alone: it would be lost in a checkpoint.
    expected = OWN[name.removeprefix("BatchDecoupled")]
    more = {"statistics": fusedopt.GradSampleSquares()} if "Batch" in name else {}
    p, q, r = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    ours = getattr(fusedopt, name)([{"params": [p]}, {"params": [q], "lr": 0.5}], **more)
    ours.add_param_group({"params": [r]})
    for group in [*ours.param_groups, ours.defaults]:
        assert {key: group[key] for key in expected} == expected
    # Saved aside: distributed checkpoint must not ask for them.
    for group in ours.state_dict()["param_groups"]:
        assert {key: group[key].value for key in expected} == expected


@each_class
def test_options_are_keyword_only(name: str) -> None:
    # Catches an option that takes a place in torch's signature.
    parameters = inspect.signature(getattr(fusedopt, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert not set(positional) & set(OWN[name])


# Groups


@both_backends
def test_groups_of_different_forms(backend: str) -> None:
    # Catches an option that is read from the first group, or compiled in for all.
    for name, sets in {
        "SGD": [
            {"lr": 0.1, "momentum": 0.8, "momentum_form": "ema"},
            {"lr": 0.1, "momentum": 0.8, "dampening": 0.5},
            {"lr": 0.1, "momentum": 0.8, "momentum_form": "velocity"},
            {"lr": 0.1, "momentum_form": "ema"},
        ],
        "RMSprop": [
            {"lr": 0.1, "eps": 0.5, "denominator": "variance"},
            {"lr": 0.1, "eps": 0.5},
            {"lr": 0.1, "eps": 0.5, "bias_correction": True},
        ],
        "AdamW": [
            {"lr": 0.1, "bias_correction": None},
            {"lr": 0.1},
            {"lr": 0.1, "betas": (0.5, 0.5), "bias_correction": "running_mean"},
        ],
    }.items():
        run = Beside(name, sets, backend=backend)
        run.step(4)
        run.check()


def test_a_group_inherits_the_constructors_option() -> None:
    # Catches groups that fall back to the class's default.
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ours = fusedopt.SGD(
        [{"params": [p]}, {"params": [q], "momentum_form": "torch", "dampening": 0.3}],
        lr=0.1, momentum=0.9, momentum_form="ema",
    )  # fmt: skip
    assert [group["momentum_form"] for group in ours.param_groups] == ["ema", "torch"]
    # A later group is held to the same rules, with what it inherits.
    with pytest.raises(ValueError, match="dampening"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "dampening": 0.3})
    assert len(ours.param_groups) == 2


# Clipping, loss scaling, live steps


@each_variant
@both_backends
def test_with_clipping(backend: str, variant: str) -> None:
    # Catches a term of a form that is fed with the gradient as it was.
    bound = 1.5
    clip = fusedopt.GlobalNorm(bound)
    run = beside(variant, backend=backend, clip=clip)
    for _ in range(4):
        gradients = run.gradients()
        run.give(gradients)
        run.optimizer.step()
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        assert norm > 2 * bound
        run.loops_step(gradients, bound / (norm + 1e-6))
    assert clip.last.item() == pytest.approx(norm, rel=1e-6)
    # The norm is a float32.
    for p, loop in zip(run.params, run.loops, strict=True):
        torch.testing.assert_close(p.detach().cpu(), loop.p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["host", "device"])
@each_variant
@both_backends
def test_with_loss_scaling(backend: str, variant: str, where: str) -> None:
    # Catches a scale that reaches one term only, and an overflow that counts as a step (the running
    # mean would then weigh the next gradient less) or as the first one.
    if where == "device" and DEVICE.type != "cpu":
        return  # the flag stands for one on a GPU, where the other case has one
    run = beside(variant, backend=backend)

    def flag(value: float) -> torch.Tensor:
        tensor = torch.full((1,), value, device=DEVICE)
        return tensor if where == "host" else tensor.as_subclass(FlagOnDevice)

    for overflow in (1.0, 0.0, 0.0, 1.0, 0.0):
        gradients = run.gradients()
        run.give(gradients, 8.0)
        if overflow:
            run.params[0].grad.view(-1)[0] = torch.inf
        before = snapshot(run.optimizer)
        run.optimizer.grad_scale, run.optimizer.found_inf = flag(8.0), flag(overflow)
        run.optimizer.step()
        if overflow:
            assert_unchanged(run.optimizer, before)
        else:
            run.loops_step(gradients)
        run.check()


@each_variant
def test_under_torchs_scaler(variant: str) -> None:
    # Catches a class that no longer tells the scaler that it takes the scale itself.
    run = beside(variant)
    scaler = GradScaler(DEVICE.type, init_scale=64.0, growth_interval=2)
    for step in range(5):
        gradients = run.gradients()
        run.give(gradients)
        for p in run.params:
            p.grad = scaler.scale(p.grad)
        if step in (0, 3):
            run.params[1].grad.view(-1)[2] = torch.nan
        scaler.step(run.optimizer)
        scaler.update()
        if step not in (0, 3):
            run.loops_step(gradients)
    run.check()


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@each_variant
@both_backends
def test_capturable(backend: str, variant: str, tensors: bool) -> None:
    # Catches coefficients of a form that only the host computes, or computes otherwise on the
    # device; with tensors, ones that are kept although the tensors were written to.
    run = beside(variant, backend=backend, capturable=True)
    if tensors:
        _make_tensors(run, DEVICE)
    for step in range(5):
        if tensors and step == 3:
            for group, loop in zip(run.optimizer.param_groups, run.loops, strict=True):
                group["lr"].mul_(0.5)
                loop.options["lr"] *= 0.5
                if "betas" in group:
                    group["betas"][0].fill_(0.8)
                    group["betas"][1].fill_(0.5)
                    loop.options["betas"] = (0.8, 0.5)
        run.step()
        run.check()


def _make_tensors(run: Beside, device: torch.device) -> None:
    def tensor(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    for group in run.optimizer.param_groups:
        group["lr"] = tensor(group["lr"])
        if "betas" in group:
            group["betas"] = tuple(tensor(beta) for beta in group["betas"])


@each_variant
@both_backends
def test_tensors_as_hyper_parameters(backend: str, variant: str) -> None:
    # Catches min(t, 1 / (1 - beta)), or a power, that a tensor cannot be put into.
    run = beside(variant, backend=backend)
    _make_tensors(run, torch.device("cpu"))
    run.step(2)
    for group, loop in zip(run.optimizer.param_groups, run.loops, strict=True):
        group["lr"].mul_(0.25)
        loop.options["lr"] *= 0.25
    run.step(2)
    run.check()


@each_variant
def test_in_a_simulated_capture(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches a form whose coefficients a capture would freeze, or that is not ready for one.
    active = False
    for module in (memory_device, coefficients, engine, plan, scale):
        monkeypatch.setattr(module, "is_capturing", lambda device: active)
    run = beside(variant, backend="triton", capturable=True)
    run.step()
    active = True
    run.step(2)
    active = False
    run.step()
    run.check()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the launch is stubbed")
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@each_variant
def test_a_live_step_reads_and_allocates_nothing(
    variant: str, tensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches a coefficient that takes a branch by t or beta: on the device that is a read, which
    # would abort a capture. (No capturable in SGD: a flag on the device makes its step live.)
    from fusedopt.backends import triton, triton_coefficients

    for module in (triton, triton_coefficients):
        monkeypatch.setattr(module, "launch", lambda *arguments, **meta: None)
    run = beside(variant, backend="triton", capturable=True)
    if tensors:
        _make_tensors(run, DEVICE)
    run.give(run.gradients())

    def flags() -> None:
        run.optimizer.grad_scale = torch.full((1,), 8.0).as_subclass(FlagOnDevice)
        run.optimizer.found_inf = torch.zeros(1).as_subclass(FlagOnDevice)

    for _ in range(2):
        flags()
        run.optimizer.step()
    flags()
    with watched() as log:
        run.optimizer.step()
    assert not log
