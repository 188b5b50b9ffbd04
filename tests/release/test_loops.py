"""Training loops around gradient release: what may stay, what is counted, what is left alone."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from releasing import (
    assert_same_run,
    loss_of,
    run,
    step_after_backward,
    tokens,
    two_groups,
    various,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedopt


def _adamw(model: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(two_groups(model), backend="reference")


def _in_parts(count: int, outside: int):
    """A loop over micro-batches of which the last ones are outside of ``accumulating()``."""

    def loop(model, optimizer, release, batch):
        parts = batch.chunk(count)
        inside = count - outside
        if release is None:
            for part in parts:
                (loss_of(model, part) / count).backward()
        else:
            with release.accumulating():
                for part in parts[:inside]:
                    (loss_of(model, part) / count).backward()
            for part in parts[inside:]:
                (loss_of(model, part) / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return loop


@pytest.mark.parametrize("outside", [0, 1])
def test_accumulation(outside) -> None:
    """Gradients kept in a context join those of the pass behind it, or wait for ``step()``."""
    loop = _in_parts(3, outside)
    assert_same_run(*(run(_adamw, released, loop=loop) for released in (True, False)))


def test_two_passes_for_one_step_are_refused() -> None:
    # Without the check these are two steps, and nothing says so.
    with pytest.raises(RuntimeError, match=r"two backward passes for one call.*accumulating\(\)"):
        run(_adamw, True, steps=1, loop=_in_parts(2, 2))


def test_the_second_pass_changes_nothing_once_the_loop_is_known() -> None:
    model = various()
    optimizer = _adamw(model)
    fusedopt.gradient_release(model, optimizer)
    first, second = tokens(2)
    step_after_backward(model, optimizer, None, first)
    loss_of(model, second).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="two backward passes for one call"):
        loss_of(model, second).backward()
    assert all(map(torch.equal, model.parameters(), before))


def test_step_may_be_left_out() -> None:
    def without(model, optimizer, release, batch):
        loss_of(model, batch).backward()
        if release is None:
            optimizer.step()
            optimizer.zero_grad()

    assert_same_run(*(run(_adamw, released, loop=without) for released in (True, False)))


@pytest.mark.filterwarnings("error")
def test_schedulers_hooks_and_closures() -> None:
    """``step()`` has nothing to do, and does everything around it."""
    seen: dict[bool, list[str]] = {True: [], False: []}
    schedulers: dict[int, Any] = {}

    def loop(model, optimizer, release, batch):
        scheduler = schedulers.get(id(optimizer))
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            schedulers[id(optimizer)] = scheduler
            mine = seen[release is not None]
            optimizer.register_step_pre_hook(lambda *_: mine.append("before"))
            optimizer.register_step_post_hook(lambda *_: mine.append("after"))

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) > 0
        scheduler.step()
        optimizer.zero_grad()

    assert_same_run(*(run(_adamw, released, loop=loop) for released in (True, False)))
    assert seen[True] == seen[False] == ["before", "after"] * 4


def test_tied_parameters_are_stepped_once() -> None:
    """The hook runs when all that adds to the gradient has: torch's word, which is relied on."""
    model = various()
    optimizer = _adamw(model)
    fired: list[int] = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
    fusedopt.gradient_release(model, optimizer)
    loss_of(model, tokens(1)[0]).backward()
    assert len(fired) == len(set(fired))
    assert {id(model.embedding.weight), id(model.twice.weight)} <= set(fired)
    assert optimizer.state[model.embedding.weight]["step"] == 1


