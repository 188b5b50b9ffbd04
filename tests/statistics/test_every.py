"""Steps without squares: what runs in them, what they count, and who joins at one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM
from per_sample import LanguageModel, assert_near, mlp, randint, randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedopt import BatchDecoupledAdam, PerSampleSquares


class Calls(TorchDispatchMode):
    """Names every operation that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Counts of steps are read on the host.
        if func is not torch.ops.aten._local_scalar_dense.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def decoupled(model: nn.Module, every: int, b: float = 2, **options: Any) -> Any:
    statistics = PerSampleSquares(model, every=every, **options)
    return BatchDecoupledAdam(
        model.parameters(), **ADAM, statistics=statistics, virtual_batch_size=b
    )


def loss_of(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1).mean()


def step(model: nn.Module, optimizer: Any, *inputs: Any) -> None:
    loss_of(model(*inputs)).backward()
    optimizer.step()
    optimizer.zero_grad()


class Block(nn.Module):
    """Attention, norms, a convolution; what is observed in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.feed = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        x = self.attention(x, x, x, need_weights=False)[0]
        return checkpoint(self.feed, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [mlp, LanguageModel, lambda: LanguageModel(tied=True), Block])
def test_a_step_without_squares_runs_what_the_plain_model_runs(kind: Callable[[], Any]) -> None:
    """Operation by operation, forward and backward, and with no hook on a parameter.

    Catches: a layer that is observed though nobody reads its squares, hooks that stay.
    """
    torch.manual_seed(0)
    model = kind().double()
    inputs = randint(7, 5, 3) if isinstance(model, LanguageModel) else randn(5, 6, 4)
    optimizer = decoupled(model, 2)
    step(model, optimizer, inputs)
    plain = copy.deepcopy(model)
    found = []
    for own in (model, plain):
        with Calls() as calls:
            loss_of(own(inputs)).backward()
        found.append(calls.names)
    assert not optimizer.statistics.measured
    assert found[0] == found[1] and len(found[0]) > 10
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    optimizer.step()
    optimizer.zero_grad()
    with Calls() as calls:
        loss_of(model(inputs)).backward()
    assert optimizer.statistics.measured and len(calls.names) > len(found[0])


def test_memory_between_steps() -> None:
    """What is kept is one mean a parameter; nothing is gathered where nothing is made."""
    model = mlp()
    optimizer = decoupled(model, 3)
    for seed in range(4):
        loss_of(model(randn(5, 4, seed=seed))).backward()
        gathered = [optimizer.statistics.sum_of_squares(p) for p in model.parameters()]
        assert [s is not None for s in gathered] == [seed % 3 == 0] * 4
        optimizer.step()
        optimizer.zero_grad()
    kept = [optimizer.state[p]["mean_square"] for p in model.parameters()]
    assert [k.shape for k in kept] == [p.shape for p in model.parameters()]


# Samples are counted all the same


CLEAR: dict[str, Callable[[nn.Module, Any], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clear", CLEAR)
def test_samples_of_micro_batches(clear: str) -> None:
    """Batches of 3 and 2, and a call that no backward pass follows.

    Catches: samples that are counted by calls, that are not forgotten, or forgotten too early.
    """
    model = mlp()
    optimizer = decoupled(model, 3)
    for seed in range(7):
        for n in (3, 2):
            loss_of(model(randn(n, 4, seed=seed))).backward()
        model(randn(9, 4))
        assert optimizer.statistics.samples == 5, seed
        assert optimizer.statistics.measured == (seed % 3 == 0)
        optimizer.step()
        CLEAR[clear](model, optimizer)


def test_an_abandoned_batch_is_not_counted() -> None:
    model = mlp()
    optimizer = decoupled(model, 3)
    step(model, optimizer, randn(5, 4))
    loss_of(model(randn(5, 4))).backward()
    for p in model.parameters():
        p.grad = None
    loss_of(model(randn(4, 4))).backward()
    assert optimizer.statistics.samples == 4


def test_a_sum_needs_the_count() -> None:
    """With a sum the gradient is that of all samples: 1 / N of it is averaged."""
    models, batches = [mlp(), mlp()], [5, 3, 4, 6, 5]
    for model, reduction in zip(models, ("mean", "sum"), strict=True):
        optimizer = decoupled(model, 3, loss_reduction=reduction)
        for seed, n in enumerate(batches):
            losses = model(randn(n, 4, seed=seed)).square().sum(1)
            (losses.mean() if reduction == "mean" else losses.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(p, q, 1e-10, "of a sum")


def test_packed_samples() -> None:
    model = mlp()
    optimizer = decoupled(model, 2)
    for _ in range(2):
        with optimizer.statistics.segments(torch.tensor([0, 2, 2, 6])):
            loss_of(model(randn(6, 4))).backward()
        assert optimizer.statistics.samples == 3
        optimizer.step()
        optimizer.zero_grad()


class Wrapped:
    """What torch does not look into."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_outputs_that_cannot_be_looked_into() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Wrapped:
            return Wrapped(self.inner(x))

    model = Opaque()
    optimizer = decoupled(model, 2)
    for _ in range(2):
        loss_of(model(randn(5, 4)).y).backward()
        assert optimizer.statistics.samples == 5
        optimizer.step()
        optimizer.zero_grad()


