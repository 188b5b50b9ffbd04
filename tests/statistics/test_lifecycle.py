"""``PerSampleSquares`` over a run: what it leaves behind, what it survives, what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample import (
    BACKENDS,
    DEVICE,
    DTYPES,
    Allocations,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    check_squares,
    gather,
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import BatchDecoupledAdam, PerSampleSquares

# torch's compiler reads .grad of whatever crosses a graph break, and torch warns of that.
graph_breaks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Everything(nn.Module):
    """A layer of each supported kind, tied embedding and head, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.twice(torch.tanh(self.twice(self.norm2(x))))
        x = self.group(torch.tanh(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x)


def _adam(model: nn.Module, statistics: Any, **options: Any) -> BatchDecoupledAdam:
    arguments = {"lr": 0.1, "betas": (0.6, 0.8), "virtual_batch_size": 2, **options}
    arguments.setdefault("backend", "reference")  # "auto" is the slow interpreter in these tests
    return BatchDecoupledAdam(model.parameters(), statistics=statistics, **arguments)


def _step(model: nn.Module, x: Tensor, loss: Any = None) -> None:
    (loss or squared_error())(model(x)).sum().backward()


def _bits(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


# Removal and copies


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def _anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have changed: classes, attributes, hooks, parameters."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        found[name, "forward"] = getattr(module.forward, "__func__", module.forward)
        found[name, "attributes"] = sorted(module.__dict__)
        found[name, "hooks"] = [len(getattr(module, hook)) for hook in HOOKS]
        found[name, "own"] = [id(p) for p in module.parameters(recurse=False)]
        found[name, "buffers"] = sorted(n for n, _ in module.named_buffers())
    for name, p in model.named_parameters():
        found[name, "parameter"] = (type(p), sorted(p.__dict__), len(p._backward_hooks or ()))
        found[name, "accumulated"] = len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
    return found


@both_backends
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_remove_leaves_the_model_as_it_was(used: bool, backend: str) -> None:
    model = to(DTYPES[backend], Everything())[0]
    ids = randint(7, 3, 4)
    before = _anatomy(model)
    names = list(model.state_dict())
    statistics = PerSampleSquares(model, backend=backend)
    assert list(model.state_dict()) == names, "attaching may not change what a checkpoint holds"
    if used:
        _step(model, ids)
        model.zero_grad()
    statistics.remove()
    assert _anatomy(model) == before
    # The graph is torch's own again.
    plain = copy.deepcopy(model)
    for m in (model, plain):
        m.zero_grad()
        _step(m, ids)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    statistics.remove()  # again: nothing happens


def test_remove_keeps_hooks_of_others() -> None:
    """And does not run them in another order, nor twice."""
    model = mlp().to(DEVICE)
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append("first"))
    statistics = PerSampleSquares(model)
    model[0].register_forward_hook(lambda *a: calls.append("second"))
    _step(model, randn(3, 4))
    assert calls == ["first", "second"]
    statistics.remove()
    _step(model, randn(3, 4))
    assert calls == ["first", "second"] * 2


def test_attach_again_after_removal() -> None:
    (model,) = to(torch.float64, Everything())
    PerSampleSquares(model).remove()
    gather(model, randint(7, 3, 4))


def test_attached_twice_is_refused_or_right() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    first = PerSampleSquares(model)
    try:
        second = PerSampleSquares(model)
    except (RuntimeError, ValueError):
        return
    _step(model, x)
    check_squares(first, model, expected)
    check_squares(second, model, expected)


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False, map_location=DEVICE),
    }


@pytest.mark.parametrize("when", ["attached", "forward", "backward"])
def test_copies_are_plain_models(when: str) -> None:
    """No statistics in a copy: it trains by autograd and adds nothing to the original's squares."""
    (model,) = to(torch.float64, Everything())
    ids = randint(7, 3, 4)
    before = _anatomy(model)
    expected = Expected.of(copy.deepcopy(model), [(ids,)], squared_error())
    statistics = PerSampleSquares(model)
    if when == "forward":
        out = model(ids)
        for name, twin in _copies(model).items():
            _check_plain(name, twin, before, ids, expected)
        squared_error()(out).sum().backward()
    else:
        if when == "backward":
            _step(model, ids)
        for name, twin in _copies(model).items():
            twin.zero_grad()
            _check_plain(name, twin, before, ids, expected)
        if when == "attached":
            _step(model, ids)
    check_squares(statistics, model, expected)


