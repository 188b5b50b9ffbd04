"""What may happen between a call of the model and the backward pass that its squares are of."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample import assert_near
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt import PerSampleSquares

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")
N = 5


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def observed(model: nn.Module) -> tuple[nn.Module, nn.Module, PerSampleSquares]:
    """The model, a plain copy of it, and what observes it."""
    plain = copy.deepcopy(model)
    return model, plain, PerSampleSquares(model, backend="reference")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(18, 2))


def unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def assert_squares(statistics: Any, model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Those of ``loss_of``, sample by sample on the copy."""
    rows = [torch.autograd.grad(loss_of(plain, x[i : i + 1]), plain.parameters()) for i in range(N)]
    for p, column in zip(model.parameters(), zip(*rows, strict=True), strict=True):
        expected = torch.stack(column).square().mean(0)
        assert_near(statistics.mean_square(p), expected, 1e-9, "squares")


# Backward passes that stop short of the parameters.


@pytest.mark.parametrize("make", [mlp, unknown, images])
@pytest.mark.parametrize("how", ["input", "activation"])
def test_a_partial_backward_pass_leaves_nothing(make: Callable[[], nn.Module], how: str) -> None:
    """Catches uses that wait for a parameter which that pass never reaches."""
    model, plain, statistics = observed(make())
    x = torch.randn(N, 1, 4, 4) if make is images else torch.randn(N, 4)
    x.requires_grad_()
    seen: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda *a: seen.append(a[2]))
    out = model(x)
    handle.remove()
    torch.autograd.grad(out.pow(3).sum(), x if how == "input" else seen[0], retain_graph=True)
    out.square().flatten(1).sum(1).mean().backward()
    assert_squares(statistics, model, plain, x.detach())


@pytest.mark.parametrize("make", [mlp, unknown])
def test_backward_for_one_half_and_then_the_other(make: Callable[[], nn.Module]) -> None:
    """As two networks trained against each other take turns on one graph."""
    model, plain, statistics = observed(make())
    x = torch.randn(N, 4)
    loss = loss_of(model, x)
    loss.backward(inputs=list(model[0].parameters()), retain_graph=True)
    rest = [p for layer in list(model)[1:] for p in layer.parameters()]
    loss.backward(inputs=rest)
    assert_squares(statistics, model, plain, x)