# What is asked at a step without squares


def test_statistics_of_a_step_without_squares() -> None:
    """An error that says what to do, and the answer once that was done."""
    model = mlp()
    optimizer = decoupled(model, 3)
    statistics = optimizer.statistics
    step(model, optimizer, randn(5, 4))
    loss_of(model(randn(5, 4, seed=1))).backward()
    weight = model[0].weight
    asked = (
        statistics.noise_scale,
        lambda: statistics.mean_square(weight),
        lambda: statistics.signal_to_noise(weight),
    )
    for ask in asked:
        with pytest.raises(RuntimeError, match="made no squares of all parameters, as every=3"):
            ask()
    optimizer.zero_grad()
    statistics.measure()
    loss_of(model(randn(5, 4, seed=1))).backward()
    other = copy.deepcopy(model)
    expected = PerSampleSquares(other)
    loss_of(other(randn(5, 4, seed=1))).backward()
    assert statistics.noise_scale() == expected.noise_scale()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model(randn(5, 4, seed=2))).backward()
    assert not statistics.measured


def test_without_an_optimizer_every_call_is_measured() -> None:
    """There is nobody to count steps."""
    model = mlp()
    statistics = PerSampleSquares(model, every=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model(randn(5, 4))).backward()
        statistics.noise_scale()
        optimizer.step()
        optimizer.zero_grad()
        statistics.reset()


# Parameters that join late


def test_a_parameter_that_is_thawed() -> None:
    """It is measured at its first step, and from then on by its own count; the others by theirs.

    Catches: squares of nothing at the first step of a parameter that others do not share.
    """
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = decoupled(model, 3)
    late, early, seen = model[0].weight, model[2].weight, []
    for seed in range(8):
        if seed == 2:
            model[0].requires_grad_(True)
        loss_of(model(randn(5, 4, seed=seed))).backward()
        gathered = [optimizer.statistics.sum_of_squares(p) is not None for p in (late, early)]
        seen.append(gathered)
        if gathered[0]:
            rows = _mean_square(model, late, randn(5, 4, seed=seed))
        optimizer.step()
        optimizer.zero_grad()
    assert [i for i, (a, _) in enumerate(seen) if a] == [2, 5]
    assert [i for i, (_, b) in enumerate(seen) if b] == [0, 3, 6]
    assert_near(optimizer.state[late]["mean_square"], rows, 1e-11, "kept")


