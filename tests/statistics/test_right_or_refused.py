"""What ``PerSampleSquares`` cannot know: right where it can be, otherwise an error, and no step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed import Everything, adam_of, clones, pass_of, untouched
from per_sample import (
    DEVICE,
    Expected,
    assert_near,
    backward,
    check_squares,
    gather,
    mlp,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import BatchDecoupledAdam, PerSampleSquares


def _unchanged_by(optimizer: Any, model: nn.Module, match: str) -> None:
    before = clones(model.parameters())
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
        pass_of(model, x)
        optimizer.step()  # without a gradient, the stray one is skipped
        optimizer.zero_grad()
    pass_of(model, x)
    stray.grad = torch.ones_like(stray)
    _unchanged_by(optimizer, model, r"\[4\]")


def test_gradient_written_without_a_backward() -> None:
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = adam_of(model, statistics)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    _unchanged_by(optimizer, model, ".")


def test_no_gradient_at_all() -> None:
    """step() before any backward does nothing, as torch's."""
    (model,) = to(torch.float64, mlp())
    optimizer = adam_of(model, PerSampleSquares(model))
    before = clones(model.parameters())
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)


class Reshaped(nn.Module):
    """Moves the batch into the time dimension before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        # Nothing is known of where the rows of this come from.
        return self.second(self.first(x).flatten(0, 1).roll(1, 0))


def test_layer_with_another_batch_dimension() -> None:
    """[B T, D] at the second layer: refused by the layer's name."""
    model, x = to(torch.float64, Reshaped(), randn(3, 2, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="second"):
        pass_of(model, x)


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


def test_error_in_forward_does_not_poison_the_next() -> None:
    """A shape error half way through a model: the next pass starts anew."""
    model, x = to(torch.float64, Everything(), randint(7, 3, 4))
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model)

    def explode(*_: Any) -> None:
        raise KeyError("half way")

    handle = model.group.register_forward_pre_hook(explode)
    with pytest.raises(KeyError):
        model(x)
    handle.remove()
    pass_of(model, x)
    check_squares(statistics, model, expected)
    adam_of(model, statistics).step()


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
    pass_of(model, x)
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
    expected = Expected.of(untouched(model), [(x,)], squared_error())
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

    expected = Expected.of(untouched(model), [(x,)], loss)
    statistics = PerSampleSquares(model)
    backward(model, [(x[:0],), (x,), (x[:0],)], loss)
    check_squares(statistics, model, expected)


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
        adam_of(model, statistics).step()
    except RuntimeError as error:
        assert "1" in str(error)
        return
    for name, p in model.named_parameters():
        assert_near(p.grad, dict(plain.named_parameters())[name].grad, 1e-11, name)


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
    plain = untouched(model)
    try:
        optimizer = adam_of(model, statistics)
        backward(model, [(x,)], squared_error())
        squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
        optimizer.step()
    except RuntimeError as error:
        assert len(str(error)) > 20
        return
    expected = Expected.of(plain, [(x,)], squared_error())
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-11, name)


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
    optimizer = adam_of(model, statistics)

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