def test_second_derivatives_are_refused_at_once() -> None:
    """Catches a gradient penalty that fails within torch, with advice about something else."""
    model, _, statistics = observed(mlp())
    x = torch.randn(N, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*paused"):
        torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    with statistics.paused():
        (g,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    assert g.requires_grad


# What backward must not read again.

EDITS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None], tuple[int, ...]]] = {
    "layer-norm": (lambda: nn.LayerNorm(6), lambda m: setattr(m, "eps", 0.9), (N, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6), lambda m: setattr(m, "eps", 0.9), (N, 6)),
    "groups": (lambda: nn.GroupNorm(2, 4), lambda m: setattr(m, "num_groups", 4), (N, 4, 3)),
    "eps": (lambda: nn.GroupNorm(2, 4), lambda m: setattr(m, "eps", 0.9), (N, 4, 3)),
    "mean": (
        lambda: nn.BatchNorm1d(4).eval(),
        lambda m: setattr(m, "running_mean", torch.ones(4)),
        (N, 4, 3),
    ),
    "stride": (lambda: nn.Conv1d(2, 3, 2), lambda m: setattr(m, "stride", (2,)), (N, 2, 5)),
    "dilation": (lambda: nn.Conv1d(2, 3, 2), lambda m: setattr(m, "dilation", (2,)), (N, 2, 5)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_layer_that_is_changed_after_its_call(name: str) -> None:
    make, edit, shape = EDITS[name]
    model, plain, statistics = observed(make())
    x = torch.randn(shape)
    loss = model(x).sin().flatten(1).sum(1).mean()
    edit(model)
    loss.backward()
    rows = [
        torch.autograd.grad(plain(x[i : i + 1]).sin().sum(), plain.parameters()) for i in range(N)
    ]
    for p, column in zip(model.parameters(), zip(*rows, strict=True), strict=True):
        expected = torch.stack(column).square().mean(0)
        assert_near(statistics.mean_square(p), expected, 1e-9, name)


def test_padding_that_is_changed_after_the_call() -> None:
    model, plain, statistics = observed(nn.Embedding(4, 3, padding_idx=0))
    ids = torch.tensor([[0, 1], [1, 2], [3, 0]])
    loss = model(ids).sin().sum((1, 2)).mean()
    model.padding_idx = 2
    loss.backward()
    rows = [torch.autograd.grad(plain(x).sin().sum(), plain.weight)[0] for x in ids]
    assert_near(statistics.mean_square(model.weight), torch.stack(rows).square().mean(0), 1e-9, "")


def test_bounds_of_segments_that_are_used_again() -> None:
    """A loader may write the next batch's bounds into the same vector."""
    model, plain, statistics = observed(nn.Linear(4, 3))
    x, bounds = torch.randn(1, 9, 4), torch.tensor([0, 2, 3, 9])
    with statistics.segments(bounds):
        loss = model(x).square().sum() / 3
    bounds.copy_(torch.tensor([0, 5, 7, 9]))
    loss.backward()
    rows = [
        torch.autograd.grad(plain(x[:, a:b]).square().sum(), plain.weight)[0]
        for a, b in ((0, 2), (2, 3), (3, 9))
    ]
    assert_near(statistics.mean_square(model.weight), torch.stack(rows).square().mean(0), 1e-9, "")


# Modules of unknown kind, which are run again.


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("warm", [False, True])
def test_cached_parametrizations(warm: bool) -> None:
    """The cache holds the weight of the batch, on which a sample's own does not depend."""
    layer = nn.Linear(4, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", Twice())
    model, plain, statistics = observed(layer)
    x = torch.randn(N, 4)
    with parametrize.cached():
        if warm:
            assert model.weight.shape == (3, 4)
        loss_of(model, x).backward()
        assert parametrize._cache_enabled == 1
    assert_squares(statistics, model, plain, x)


@pytest.mark.parametrize("kind", ["instance", "spectral"])
def test_running_statistics_are_those_of_the_plain_model(kind: str) -> None:
    """Catches replays that write to the model's buffers."""
    layer: nn.Module = nn.Linear(4, 4)
    if kind == "instance":
        layer = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    else:
        layer = spectral_norm(layer)
    model, plain, statistics = observed(nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2)))
    x = torch.randn(N, 4, 4)
    for module in (model, plain):
        module(x).square().sum(1).mean().backward()
    names = [name for name, _ in plain.named_buffers()]
    assert names
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert statistics.samples == N


class Drifting(nn.Module):
    """Counts its calls in what it multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.w * (1 + self.calls)
        self.calls.add_(1)
        return y


def test_every_sample_finds_what_the_batch_found() -> None:
    """Catches a sample that is run on what the one before it has left."""
    model, plain, statistics = observed(Drifting())
    x = torch.randn(N, 4)
    loss_of(model, x).backward()
    assert float(model.calls) == 1
    expected = (2 * x.square() * plain.w).square().mean(0).detach()
    assert_near(statistics.mean_square(model.w), expected, 1e-9, "squares")


HOOKS = {
    "forward": ("register_forward_hook", lambda m, i, o: o * 3),
    "pre": ("register_forward_pre_hook", lambda m, i: (i[0] * 2,)),
    "backward": ("register_full_backward_hook", lambda m, gi, go: None),
}


@pytest.mark.parametrize("how", HOOKS)
def test_hooks_on_a_module_of_unknown_kind(how: str) -> None:
    """They are not part of what it computes, and are called as often as in the plain model."""
    register, hook = HOOKS[how]
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(how)
        return hook(*arguments)

    model, plain, statistics = observed(unknown())
    getattr(plain[1], register)(hook)
    getattr(model[1], register)(counted)
    x = torch.randn(N, 4)
    loss_of(model, x).backward()
    assert len(calls) == 1
    assert_squares(statistics, model, plain, x)


# Activation checkpoints, and several calls.


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), inner, nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.b, self.a(x), use_reentrant=self.reentrant)
        return self.c(y.tanh())


@pytest.mark.parametrize("other", [N, 3])
@pytest.mark.parametrize("waits", [True, False])
def test_a_reentrant_checkpoint_beside_another_call(other: int, waits: bool) -> None:
    """Whose part is run again is not said; the last call's is a guess."""
    model, plain, statistics = observed(Checkpointed(nn.Linear(4, 4), True))
    x = torch.randn(N, 4)
    loss = loss_of(model, x)
    kept = model(torch.randn(other, 4))
    if waits:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()
        return
    del kept
    loss.backward()
    # torch.autograd.grad does not go through these checkpoints.
    plain.reentrant = False
    assert_squares(statistics, model, plain, x)


def test_a_loss_that_is_kept_after_its_backward_pass() -> None:
    """Catches a refusal of what is only logged."""
    model, plain, statistics = observed(Checkpointed(nn.Linear(4, 4), True))
    plain.reentrant = False
    losses = []
    for _ in range(3):
        model.zero_grad()
        x = torch.randn(N, 4)
        losses.append(loss_of(model, x))
        losses[-1].backward()
        assert_squares(statistics, model, plain, x)


@pytest.mark.parametrize("sizes", [(5, 5), (5, 3)])
def test_checkpoints_of_two_calls_with_an_unknown_module(sizes: tuple[int, int]) -> None:
    """Catches a number of kept tensors that depends on the batch of the latest call."""
    model, plain, statistics = observed(Checkpointed(unknown_square(), False))
    xs = [torch.randn(n, 4) for n in sizes]
    sum(model(x).square().sum() for x in xs).backward()  # type: ignore[union-attr]
    everything = torch.cat(xs)
    rows = [
        torch.autograd.grad(plain(x.unsqueeze(0)).square().sum(), plain.parameters())
        for x in everything
    ]
    for p, column in zip(model.parameters(), zip(*rows, strict=True), strict=True):
        total = statistics.sum_of_squares(p)
        assert_near(total, torch.stack(column).square().sum(0), 1e-9, "two calls")


def unknown_square() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 4))