def _mean_square(model: nn.Module, parameter: Tensor, x: Tensor) -> Tensor:
    plain = copy.deepcopy(model)
    own = dict(plain.named_parameters())[_name(model, parameter)]
    rows = [torch.autograd.grad(plain(s[None]).square().sum(), own)[0] for s in x]
    return torch.stack(rows).square().mean(0)


def _name(model: nn.Module, parameter: Tensor) -> str:
    return next(n for n, p in model.named_parameters() if p is parameter)


class Experts(nn.Module):
    """The second of two layers is used at some calls alone, and shares its weight with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.third.weight = self.second.weight
        self.use = (True, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = self.second(x).tanh() if self.use[0] else x
        return self.third(x).tanh() if self.use[1] else x


def test_shared_weights_are_measured_whole_or_not_at_all() -> None:
    """The third layer's bias comes at a step at which the shared weight has squares already.

    Catches: squares of a part of a weight's uses, where one layer is observed and another is not.
    """
    torch.manual_seed(0)
    model = Experts().double()
    optimizer = decoupled(model, 4)
    shared, bias = model.second.weight, model.third.bias
    for seed, use in enumerate([(True, False), (True, True), (True, True)]):
        model.use = use
        loss_of(model(randn(5, 4, seed=seed))).backward()
        kept = optimizer.state[shared].get("mean_square") if seed else None
        assert (optimizer.statistics.sum_of_squares(bias) is not None) == (seed == 1)
        assert (optimizer.statistics.sum_of_squares(shared) is not None) == (seed == 0)
        optimizer.step()
        optimizer.zero_grad()
        assert seed == 0 or optimizer.state[shared]["mean_square"] is kept
    assert optimizer.state[bias]["step"] == 2


def test_two_optimizers_that_take_turns() -> None:
    """Each parameter counts its own steps. Catches a phase that goes by calls of the model."""
    model = mlp()
    statistics = PerSampleSquares(model, every=2)
    optimizers = [
        BatchDecoupledAdam(layer.parameters(), **ADAM, statistics=statistics)
        for layer in (model[0], model[2])
    ]
    seen = []
    for seed in range(8):
        loss_of(model(randn(5, 4, seed=seed))).backward()
        own = optimizers[seed % 2].param_groups[0]["params"][0]
        seen.append(statistics.sum_of_squares(own) is not None)
        optimizers[seed % 2].step()
        model.zero_grad()
    assert seen == [True, True, False, False, True, True, False, False]


def test_counts_that_were_changed() -> None:
    """Between the model's call and the step: an error, and the way out of it works."""
    model = mlp()
    optimizer = decoupled(model, 3)
    step(model, optimizer, randn(5, 4))
    loss_of(model(randn(5, 4))).backward()
    for state in optimizer.state.values():
        state["step"].fill_(3)
    with pytest.raises(RuntimeError, match=r"every=3 .*measure\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.statistics.measure()
    step(model, optimizer, randn(5, 4))


def test_removed_in_the_midst_of_a_cycle() -> None:
    model = mlp()
    optimizer = decoupled(model, 3)
    step(model, optimizer, randn(5, 4))
    optimizer.statistics.remove()
    loss_of(model(randn(5, 4))).backward()
    with pytest.raises(RuntimeError, match=r"remove\(\) was called"):
        optimizer.step()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_model(compiler: str) -> None:
    """As the eager one, step after step. Catches what is traced at one kind of step for both."""
    torch._dynamo.reset()
    models = [mlp(), mlp()]
    optimizers = [decoupled(model, 3) for model in models]
    compiled = torch.compile(models[0], backend=compiler)
    for seed in range(8):
        for call, optimizer in zip((compiled, models[1]), optimizers, strict=True):
            step(call, optimizer, randn(5, 4, seed=seed))
        assert optimizers[0].statistics.measured == (seed % 3 == 0)
    assert not torch._dynamo.utils.counters["recompile_limit"]
    torch._dynamo.reset()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(p, q, 1e-12, "compiled")
