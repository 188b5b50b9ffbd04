"""Models that are part of a larger graph, and parameters shared out among optimizers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from observed import Everything, adam_of, pass_of, untouched
from per_sample import (
    DEVICE,
    Expected,
    assert_near,
    backward,
    check_squares,
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import BatchDecoupledAdam, PerSampleSquares


def test_part_of_a_model() -> None:
    """Statistics of the backbone alone, called within a larger graph; its head is plain."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    whole = nn.Sequential(nn.Linear(4, 4).double().to(DEVICE), model, nn.Tanh())
    expected = Expected.of(copy.deepcopy(whole), [(x,)], squared_error())
    statistics = PerSampleSquares(model)
    backward(whole, [(x,)], squared_error())
    rows = {k.removeprefix("1."): v for k, v in expected.rows.items() if k.startswith("1.")}
    check_squares(statistics, model, Expected(rows))
    optimizer = adam_of(model, statistics)
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


def test_optimizer_over_some_parameters() -> None:
    """Gradients of parameters that belong to no optimizer stay where they are."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    optimizer = BatchDecoupledAdam(
        model[2].parameters(), lr=0.1, statistics=statistics, backend="reference"
    )
    expected = Expected.of(untouched(model), [(x,)], squared_error())
    pass_of(model, x)
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
    expected = Expected.of(untouched(model), [(ids,)], squared_error())
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