def _check_plain(name: str, twin: nn.Module, before: Any, ids: Tensor, expected: Expected) -> None:
    anatomy = _anatomy(twin)
    for key in before:
        if key[1] in ("class", "hooks", "attributes", "buffers"):
            assert anatomy[key] == before[key], f"{name}: {key}"
    _step(twin, ids)
    for key, p in twin.named_parameters():
        assert_near(p.grad, expected.rows[key].sum(0), 1e-11, f"{name}: {key}")
    assert twin.head.weight is twin.embedding.weight
    with pytest.raises(RuntimeError):  # and can be attached to, once its mode allows
        PerSampleSquares(nn.Sequential(twin, nn.BatchNorm1d(4)))
    PerSampleSquares(twin).remove()


def test_statistics_of_a_copy() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    PerSampleSquares(model)
    gather(copy.deepcopy(model), x)


def test_ema_of_the_weights() -> None:
    """AveragedModel deep-copies at construction and reads the model at every update."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = _adam(model, statistics)
    for _ in range(2):
        _step(model, x)
        optimizer.step()
        averaged.update_parameters(model)
        optimizer.zero_grad()
        with torch.no_grad():
            averaged(x)


def test_garbage_is_collected() -> None:
    """A model that nobody holds goes, with its statistics: no global table keeps it."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    _step(model, x)
    alive = [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(statistics)]
    del model, statistics
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@both_backends
def test_activations_are_freed(backend: str) -> None:
    """After backward nothing holds inputs or errors of a layer; without backward neither."""
    (model,) = to(DTYPES[backend], mlp())
    statistics = PerSampleSquares(model, backend=backend)
    x = randn(3, 4, dtype=DTYPES[backend])
    alive = weakref.ref(x)
    _step(model, x)
    del x
    gc.collect()
    assert alive() is None
    x = randn(3, 4, dtype=DTYPES[backend], seed=5)
    alive = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert alive() is None, "a forward without a backward keeps its input"
    assert statistics.samples in (3, 6)


# Zeroing and accumulation