def test_two_threads_at_once_are_refused() -> None:
    """Catches samples of two batches that are taken for one."""
    model, plain, statistics = observed(mlp())
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert leave.wait(20)

    handle = model[1].register_forward_hook(wait)
    x = torch.randn(N, 4)
    out: list[Tensor] = []
    thread = threading.Thread(target=lambda: out.append(loss_of(model, x)))
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match="another thread"):
            model(x)
    finally:
        leave.set()
        thread.join()
    handle.remove()
    out[0].backward()
    assert_squares(statistics, model, plain, x)


# Copies, and parametrizations that come and go.


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_copy_of_a_parametrized_model_is_a_plain_one(norm: Any) -> None:
    """Parametrized classes copy in a way of their own."""
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Linear(6, 3)).eval()
    x = torch.randn(N, 4)
    statistics = PerSampleSquares(model, backend="reference")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert statistics.samples == 0 and type(twin[1]) is nn.Linear
    model(x).sum().backward()
    assert statistics.samples == N


def test_a_parametrization_that_is_taken_off() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)))
    statistics = PerSampleSquares(model, backend="reference")
    with pytest.raises(RuntimeError, match=r"remove\(\)"):
        parametrize.remove_parametrizations(model[0], "weight")
    model(torch.randn(N, 4)).sum().backward()
    assert statistics.samples == N
    statistics.remove()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("how", ["parametrization", "hook"])
def test_weights_that_are_computed_since(how: str) -> None:
    """The way out of the message is taken, and is one."""
    model = nn.Sequential(nn.Linear(4, 3))
    statistics = PerSampleSquares(model, backend="reference")
    if how == "hook":
        prune.l1_unstructured(model[0], "weight", 3)
    else:
        weight_norm(model[0])
    x = torch.randn(N, 4)
    with pytest.raises(RuntimeError, match=r"computed since.*remove\(\)"):
        model(x)
    statistics.remove()
    plain = nn.Sequential(nn.Linear(4, 3))
    if how == "hook":
        prune.identity(plain[0], "weight")
    else:
        plain = copy.deepcopy(model)
    plain.load_state_dict(model.state_dict())
    statistics = PerSampleSquares(model, backend="reference")
    loss_of(model, x).backward()
    assert_squares(statistics, model, plain, x)


def test_a_forward_of_the_module_itself() -> None:
    """As wrappers put in the place of the class's: what calls the layer then is not seen."""
    model = mlp()
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    with pytest.raises(RuntimeError, match=r"^0 \(Linear\).*before the module is wrapped"):
        PerSampleSquares(model)
    assert type(model[2]) is nn.Linear
    del model[0].forward
    model, plain, statistics = observed(model)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    x = torch.randn(N, 4)
    loss_of(model, x).backward()
    assert_squares(statistics, model, plain, x)


def test_a_model_that_is_observed_no_more() -> None:
    model, _, statistics = observed(mlp())
    optimizer = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)
    statistics.remove()
    loss_of(model, torch.randn(N, 4)).backward()
    with pytest.raises(RuntimeError, match=r"remove\(\) was called"):
        optimizer.step()
    optimizer.statistics = PerSampleSquares(model, backend="reference")
    optimizer.zero_grad()
    loss_of(model, torch.randn(N, 4)).backward()
    optimizer.step()
