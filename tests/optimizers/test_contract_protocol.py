"""The protocols around an optimizer: schedulers, hooks, closures, autograd, compile, profiler."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    ADAM,
    ADAMW,
    DEVICE,
    OWN,
    RMSPROP,
    SGD,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    each_class,
    each_class_on_backends,
    groups_of,
    ids,
    new_params,
    set_gradients,
    snapshot,
)
from marks import both_backends
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

import fusedopt
from fusedopt.formats import OPTIONS as PRECISION

# Schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.8**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.2, step_size_up=2, step_size_down=3, cycle_momentum=_cycles(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=8, cycle_momentum=_cycles(o)
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.8), lr_scheduler.StepLR(o, 2)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


def _cycles(optimizer: Optimizer) -> bool:
    """Whether there is a momentum to cycle: RMSprop of the table has none."""
    return "betas" in optimizer.defaults or optimizer.defaults["momentum"] > 0


def test_the_table_holds_every_scheduler_of_torch() -> None:
    bases = {"LRScheduler", "_LRScheduler"}
    assert set(lr_scheduler.__all__) - bases <= set(SCHEDULERS)


def _follow(pair: Pair, make: Callable[[Optimizer], Any], steps: int = 8) -> list[Any]:
    """Step both under schedulers of their own, and return what the scheduler set on our side."""
    schedulers = [make(optimizer) for optimizer in pair.both]
    seen = []
    for step in range(steps):
        pair.step()
        group = pair.ours.param_groups[0]
        seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau and step < 6 else [0.5] if plateau else []))
    return seen


# The end of a schedule leaves a warning of torch's own, about an argument it passes itself.
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@each_class
def test_schedulers(case: Case, name: str) -> None:
    pair = Pair(case, groups=({}, {"lr": 0.05}), shapes=[(5,), ()])
    seen = _follow(pair, SCHEDULERS[name])
    assert len({lr for lr, *_ in seen}) > 1, "the scheduler did nothing"
    pair.check()
    own = {**OWN[case.theirs.__name__], **PRECISION}
    assert set(pair.ours.param_groups[0]) == {*pair.theirs.param_groups[0], *own}


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("case", [SGD, ADAM, ADAMW], ids=ids)
@both_backends
def test_schedulers_that_cycle_momentum(case: Case, name: str, backend: str) -> None:
    """Catches coefficients other than lr that are taken once."""
    pair = Pair(case, shapes=[(5,), ()], backend=backend)
    seen = _follow(pair, SCHEDULERS[name])
    assert len({(momentum, betas) for _, momentum, betas in seen}) > 3
    pair.check()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@each_class_on_backends
def test_schedulers_fill_a_tensor_lr(case: Case, backend: str, capturable: bool) -> None:
    """The tensor stays the same object; all groups without an lr of their own share it."""
    pair = Pair(case, groups=({}, {}), shapes=[(5,), ()], backend=backend, lr=torch.tensor(0.1))
    pair.theirs.param_groups[0]["lr"] = torch.tensor(0.1)  # not the one our side fills
    pair.theirs.param_groups[1]["lr"] = torch.tensor(0.1)
    for group in pair.ours.param_groups:
        group.update({"capturable": True} if capturable else {})
    tensor = pair.ours.param_groups[0]["lr"]
    assert pair.ours.param_groups[1]["lr"] is tensor
    pair.ours.param_groups[1]["lr"] = tensor.clone()
    _follow(pair, SCHEDULERS["ExponentialLR"], 5)
    assert pair.ours.param_groups[0]["lr"] is tensor
    pair.check()


@pytest.mark.parametrize("shape", [(), (1, 1)])
@each_class_on_backends
def test_tensor_lr_of_one_element(case: Case, backend: str, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.1)
    pair = Pair(case, shapes=[(5,), ()], backend=backend, lr=lr)
    pair.step(2)
    lr.fill_(0.01)
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@both_backends
@pytest.mark.parametrize("case", [ADAM, ADAMW], ids=ids)
def test_tensor_betas(case: Case, backend: str, capturable: bool) -> None:
    betas = (torch.tensor(0.6), torch.tensor(0.8))
    pair = Pair(case, shapes=[(5,), ()], backend=backend, betas=betas)
    pair.ours.param_groups[0]["capturable"] = capturable
    pair.step(2)
    betas[0].fill_(0.2)
    betas[1].fill_(0.5)
    pair.step(3)
    pair.check()


# Closures and hooks


@each_class_on_backends
def test_closure(case: Case, backend: str) -> None:
    """Called once, with gradients enabled, its gradients used, its value returned."""
    pair = Pair(case, shapes=[(5,), ()], backend=backend)
    results = []
    for optimizer in pair.both:
        calls: list[bool] = []

        def closure(optimizer: Optimizer = optimizer, calls: list[bool] = calls) -> Any:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in groups_of(optimizer))
            loss.backward()
            return loss

        values = [optimizer.step(closure) for _ in range(3)]
        with torch.no_grad():
            values.append(optimizer.step(closure=closure))
        assert calls == [True] * 4
        results.append([v.item() for v in values])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    pair.check()
    pair.backward()
    assert pair.ours.step() is None


@each_class
def test_an_error_in_the_closure_changes_nothing(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)

    def closure() -> float:
        raise ZeroDivisionError

    before = snapshot(pair.ours)
    with pytest.raises(ZeroDivisionError):
        pair.ours.step(closure)
    assert_unchanged(pair.ours, before)


@each_class
def test_step_hooks(case: Case) -> None:
    """In torch's order, with torch's arguments; a pre-hook may replace the arguments."""
    pair = Pair(case)
    logs: list[list[Any]] = [[], []]
    for optimizer, log in zip(pair.both, logs, strict=True):

        def before(o: Optimizer, args: Any, kwargs: Any, log: list[Any] = log) -> None:
            log.append(("pre", type(o).__name__, len(args), sorted(kwargs)))

        def replace(o: Optimizer, args: Any, kwargs: Any, log: list[Any] = log) -> Any:
            return (o, lambda: log.append("closure") or 42.0), {}

        def after(o: Optimizer, args: Any, kwargs: Any, log: list[Any] = log) -> None:
            log.append(("post", len(args), sorted(kwargs)))

        handles = [optimizer.register_step_pre_hook(before)]
        handles.append(optimizer.register_step_post_hook(after))
        set_gradients(groups_of(optimizer), 1)
        log.append(optimizer.step())
        handles.append(optimizer.register_step_pre_hook(replace))
        log.append(optimizer.step(None))
        for handle in handles:
            handle.remove()
        log.append(optimizer.step(closure=lambda: 7.0))
    assert logs[0] == logs[1]
    assert "closure" in logs[0] and 42.0 in logs[0] and logs[0][-1] == 7.0
    assert_same_state(pair.ours, pair.theirs)


@each_class
def test_a_pre_hook_may_set_gradients(case: Case) -> None:
    """Data-parallel wrappers reduce gradients there."""
    pair = Pair(case)

    def double(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p in groups_of(optimizer):
            p.grad = p.grad * 2

    pair.each(lambda o: o.register_step_pre_hook(double))
    pair.step(3)
    pair.check()


def test_hooks_of_all_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook as after

    pair = Pair(ADAM)
    seen: list[Any] = []
    handle = after(lambda optimizer, args, kwargs: seen.append(optimizer))
    pair.step()
    handle.remove()
    pair.step()
    assert [id(o) for o in seen] == [id(pair.ours), id(pair.theirs)]


@each_class
def test_state_dict_hooks(case: Case) -> None:
    pair = Pair(case)
    pair.step(2)
    logs: list[list[str]] = [[], []]
    for optimizer, log in zip(pair.both, logs, strict=True):

        def note(name: str, log: list[str] = log) -> Callable[..., None]:
            return lambda *arguments: log.append(f"{name}{len(arguments)}")

        def tag(o: Optimizer, saved: Any) -> Any:
            return {**saved, "tag": 1}

        def halve_lr(o: Optimizer, saved: Any) -> Any:
            assert saved.pop("tag") == 1
            groups = [{**g, "lr": g["lr"] / 2} for g in saved["param_groups"]]
            return {**saved, "param_groups": groups}

        optimizer.register_state_dict_pre_hook(note("save before"))
        optimizer.register_state_dict_post_hook(tag)
        optimizer.register_load_state_dict_pre_hook(halve_lr)
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        saved = optimizer.state_dict()
        assert saved["tag"] == 1
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == case.options["lr"] / 2
    assert logs[0] == logs[1]
    pair.step(2)
    pair.check()


# Autograd


@each_class_on_backends
def test_autograd_notices_a_step_between_forward_and_backward(case: Case, backend: str) -> None:
    """A kernel writes through an address: without a new version autograd would use new values."""
    (p,) = new_params([(5,)])
    optimizer = case.ours([p], **case.options, backend=backend)
    for _ in range(2):
        set_gradients([p], 1)
        version = p._version
        loss = (p**2).sum()
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    (p**2).sum().backward()


@both_backends
def test_parameters_that_are_not_updated_keep_their_version(backend: str) -> None:
    """Otherwise autograd complains where nothing has changed."""
    p, q = new_params([(5,), (5,)])
    optimizer = fusedopt.Adam([p, q], backend=backend)
    set_gradients([p], 1)
    loss = (q**2).sum()
    optimizer.step()
    loss.backward()


def test_step_leaves_grad_mode_and_graph_alone() -> None:
    p, q = new_params([(5,), (5,)])
    optimizer = fusedopt.Adam([p, q], lr=0.1, backend="reference")
    set_gradients([p, q], 1)
    optimizer.step()
    assert torch.is_grad_enabled()
    assert p.is_leaf and p.requires_grad and p.grad_fn is None
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    states = itertools.chain.from_iterable(s.values() for s in optimizer.state.values())
    assert not any(s.requires_grad for s in states)


# Compilation and profiling


@pytest.mark.parametrize(
    ("case", "backend"),
    [(SGD, "reference"), (RMSPROP, "reference"), (ADAMW, "triton")],
    ids=["SGD-reference", "RMSprop-reference", "AdamW-triton"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_step(case: Case, backend: str) -> None:
    """The launch cannot be traced: the graph must break around it, and the numbers stay."""
    torch._dynamo.reset()
    ours_model, model = torch.nn.Linear(4, 3).to(DEVICE), torch.nn.Linear(4, 3).to(DEVICE)
    model.load_state_dict(ours_model.state_dict())
    ours = case.ours(ours_model.parameters(), **case.options, backend=backend)
    theirs = case.theirs(model.parameters(), **case.options, foreach=False)
    x = torch.randn(6, 4, device=DEVICE)

    def train(model: torch.nn.Module, optimizer: Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) ** 2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(train, backend="eager")
    schedulers = [lr_scheduler.ExponentialLR(o, 0.7) for o in (ours, theirs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about its own parts
        for _ in range(4):
            loss = compiled(ours_model, ours)
            torch.testing.assert_close(loss, train(model, theirs), rtol=1e-4, atol=1e-5)
            for scheduler in schedulers:
                scheduler.step()
    assert_same_state(ours, theirs, 1e-4, 1e-5)
    torch._dynamo.reset()


@each_class
def test_profiler_ranges_are_torchs(case: Case) -> None:
    pair = Pair(case)
    names = []
    for optimizer in pair.both:
        set_gradients(groups_of(optimizer), 1)
        # Some versions of torch warn where acc_events is left to its default.
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            optimizer.step()
            optimizer.zero_grad()
        names.append({e.key for e in profile.key_averages() if e.key.startswith("Optimizer.")})
    assert names[0] == names[1]
    assert len(names[0]) == 2


# Wrappers


@each_class
def test_under_torchs_own_wrappers(case: Case) -> None:
    """Averaged models copy parameters by deepcopy; a chained update leaves them in step."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(3, 2).to(DEVICE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = case.ours(model.parameters(), **case.options, backend="reference")
    for seed in range(1, 4):
        set_gradients(list(model.parameters()), seed)
        optimizer.step()
        average.update_parameters(model)
    assert not torch.equal(average.module.weight, model.weight)
    before = [p.detach().clone() for p in average.parameters()]
    set_gradients(list(model.parameters()), 9)
    optimizer.step()
    assert_same_bits([p.detach() for p in average.parameters()], before)


def test_step_in_a_backward_hook() -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    model, copies = torch.nn.Linear(4, 3).to(DEVICE), torch.nn.Linear(4, 3).to(DEVICE)
    copies.load_state_dict(model.state_dict())
    optimizers = {
        p: fusedopt.AdamW([p], **ADAMW.options, backend="reference") for p in model.parameters()
    }

    def update(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    theirs = torch.optim.AdamW(copies.parameters(), **ADAMW.options, foreach=False)
    x = torch.randn(5, 4, device=DEVICE)
    for _ in range(3):
        (model(x) ** 2).sum().backward()
        theirs.zero_grad()
        (copies(x) ** 2).sum().backward()
        theirs.step()
    torch.testing.assert_close(
        list(model.parameters()), list(copies.parameters()), rtol=1e-4, atol=1e-5
    )
