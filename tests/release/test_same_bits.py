"""Released gradients give the bits of a step after backward, whatever the rule and the format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clients import assert_same, batches, decoupled, loss_of, network, values
from releasing import assert_same_run, run, step_after_backward, two_groups

import fusedopt
from fusedopt import FusedOptimizer
from fusedopt.kernels.rules import REGISTRY

PLAIN_RULES = [rule for rule in REGISTRY.values() if rule.degrees == (1,)]
FORMATS: list[dict[str, Any]] = [
    {},
    {"state_dtype": torch.float32},
    {"state_dtype": "int8", "master": "remainder8"},
    {"state_dtype": "fp8", "rounding": "stochastic"},
    {"master": "remainder8", "rounding": "stochastic"},
    {"master": "remainder"},
    {"master": "float32"},
    {"rounding": "kahan", "rounding_seed": 3},
]
each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


def _named(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "plain"


@pytest.mark.parametrize("rule", PLAIN_RULES, ids=lambda rule: rule.name)
def test_every_rule(rule, device) -> None:
    # Catches a step count, a stage or an option that a parameter alone does not see.
    kind: Any = type(rule.name, (FusedOptimizer,), {"rule": rule})
    for group in rule.example_groups:

        def make(model, group=group):
            return kind(two_groups(model), dict(group), backend="reference")

        ours, theirs = (run(make, released, device=device) for released in (True, False))
        assert_same_run(ours, theirs)


@each_backend
@pytest.mark.parametrize("options", FORMATS, ids=_named)
def test_every_format(options, backend, device) -> None:
    """Random bits included: those of the parameter's number in the whole optimizer."""

    def make(model):
        return fusedopt.AdamW(two_groups(model), backend=backend, **options)

    bf16 = torch.bfloat16
    steps = 4 if backend == "reference" else 2
    ours, theirs = (run(make, on, steps=steps, dtype=bf16, device=device) for on in (True, False))
    assert_same_run(ours, theirs)


@each_backend
def test_numbers_on_the_device(backend, device) -> None:
    def make(model):
        options = {"capturable": True, "rounding": "stochastic", "backend": backend}
        return fusedopt.AdamW(two_groups(model), **options)

    fp16 = torch.float16
    ours, theirs = (run(make, on, steps=3, dtype=fp16, device=device) for on in (True, False))
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("virtual", [1, 4])
def test_squares_of_samples(virtual, parts) -> None:
    """Squares of a parameter are there when its gradient is, those of all micro-batches."""
    released, plain = network(), network()
    optimizers = [decoupled(model, virtual_batch_size=virtual) for model in (released, plain)]
    release = fusedopt.gradient_release(released, optimizers[0])
    for x, y in batches(6, 8):
        pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        with release.accumulating():
            for piece in pieces[:-1]:
                (loss_of(released, *piece) / parts).backward()
        (loss_of(released, *pieces[-1]) / parts).backward()
        for piece in pieces:
            (loss_of(plain, *piece) / parts).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(values(released), values(plain), values(network()))


def test_options_that_change_between_steps() -> None:
    # Catches a prepared step that goes on by what it was made for.
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 5e-2},
        {"amsgrad": True},
        {"betas": (0.5, 0.9)},
        {"weight_decay": torch.tensor(0.3)},
        {"maximize": True},
    ]

    def loop(model, optimizer, release, batch):
        step_after_backward(model, optimizer, release, batch)
        optimizer.param_groups[0].update(changes[int(optimizer.state[model.gain]["step"]) - 1])

    def make(model):
        return fusedopt.AdamW(two_groups(model), backend="reference")

    ours, theirs = (run(make, released, steps=6, loop=loop) for released in (True, False))
    assert_same_run(ours, theirs)


def test_memory_that_changes_between_steps() -> None:
    """States replaced, edited, moved and loaded; ``p.data`` swapped; gradients in old places."""

    def loop(model, optimizer, release, batch):
        step_after_backward(model, optimizer, release, batch)
        p = model.narrow.weight
        state = optimizer.state[p]
        step = int(state["step"])
        square = optimizer.state[model.twice.weight]
        if step == 1:
            state["exp_avg"] = state["exp_avg"].clone() * 2
            # In the same memory, and in another order.
            square["exp_avg"] = square["exp_avg"].t()
            optimizer.state[model.norm.weight]["step"] = torch.tensor(40.0)
        elif step == 2:
            state["step"].add_(5)
            state["exp_avg_sq"].data = state["exp_avg_sq"].clone() * 3
        elif step == 8:
            p.data = p.detach().clone() + 1
        elif step == 9:
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.state[p]["step"] = torch.tensor(3.0)
        elif step == 4:
            optimizer.state[model.gain] = {k: v.clone() for k, v in optimizer.state[p].items()}
            optimizer.state[model.gain].update(
                exp_avg=torch.tensor(0.5), exp_avg_sq=torch.tensor(0.25)
            )

    def make(model):
        return fusedopt.AdamW(two_groups(model), backend="triton")

    ours, theirs = (run(make, released, steps=7, loop=loop) for released in (True, False))
    assert_same_run(ours, theirs)


def test_gradients_that_move_and_come_back() -> None:
    """The quick step and the plan share a table: who moves an address tells the other."""
    p = torch.nn.Parameter(torch.ones(5))
    twin = torch.nn.Parameter(torch.ones(5))
    model = torch.nn.ParameterList([p])
    ours = fusedopt.SGD([p], lr=0.1, momentum=0.5, backend="triton")
    theirs = fusedopt.SGD([twin], lr=0.1, momentum=0.5, backend="triton")
    fusedopt.gradient_release(model, ours)
    (hook,) = p._post_accumulate_grad_hooks.values()
    places = [torch.full((5,), float(i)) for i in range(2)]
    # Of each step which place, and whether the quick way is barred: it leaves tensors to the plan.
    for place, barred in ((0, False), (0, False), (1, False), (0, True), (1, True), (1, False)):
        for q, optimizer in ((p, ours), (twin, theirs)):
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1) if barred else 0.1
            q.grad = places[place]
        hook(p)
        theirs.step()
        assert torch.equal(p, twin)