ZERO: dict[str, Callable[[nn.Module, Any], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer-keep": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "by-hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@both_backends
@pytest.mark.parametrize("how", ZERO)
def test_zero_grad_forgets(how: str, backend: str) -> None:
    """The next step's squares are the next batch's alone, however gradients were cleared."""
    model = to(DTYPES[backend], Everything())[0]
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = _adam(model, statistics, backend=backend)
    for seed in range(3):
        ids = randint(7, 3 - seed // 2, 4, seed=seed)
        expected = Expected.of(_plain(model), [(ids,)], squared_error())
        _step(model, ids)
        check_squares(statistics, model, expected)
        optimizer.step()
        ZERO[how](model, optimizer)


def _plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def test_zero_grad_with_forward_pending() -> None:
    """zero_grad() between forward and backward, as many loops have it."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    for _ in range(3):
        expected = Expected.of(_plain(model), [(x,)], squared_error())
        loss = squared_error()(model(x)).sum()
        optimizer.zero_grad()
        loss.backward()
        check_squares(statistics, model, expected)
        optimizer.step()


def test_zeroed_gradients_without_the_optimizer() -> None:
    """model.zero_grad(set_to_none=False): gradients are zeros, squares are not: refuse or reset.

    Silently adding the last step's squares to the next one's would be the mistake.
    """
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    _step(model, x)
    optimizer.step()
    model.zero_grad(set_to_none=False)
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    try:
        _step(model, x)
        optimizer_error = None
        squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
        optimizer.step()
    except RuntimeError as error:
        optimizer_error = str(error)
        assert "zero_grad" in optimizer_error
        return
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-11, name)


def test_step_twice_on_one_gradient() -> None:
    """As torch allows; the second step has the same squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    _step(model, x)
    squares = _bits(statistics.mean_square(p) for p in model.parameters())
    optimizer.step()
    optimizer.step()
    for p, q in zip(model.parameters(), squares, strict=True):
        assert torch.equal(statistics.mean_square(p), q)


def test_reset_by_hand() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    _step(model, x)
    assert statistics.samples == 3
    statistics.reset()
    assert statistics.samples == 0
    model.zero_grad()
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    _step(model, x)
    check_squares(statistics, model, expected)


@both_backends
def test_evaluation_in_between(backend: str) -> None:
    """no_grad and inference_mode forwards between forward, backward and step count nothing."""
    model = to(DTYPES[backend], Everything())[0]
    ids, other = randint(7, 3, 4), randint(7, 5, 2, seed=4)
    expected = Expected.of(_plain(model), [(ids,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            model(other)
        with torch.inference_mode():
            model(other)
        model.train()

    evaluate()
    out = model(ids)
    evaluate()
    squared_error()(out).sum().backward()
    evaluate()
    check_squares(statistics, model, expected)
    _adam(model, statistics, backend=backend).step()


def test_evaluation_with_gradients_but_no_backward() -> None:
    """A forward whose graph is dropped is no sample."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    model(randn(5, 4))
    _step(model, x)
    check_squares(statistics, model, expected)


def test_two_forwards_before_their_backwards() -> None:
    """As in contrastive or adversarial training: each graph remembers its own batch."""
    model, x = to(torch.float64, mlp(), randn(5, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(_plain(model), [(x[:3],), (x[3:],)], loss)
    for order in ((0, 1), (1, 0)):
        twin = copy.deepcopy(model)
        statistics = PerSampleSquares(twin)
        losses = [loss(twin(x[:3])).sum(), loss(twin(x[3:])).sum()]
        for place in order:
            losses[place].backward()
        check_squares(statistics, twin, expected)


def test_one_backward_through_two_forwards() -> None:
    """The sum of two losses: five samples, not three or two."""
    model, x = to(torch.float64, mlp(), randn(5, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(_plain(model), [(x[:3],), (x[3:],)], loss)
    statistics = PerSampleSquares(model)
    (loss(model(x[:3])).sum() + loss(model(x[3:])).sum()).backward()
    check_squares(statistics, model, expected)


def test_autograd_grad_adds_nothing_unseen() -> None:
    """torch.autograd.grad wants the input's gradient: p.grad stays, and so should the squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    leaf = x.clone().requires_grad_()
    try:
        (sensitivity,) = torch.autograd.grad(model(leaf).sum(), leaf)
    except RuntimeError as error:
        assert str(error)
        return
    assert sensitivity.shape == x.shape
    model.zero_grad()
    statistics.reset()
    _step(model, x)
    check_squares(statistics, model, expected)


def test_input_gradient_alone_does_not_count() -> None:
    """Without a reset in between: what reached no p.grad is in no square, or is refused."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    leaf = x.clone().requires_grad_()
    try:
        torch.autograd.grad(model(leaf).sum(), leaf)
        _step(model, x)
        optimizer.step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    for name, p in model.named_parameters():
        assert_near(statistics.mean_square(p), expected.mean_square(name), 1e-11, name)


# Changes of the model during a run


def test_unfreezing_and_freezing() -> None:
    """requires_grad may change between steps."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    model[0].requires_grad_(False)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    for frozen in (True, False, True):
        model[0].requires_grad_(not frozen)
        optimizer.zero_grad()
        expected = Expected.of(_plain(model), [(x,)], squared_error())
        _step(model, x)
        check_squares(statistics, model, expected)
        optimizer.step()


def test_load_state_dict_and_data_swaps() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    model[0].weight.data = torch.randn_like(model[0].weight)
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    _step(model, x)
    check_squares(statistics, model, expected)


def test_move_to_another_type_after_attaching() -> None:
    """model.to(dtype) keeps the parameters and swaps their data."""
    model, x = mlp(torch.float32), randn(3, 4)
    statistics = PerSampleSquares(model, backend="reference")
    model.double()
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    _step(model, x)
    check_squares(statistics, model, expected)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(dtype: torch.dtype, backend: str) -> None:
    """Squares in float32, not in the 16 bits of the gradients, where 1e-4**2 is 0."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model, x = to(dtype, model, randn(4, 3, 6))
    wide = copy.deepcopy(model).double()

    def small(out: Tensor) -> Tensor:
        return (out.double() * 1e-3).sum((1, 2)) / len(out)

    expected = Expected.of(wide, [(x.double(),)], small)
    statistics = PerSampleSquares(model, backend=backend)
    backward(model, [(x,)], small)
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.02
    for name, p in model.named_parameters():
        q = statistics.mean_square(p)
        assert q.dtype == torch.float32
        assert_near(q, expected.mean_square(name), tolerance, name)
        assert q.max() > 0


# Checkpointing, autocast and compilation, around whole models


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = Everything()
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embedding(ids)
        x = checkpoint(self._twice, x, use_reentrant=self.reentrant)
        x = checkpoint(lambda x: inner.attention(x, x, x)[0], x, use_reentrant=self.reentrant)
        return inner.head(inner.norm1(x))

    def _twice(self, x: Tensor) -> Tensor:
        return self.inner.twice(torch.tanh(self.inner.twice(self.inner.norm2(x))))


@both_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_model_over_steps(reentrant: bool, backend: str) -> None:
    """Accumulation over two passes, two steps: nothing of the recomputation is left over."""
    model = to(DTYPES[backend], Checkpointed(reentrant))[0]
    for module in (model.inner.conv, model.inner.group):
        module.requires_grad_(False)
    batches = [(randint(7, 3, 4),), (randint(7, 2, 4, seed=9),)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    statistics = PerSampleSquares(model, backend=backend)
    optimizer = _adam(model, statistics, backend=backend, lr=0.01)
    for _ in range(2):
        plain = _plain(model)
        plain.inner.conv, plain.inner.group = nn.Identity(), nn.Identity()
        expected = Expected.of(_Unchecked(plain), batches, loss)
        rows = {k.removeprefix("plain."): v for k, v in expected.rows.items()}
        backward(model, batches, loss)
        check_squares(statistics, model, Expected(rows))
        optimizer.step()
        optimizer.zero_grad()


class _Unchecked(nn.Module):
    def __init__(self, plain: Checkpointed) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.plain.inner
        x = inner.twice(torch.tanh(inner.twice(inner.norm2(inner.embedding(ids)))))
        return inner.head(inner.norm1(inner.attention(x, x, x)[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_whole_model_checkpointed_from_outside(reentrant: bool) -> None:
    """checkpoint(model, x): the model itself is called twice, once in backward."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    leaf = x.clone().requires_grad_()  # reentrant checkpointing needs one
    squared_error()(checkpoint(model, leaf, use_reentrant=reentrant)).sum().backward()
    check_squares(statistics, model, expected)


@both_backends
def test_autocast_over_every_layer(backend: str) -> None:
    """Against rows under the same autocast: norms in float32, products in bfloat16."""
    model = to(torch.float32, Everything())[0]
    ids = randint(7, 3, 4)

    def loss(out: Tensor) -> Tensor:
        return squared_error()(out.float())

    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = Expected.of(_plain(model), [(ids,)], loss)
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(ids)
    loss(out).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)


def test_autocast_equals_plain_autocast() -> None:
    """The gradients are those of the same model under the same autocast, to bfloat16's rounding."""
    model = to(torch.float32, Everything())[0]
    plain, ids = copy.deepcopy(model), randint(7, 3, 4)
    PerSampleSquares(model)
    for m in (plain, model):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = m(ids)
        squared_error()(out.float()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype == torch.float32
        assert_near(p.grad, q.grad, 0.05, name)


@pytest.mark.slow
@graph_breaks
def test_compiled_model_with_everything() -> None:
    """Graph breaks or not: values as eager, over accumulation and evaluation."""
    torch._dynamo.reset()
    (model,) = to(torch.float64, Everything())
    batches = [(randint(7, 3, 4),), (randint(7, 2, 4, seed=9),)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 5

    expected = Expected.of(_plain(model), batches, loss)
    statistics = PerSampleSquares(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        statistics.reset()
        with torch.no_grad():
            compiled(batches[0][0])
        backward(compiled, batches, loss)
        check_squares(statistics, model, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@graph_breaks
def test_module_compiled_in_place() -> None:
    """model.compile(), and a compiled submodule."""
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    model.compile(backend="aot_eager")
    _step(model, x)
    check_squares(statistics, model, expected)
    torch._dynamo.reset()


# Errors


def _unchanged_by(optimizer: Any, model: nn.Module, match: str) -> None:
    before = _bits(model.parameters())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    for p, b, g in zip(model.parameters(), before, gradients, strict=True):
        assert torch.equal(p.detach(), b)
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)
    after = optimizer.state_dict()["state"]
    assert set(after) == set(state)
    for key, values in state.items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(after[key][name]), torch.as_tensor(value))


@pytest.mark.parametrize("steps", [0, 1])
def test_gradient_without_squares(steps: int) -> None:
    """A parameter of no module of the model: named, and no other parameter moves."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    stray = nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam([*model.parameters(), stray], statistics=statistics)
    for _ in range(steps):
        _step(model, x)
        optimizer.step()  # without a gradient, the stray one is skipped
        optimizer.zero_grad()
    _step(model, x)
    stray.grad = torch.ones_like(stray)
    _unchanged_by(optimizer, model, r"\[4\]")


def test_gradient_written_without_a_backward() -> None:
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    _unchanged_by(optimizer, model, ".")


def test_no_gradient_at_all() -> None:
    """step() before any backward does nothing, as torch's."""
    (model,) = to(torch.float64, mlp())
    optimizer = _adam(model, PerSampleSquares(model))
    before = _bits(model.parameters())
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)


class Reshaped(nn.Module):
    """Moves the batch into the time dimension before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).flatten(0, 1))


def test_layer_with_another_batch_dimension() -> None:
    """[B T, D] at the second layer: refused by the layer's name."""
    model, x = to(torch.float64, Reshaped(), randn(3, 2, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="second"):
        _step(model, x)


def test_layer_with_another_batch_dimension_is_fine_without_gradients() -> None:
    model, x = to(torch.float64, Reshaped(), randn(3, 2, 4))
    PerSampleSquares(model)
    with torch.no_grad():
        model(x)


def test_module_called_outside_the_model() -> None:
    """Its batch is unknown: refused with gradients on, allowed without."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    PerSampleSquares(model)
    with torch.no_grad():
        model[0](x)
    with pytest.raises(RuntimeError, match="0"):
        model[0](x).sum().backward()


def test_two_backward_passes_through_one_forward() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    out = model(x)
    out[:, 0].square().mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        out[:, 1].square().mean().backward()
        optimizer.step()


def test_error_in_forward_does_not_poison_the_next() -> None:
    """A shape error half way through a model: the next pass starts anew."""
    model, x = to(torch.float64, Everything(), randint(7, 3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)

    def explode(*_: Any) -> None:
        raise KeyError("half way")

    handle = model.group.register_forward_pre_hook(explode)
    with pytest.raises(KeyError):
        model(x)
    handle.remove()
    _step(model, x)
    check_squares(statistics, model, expected)
    _adam(model, statistics).step()


def test_model_without_tensor_input() -> None:
    """Nothing but its layers says what the batch is: theirs, or an error."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self) -> Tensor:
            return self.layer(randn(2, 4))

    (model,) = to(torch.float64, Constant())
    try:
        gather(model, batches=[()])
    except RuntimeError as error:
        assert "layer" in str(error) or "tensor" in str(error)


def test_mean_square_of_a_stranger() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    _step(model, x)
    with pytest.raises((RuntimeError, KeyError, ValueError)):
        statistics.mean_square(nn.Parameter(torch.ones(2)))


UNBATCHED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(4, 3), randn(4)),
    "layer-norm": lambda: (nn.LayerNorm(4), randn(4)),
    "conv2d": lambda: (nn.Conv2d(2, 3, 2), randn(2, 4, 3)),
    "conv1d": lambda: (nn.Conv1d(2, 3, 2), randn(2, 4)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_inputs_without_a_batch_are_refused(name: str) -> None:
    """A single sample without its dimension: its features or channels are not samples."""
    model, x = to(torch.float64, nn.Sequential(UNBATCHED[name]()[0]), UNBATCHED[name]()[1])
    plain = copy.deepcopy(model)
    statistics = PerSampleSquares(model)
    try:
        model(x).square().sum().backward()
    except RuntimeError as error:
        assert "0" in str(error)
        return
    # Or taken for one sample.
    plain(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(statistics.mean_square(p), q.grad.square(), 1e-11, "one sample")


def test_attention_without_a_batch_is_refused() -> None:
    """[T, D]: T is not the batch."""
    model, x = to(torch.float64, nn.MultiheadAttention(4, 2, batch_first=True), randn(5, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError):
        model(x, x, x)[0].sum().backward()


@pytest.mark.parametrize("width", [4, 3], ids=["other-than-batch", "as-wide-as-the-batch"])
def test_pooled_head_of_a_time_first_model(width: int) -> None:
    """[T, B, D] pooled over time to [B, D]: dimension 1 is no batch there. Right, or refused."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).mean(0))

    model, x = to(torch.float64, Pooled(), randn(5, 3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, batch_first=False)
    try:
        squared_error()(model(x)).sum().backward()
    except RuntimeError as error:
        assert "head" in str(error)
        return
    check_squares(statistics, model, expected)


def test_empty_batch_among_others() -> None:
    """No sample adds nothing."""
    model, x = to(torch.float64, mlp(), randn(3, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 3

    expected = Expected.of(_plain(model), [(x,)], loss)
    statistics = PerSampleSquares(model)
    backward(model, [(x[:0],), (x,), (x[:0],)], loss)
    check_squares(statistics, model, expected)


def test_part_of_a_model() -> None:
    """Statistics of the backbone alone, called within a larger graph; its head is plain."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    whole = nn.Sequential(nn.Linear(4, 4).double().to(DEVICE), model, nn.Tanh())
    expected = Expected.of(copy.deepcopy(whole), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    backward(whole, [(x,)], squared_error())
    rows = {k.removeprefix("1."): v for k, v in expected.rows.items() if k.startswith("1.")}
    check_squares(statistics, model, Expected(rows))
    optimizer = _adam(model, statistics)
    optimizer.step()


def test_two_models_in_one_graph() -> None:
    """Generator and critic, each with statistics of its own."""
    first, x = to(torch.float64, mlp(), randn(3, 4))
    (second,) = to(torch.float64, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    both = nn.Sequential(copy.deepcopy(first), copy.deepcopy(second))
    expected = Expected.of(both, [(x,)], squared_error())
    sources = [PerSampleSquares(first), PerSampleSquares(second)]
    squared_error()(second(first(x))).sum().backward()
    for place, (statistics, model) in enumerate(zip(sources, (first, second), strict=True)):
        mark = f"{place}."
        rows = {k.removeprefix(mark): v for k, v in expected.rows.items() if k.startswith(mark)}
        check_squares(statistics, model, Expected(rows))


@pytest.mark.parametrize("zero_between", [False, True])
def test_two_optimizers_of_one_model(zero_between: bool) -> None:
    """Half of the parameters each. Zeroing one's may not silently take the other's squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    twin = copy.deepcopy(model)
    statistics = PerSampleSquares(model)
    parts = [list(model[i].parameters()) for i in (0, 2)]
    optimizers = [
        BatchDecoupledAdam(
            p, lr=0.1, statistics=statistics, virtual_batch_size=2, backend="reference"
        )
        for p in parts
    ]
    other = BatchDecoupledAdam(
        twin.parameters(),
        lr=0.1,
        statistics=PerSampleSquares(twin),
        virtual_batch_size=2,
        backend="reference",
    )
    for _ in range(2):
        for m in (model, twin):
            backward(m, [(x,)], squared_error())
        other.step()
        other.zero_grad()
        try:
            for optimizer in optimizers:
                optimizer.step()
                if zero_between:
                    optimizer.zero_grad()
        except RuntimeError as error:
            assert zero_between and len(str(error)) > 20
            return
        if not zero_between:
            for optimizer in optimizers:
                optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(p, q, 1e-11, "two optimizers")


class Counting(nn.Module):
    """Unknown, with a buffer that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.sin(x * self.gain)


def test_unknown_module_changes_its_buffers_once() -> None:
    """What torch.func runs again is a calculation, and no training step."""
    model, x = to(torch.float64, nn.Sequential(nn.Linear(4, 5), Counting()), randn(3, 4))
    with pytest.warns(UserWarning, match="torch.func"):
        statistics = PerSampleSquares(model)
    try:
        backward(model, [(x,)], squared_error())
    except RuntimeError as error:
        assert "Counting" in str(error) or "1" in str(error)
        return
    assert model[1].calls == 1
    assert statistics.samples == 3


class Coupled(nn.Module):
    """Unknown, and normalises over the batch: no sample has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.gain


def test_unknown_module_that_couples_samples() -> None:
    """The gradient stays autograd's; squares that do not belong to it are refused."""
    model, x = to(torch.float64, nn.Sequential(nn.Linear(4, 4), Coupled()), randn(3, 4))
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="torch.func"):
        statistics = PerSampleSquares(model)
    backward(plain, [(x,)], squared_error())
    try:
        backward(model, [(x,)], squared_error())
        statistics.mean_square(model[1].gain)
        _adam(model, statistics).step()
    except RuntimeError as error:
        assert "1" in str(error)
        return
    for name, p in model.named_parameters():
        assert_near(p.grad, dict(plain.named_parameters())[name].grad, 1e-11, name)


@both_backends
def test_gradient_accumulates_onto_what_is_there(backend: str) -> None:
    """p.grad keeps its tensor over passes, as torch's does."""
    (model,) = to(DTYPES[backend], mlp())
    x = randn(3, 4, dtype=DTYPES[backend])
    PerSampleSquares(model, backend=backend)
    _step(model, x)
    before = [p.grad for p in model.parameters()]
    values = _bits(before)
    _step(model, x)
    for p, g, v in zip(model.parameters(), before, values, strict=True):
        assert p.grad is g
        assert_near(p.grad, 2 * v, 1e-6, "accumulated")


def test_inputs_changed_in_place_are_found() -> None:
    """autograd's own check: an input of a layer that was overwritten before backward."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    PerSampleSquares(model)
    loss = squared_error()(model(x)).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="in-?place|modified"):
        loss.backward()


def test_parameters_changed_between_forward_and_backward() -> None:
    """A step in between: torch refuses where a layer needs its weight for the input's gradient."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    PerSampleSquares(model)
    loss = squared_error()(model(x)).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="in-?place|modified"):
        loss.backward()


def test_retained_graph() -> None:
    """retain_graph=True alone is no second pass."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)
    loss = squared_error()(model(x)).sum()
    loss.backward(retain_graph=True)
    check_squares(statistics, model, expected)
    optimizer.step()
    optimizer.zero_grad()
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    backward(model, [(x,)], squared_error())
    check_squares(statistics, model, expected)


def test_backward_to_some_parameters() -> None:
    """backward(inputs=...): the others have neither gradient nor squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    weight = model[2].weight
    try:
        squared_error()(model(x)).sum().backward(inputs=[weight])
        square = statistics.mean_square(weight).clone()
        _adam(model, statistics).step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    assert model[0].weight.grad is None
    assert_near(weight.grad, expected.rows["2.weight"].sum(0), 1e-11, "gradient")
    assert_near(square, expected.mean_square("2.weight"), 1e-11, "square")


def test_functional_call() -> None:
    """Other tensors in the place of the parameters: their gradients are right, or it is refused."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    plain = copy.deepcopy(model)
    PerSampleSquares(model)
    gradients = []
    try:
        for m in (plain, model):
            values = {k: (v * 2).detach().requires_grad_() for k, v in m.named_parameters()}
            out = torch.func.functional_call(m, values, (x,))
            gradients.append(torch.autograd.grad(squared_error()(out).sum(), values.values()))
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    for a, b in zip(*gradients, strict=True):
        assert_near(b, a, 1e-11, "functional")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", ["parameter", "module", "added"])
def test_model_edited_after_attaching(change: str) -> None:
    """A new parameter or layer: observed, or refused by step(); never stepped without squares."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    if change == "parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    elif change == "module":
        model[0] = nn.Linear(4, 5).double().to(DEVICE)
    else:
        model.append(nn.Linear(3, 3).double().to(DEVICE))
    plain = _plain(model)
    try:
        optimizer = _adam(model, statistics)
        backward(model, [(x,)], squared_error())
        squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
        optimizer.step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    expected = Expected.of(plain, [(x,)], squared_error())
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-11, name)


def test_optimizer_over_some_parameters() -> None:
    """Gradients of parameters that belong to no optimizer stay where they are."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(
        model[2].parameters(), lr=0.1, statistics=statistics, backend="reference"
    )
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    _step(model, x)
    optimizer.step()
    for name in ("2.weight", "2.bias"):
        p = dict(model.named_parameters())[name]
        q = expected.mean_square(name)
        assert_near(optimizer.state[p]["exp_avg_sq"], 0.001 * q, 1e-11, name)


@pytest.mark.parametrize("context", ["save_on_cpu", "saved_tensors_hooks", "anomaly"])
def test_saved_tensors_go_through_autograd(context: str) -> None:
    """What a layer keeps for backward is offloaded like any saved tensor, and checked for nan."""
    (model,) = to(torch.float64, Everything())
    ids = randint(7, 3, 4)
    expected = Expected.of(_plain(model), [(ids,)], squared_error())
    statistics = PerSampleSquares(model)
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor.clone()

    manager = {
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
        "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    }[context]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with manager():
            loss = squared_error()(model(ids)).sum()
            loss.backward()
    check_squares(statistics, model, expected)
    assert len(packed) > 10 or context != "saved_tensors_hooks"


def test_branches_with_backward_passes_of_their_own() -> None:
    """Two heads without a common part: two backward passes, one forward, three samples."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, x = to(torch.float64, Heads(), randn(3, 4))
    plain = copy.deepcopy(model)
    parts = {}
    for place, head in enumerate((plain.a, plain.b)):
        shares = squared_error()(plain(x)[place])
        weights, biases = rows_of(shares, list(head.parameters()))
        parts |= {f"{'ab'[place]}.weight": weights, f"{'ab'[place]}.bias": biases}
    statistics = PerSampleSquares(model)
    try:
        for out in model(x):
            squared_error()(out).sum().backward()
    except RuntimeError as error:
        assert "backward" in str(error)
        return
    check_squares(statistics, model, Expected(parts))


def test_first_input_that_has_no_batch() -> None:
    """A 0-d tensor, numbers or a dictionary in front: the batch is the first tensor's with one."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, scale: Any, batch: Any) -> Tensor:
            return self.inner(batch["x"] if isinstance(batch, dict) else batch) * scale

    x = randn(3, 4)
    for scale, batch in ((2.0, x), (torch.tensor(2.0, device=DEVICE), x), (2.0, {"x": x})):
        (model,) = to(torch.float64, Scaled())
        gather(model, scale, batch)


@pytest.mark.slow
@graph_breaks
def test_compiled_before_attaching() -> None:
    """A graph that was compiled without statistics is not used with them, nor the other way."""
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    compiled = torch.compile(model, backend="aot_eager")
    _step(compiled, x)
    model.zero_grad()
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    backward(compiled, [(x,)], squared_error())
    check_squares(statistics, model, expected)
    statistics.remove()
    model.zero_grad()
    _step(compiled, x)
    for name, p in model.named_parameters():
        assert_near(p.grad, expected.rows[name].sum(0), 1e-11, name)
    torch._dynamo.reset()


@pytest.mark.slow
@graph_breaks
def test_attached_to_the_compiled_wrapper() -> None:
    torch._dynamo.reset()
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(_plain(model), [(x,)], squared_error())
    compiled = torch.compile(model, backend="aot_eager")
    statistics = PerSampleSquares(compiled)
    backward(compiled, [(x,)], squared_error())
    check_squares(statistics, model, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_complex_parameters_are_right_or_refused(dtype: torch.dtype) -> None:
    """A complex gradient's square is that of real and imaginary part, each, as in torch.optim."""
    model = nn.Sequential(nn.Linear(3, 2, dtype=dtype)).to(DEVICE)
    x = torch.complex(randn(4, 3), randn(4, 3, seed=8)).to(dtype)
    plain = copy.deepcopy(model)
    rows = [
        torch.autograd.grad(plain(x)[i].abs().square().sum() / 4, list(plain.parameters()))
        for i in range(4)
    ]
    try:
        statistics = PerSampleSquares(model, backend="reference")
        (model(x).abs().square().sum() / 4).backward()
        squares = [statistics.mean_square(p) for p in model.parameters()]
    except (RuntimeError, TypeError) as error:
        assert "complex" in str(error) or "0" in str(error)
        return
    for place, q in enumerate(squares):
        parts = torch.stack([torch.view_as_real(r[place]) for r in rows])
        expected = 4 * parts.square().sum(0)
        actual = torch.view_as_real(q) if q.is_complex() else q
        assert_near(actual, expected, 1e-5, f"complex {place}")


def test_double_backward_is_refused_or_right() -> None:
    """create_graph=True: a gradient penalty's second pass through the layers is no plain row."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    plain = copy.deepcopy(model)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model, statistics)

    def penalty(m: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        return g.square().sum(1).mean()

    penalty(plain).backward()
    try:
        penalty(model).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                assert p.grad is not None, "the gradient of the penalty is lost"
                assert_near(p.grad, q.grad, 1e-11, "penalty")
        with pytest.raises(RuntimeError):
            optimizer.step()
    except RuntimeError as error:
        assert len(str(error)) > 10


# Memory


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 16, 3), nn.Conv2d(16, 24, 3)
        self.norm, self.head = nn.GroupNorm(4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.second(self.first(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language = LanguageModel(64, 24, tied=True)
        self.norm = nn.LayerNorm(64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.language(ids))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


HUNGRY: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "flat": lambda: (nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 8)), randn(16, 40)),
    "time": lambda: (nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 8)), randn(8, 3, 40)),
    "embedding": lambda: (LanguageModel(97, 16), randint(97, 12, 3)),
    "tied": lambda: (Tied(), randint(64, 8, 3)),
    "twice": lambda: (Reused(), randn(8, 3, 32)),
    "twice-flat": lambda: (Reused(), randn(8, 32)),
    "attention": lambda: (Attending(), randn(8, 3, 24)),
    "convolution": lambda: (Convolutional(), randn(6, 12, 6, 5)),
    "norms": lambda: (nn.Sequential(nn.LayerNorm(64), nn.RMSNorm(64)), randn(16, 64)),
}


@both_backends
@pytest.mark.parametrize("name", [n for n in HUNGRY if n != "norms"])
def test_no_allocation_of_batch_times_parameter(name: str, backend: str) -> None:
    """Every operation of two training steps: forward, backward, statistics, update, zero_grad.

    A [batch, *param] of the largest parameter is exactly the bound. The same check on a step with
    torch.func per-sample gradients must trip it, or it would show nothing.
    """
    model, x = to(torch.float32, *HUNGRY[name]())
    largest = max(p.numel() for p in model.parameters())
    bound = len(x) * largest
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = _adam(model, statistics, backend=backend)
    with Allocations() as seen, torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            squared_error()(model(x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < seen.largest < bound, f"{seen.what}: {seen.largest} of {bound}"
    assert seen.largest >= largest


def test_the_allocation_check_sees_per_sample_gradients() -> None:
    model, x = to(torch.float32, *HUNGRY["time"]())
    values = {k: p.detach() for k, p in model.named_parameters()}

    def loss(values: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x[None],)).square().sum()

    with Allocations() as seen:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    assert seen.largest >= len(x) * max(p.numel() for p in model.parameters())


@both_backends
def test_squares_take_four_bytes_an_element(backend: str) -> None:
    """Between steps no more is kept than the squares themselves."""
    model, x = to(torch.float32, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model, backend=backend)
    _step(model, x)
    for p in model.parameters():
        q = statistics.mean_square(p)
        assert q.shape == p.shape and q.dtype == torch.float32
        assert q.device == p.device
        assert not q.requires_grad