def test_the_largest_gradient_is_all_that_is_there() -> None:
    """Bytes of gradients alive, counted whenever one has accumulated; whoever may hold them."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most: dict[bool, int] = {}
    for released in (True, False):
        model = various()
        optimizer = _adamw(model)
        most[released] = 0

        def note(p: torch.Tensor, released: bool = released) -> None:
            alive.append(weakref.ref(p.grad))
            held = sum(g.nbytes for ref in alive if (g := ref()) is not None)
            most[released] = max(most[released], held)

        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(note)
        if released:
            fusedopt.gradient_release(model, optimizer)
        for batch in tokens(3):
            alive.clear()
            step_after_backward(model, optimizer, None, batch)
    used = [p for n, p in model.named_parameters() if not n.startswith(("frozen", "unused"))]
    assert most[True] == max(p.nbytes for p in used)
    assert most[False] == sum(p.nbytes for p in used)


def test_what_is_not_of_both_is_left_alone() -> None:
    """A parameter of the optimizer's alone waits for ``step()``, one of the model's for others."""

    def make(model):
        model.other = nn.Parameter(torch.ones(2)) if not hasattr(model, "other") else model.other
        own = [p for n, p in model.named_parameters() if n != "gain"]
        return fusedopt.AdamW([*own, outside[-1]], lr=1e-2, backend="reference")

    ends = []
    for released in (True, False):
        outside = [nn.Parameter(torch.ones(3))]
        model = various()
        optimizer = make(model)
        if released:
            fusedopt.gradient_release(model, optimizer)
        for batch in tokens(3):
            (loss_of(model, batch) + outside[0].square().sum()).backward()
            assert (model.norm.weight.grad is None) == released
            assert outside[0].grad is not None and model.gain.grad is not None
            optimizer.step()
            optimizer.zero_grad()
            model.gain.grad = None
        ends.append([p.detach().clone() for p in (*model.parameters(), outside[0])])
    assert all(map(torch.equal, *ends)) and not torch.equal(ends[0][-1], torch.ones(3))


def test_a_parameter_that_is_thawed() -> None:
    def loop(model, optimizer, release, batch):
        model.unused.requires_grad_(True)
        step_after_backward(model, optimizer, release, batch)
        model.norm.requires_grad_(not model.norm.weight.requires_grad)

    def make(model):
        model.norm.requires_grad_(False)
        return _adamw(model)

    assert_same_run(*(run(make, released, loop=loop) for released in (True, False)))


def test_two_optimizers_over_one_model() -> None:
    ends = []
    for released in (True, False):
        model = various(torch.bfloat16)
        some = list(model.parameters())
        optimizers = [
            fusedopt.SGD(some[:6], lr=0.1, momentum=0.9, backend="reference"),
            fusedopt.AdamW(some[6:], lr=0.01, rounding="stochastic", backend="reference"),
        ]
        if released:
            for optimizer in optimizers:
                fusedopt.gradient_release(model, optimizer)
        for batch in tokens(3):
            loss_of(model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_remove_leaves_gradients_to_step() -> None:
    def loop(model, optimizer, release, batch):
        step_after_backward(model, optimizer, release, batch)
        if release is not None and optimizer.state[model.gain]["step"] == 2:
            release.remove()
            release.remove()
            loss_of(model, batch).backward()
            assert model.gain.grad is not None
            optimizer.zero_grad()

    assert_same_run(*(run(_adamw, released, loop=loop) for released in (True, False)))


def test_released_again_after_new_parameters() -> None:
    ends = []
    for released in (True, False):
        model = various()
        first, rest = list(model.parameters())[:5], list(model.parameters())[5:]
        optimizer = fusedopt.SGD(first, lr=0.1, momentum=0.9, backend="reference")
        release = fusedopt.gradient_release(model, optimizer) if released else None
        for step, batch in enumerate(tokens(4)):
            if step == 2:
                if release is not None:
                    with pytest.raises(RuntimeError, match=r"remove\(\).*add_param_group"):
                        optimizer.add_param_group({"params": rest})
                    release.remove()
                optimizer.add_param_group({"params": rest})
                if released:
                    fusedopt.gradient_release(model, optimizer)
            step_after_backward(model, optimizer, None, batch)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_parameters_moved_in_the_groups_keep_their_numbers() -> None:
    """Random bits go by the place among all parameters as it is now."""

    def loop(model, optimizer, release, batch):
        step_after_backward(model, optimizer, release, batch)
        if optimizer.state[model.gain]["step"] == 2:
            first, second = optimizer.param_groups
            first["params"].append(second["params"].pop(0))
        elif optimizer.state[model.gain]["step"] == 3:
            # All in the second group stay where they are, and are one further on.
            optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1).bfloat16()))

    def make(model):
        options = {"rounding": "stochastic", "rounding_seed": 2, "backend": "reference"}
        return fusedopt.AdamW(two_groups(model), **options)

    bf16 = torch.bfloat16
    assert_same_run(*(run(make, on, steps=6, dtype=bf16, loop=loop) for on in (True, False)))


def test_a_checkpoint_in_between() -> None:
    """What it has not is not missed, as it would be of a state that was edited."""

    def loop(model, optimizer, release, batch):
        step_after_backward(model, optimizer, release, batch)
        if "saved" not in optimizer.__dict__:
            optimizer.saved = copy.deepcopy(optimizer.state_dict())
        elif optimizer.saved is not None and optimizer.state[model.gain]["step"] == 3:
            optimizer.load_state_dict(optimizer.saved)
            optimizer.saved = None
        for group in optimizer.param_groups:
            group["amsgrad"] = True

    assert_same_run(*(run(_adamw, on, steps=5, loop=loop) for on in (True, False)))


def test_a_pass_that_makes_a_graph() -> None:
    def loop(model, optimizer, release, batch):
        loss = loss_of(model, batch)
        some = [model.norm.weight, model.gain]
        penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, some, create_graph=True))
        (loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_same_run(*(run(_adamw, released, loop=loop) for released in (True, False)))


class _Checkpointed(nn.Module):
    """Layers, one used in two segments that are run again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


def test_checkpointed_activations() -> None:
    ends = []
    for released in (True, False):
        model = _Checkpointed(reentrant=False)
        optimizer = fusedopt.AdamW(model.parameters(), backend="reference")
        if released:
            fusedopt.gradient_release(model, optimizer)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_reentrant_checkpoints_are_refused() -> None:
    """A layer of two segments would be stepped by each with half of its gradient."""
    model = _Checkpointed(reentrant=True)
    optimizer = fusedopt.AdamW(model.parameters(), backend="reference")
    fusedopt.gradient_release(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models(whole) -> None:
    """A compiled model's backward is one node, whose gradients accumulate one by one."""
    ends = []
    for released in (True, False):
        torch._dynamo.reset()
        model = various()
        optimizer = _adamw(model)
        if released:
            fusedopt.gradient_release(model, optimizer)
        forward = model if whole else torch.compile(model, backend="aot_eager")

        def train(batch, forward=forward, optimizer=optimizer):
            loss_of(forward, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(train, backend="aot_eager") if whole else train
        for batch in tokens(3):
            step(batch)
        ends.append((model, optimizer))
    assert_same_run(*ends)
