"""Rows that were flattened, routed or moved: each knows its sample, or the layer is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import both_backends
from per_sample import DEVICE, DTYPES, LanguageModel, gather, randint, randn, squared_error, to
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import PerSampleSquares


class Flat(nn.Module):
    """Every layer on ``[batch * length, width]``, as OPT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        flat = self.norm(y.reshape(-1, 4))
        flat = self.third(nn.functional.dropout(torch.relu(self.second(flat)), 0.0))
        return (y.view(-1, 4) + flat).view(x.shape)


class FlatTimeFirst(Flat):
    """Rows of all samples at one time lie together."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).transpose(0, 1)
        flat = self.third(torch.relu(self.second(self.norm(y.reshape(-1, 4)))))
        return flat.view(y.shape).transpose(0, 1)


class Moved(Flat):
    """The batch second, for some layers: no size tells where it is, if length is equal."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(1, 0, 2)
        return self.third(torch.tanh(self.second(self.norm(y)))).transpose(0, 1)


class Reversed(Flat):
    """Samples change places before a layer, and change back behind it."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x), device=x.device).roll(1)
        y = self.third(torch.tanh(self.second(self.norm(self.first(x)[order]))))
        return y[order.argsort()]


def _by_index(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    (index,) = torch.where(chosen)
    return x[index], index


def _by_mask(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return x[chosen], torch.where(chosen)[0]


def _by_select(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    index = chosen.nonzero().flatten()
    return x.index_select(0, index), index


def _leading(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """As Mixtral did."""
    (index,) = torch.where(chosen)
    return x[None, index].reshape(-1, x.shape[-1]), index


ROUTES = {"index": _by_index, "mask": _by_mask, "select": _by_select, "leading": _leading}


class Mixture(nn.Module):
    """Experts that are modules, of which the last gets no tokens."""

    def __init__(self, route: Callable[..., Any] = _by_index, experts: int = 4) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(4, 4), nn.Linear(4, experts - 1)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.LayerNorm(6), nn.Linear(6, 4))
            for _ in range(experts)
        )
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        flat = self.first(x).view(-1, 4)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, index = self.route(flat, (chosen == i).any(-1))
            weight = (weights * (chosen == i))[index].sum(-1, keepdim=True)
            out = out.index_add(0, index, expert(rows) * weight)
        return out.view(x.shape)


class Attending(Flat):
    """Attention projects its output time first, whatever it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return super().forward(y)


@both_backends
@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("kind", [Attending, Flat, FlatTimeFirst, Moved, Reversed])
def test_rows(kind: Any, length: int, backend: str) -> None:
    """Where batch and length are equal, too."""
    model, x = to(DTYPES[backend], kind(), randn(3, length, 4))
    gather(model, x, backend=backend)


@both_backends
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_routed_experts(route: str, batch: int, backend: str) -> None:
    model, x = to(DTYPES[backend], Mixture(ROUTES[route]), randn(batch, 5, 4))
    gather(model, x, backend=backend)


def test_as_many_rows_as_samples() -> None:
    """An expert that gets as many rows as there are samples, of fewer of them."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            flat = self.first(x).flatten(0, 1)
            index = torch.tensor([0, 1, -1], device=x.device)
            return flat.index_add(0, index.remainder(len(flat)), self.expert(flat[index])).view(
                x.shape
            )

    model, x = to(torch.float64, Chosen(), randn(3, 5, 4))
    gather(model, x)


def test_an_expert_that_is_used_twice_with_other_rows() -> None:
    class Twice(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            y = self.experts[0](self.first(x))
            return super().forward(y) + y

    model, x = to(torch.float64, Twice(), randn(3, 5, 4))
    gather(model, x)


def test_flattened_ids_of_a_tied_embedding() -> None:
    class Tied(LanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            x = torch.tanh(self.middle(self.embedding(ids)))
            index = torch.arange(0, ids.numel(), 2, device=ids.device)
            y = self.head(x.view(-1, 5)[index])
            return self.head(x).flatten(0, 1).index_add(0, index, y).view(*ids.shape, -1)

    (model,) = to(torch.float64, Tied(tied=True))
    gather(model, randint(7, 3, 5))


def test_rows_without_a_graph() -> None:
    """What is in front is frozen."""
    model, x = to(torch.float64, nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)), randn(3, 5, 4))
    gather(model, x, loss=lambda y: squared_error()(y.view(3, 5, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_within_a_checkpoint(reentrant: bool) -> None:
    """Flattened: right. Routed by an index that the checkpoint keeps for itself: named."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.enter, self.inner = nn.Linear(4, 4), inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.enter(x), use_reentrant=reentrant)

    for inner in (Flat(), Mixture()):
        model, x = to(torch.float64, Outer(inner), randn(3, 5, 4))
        plain = copy.deepcopy(model)
        statistics = PerSampleSquares(model)
        if isinstance(inner, Mixture) and not reentrant:
            with pytest.raises(RuntimeError, match=r"inner\.experts\.0\.0 was called"):
                model(x)
            continue
        squared_error()(model(x)).sum().backward()
        rows = []
        for i in range(3):
            plain.zero_grad()
            squared_error()(plain(x))[i].backward()
            rows.append(
                {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
            )
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            own = [row.get(name, torch.zeros_like(p)) for row in rows]
            expected = 3 * torch.stack(own).square().sum(0)
            torch.testing.assert_close(statistics.mean_square(p), expected)


def test_unknown_operation_in_front() -> None:
    """Rows of which nothing is known: refused by the name of the layer that gets them."""

    class Sorted(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).flatten(0, 1).sort(0).values)

    model, x = to(torch.float64, Sorted(), randn(3, 5, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="second was called.*15 is not the model's batch size 3"):
        model(x)


def test_input_that_is_made_of_parameters_alone() -> None:
    """As many queries as samples, which share them."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.project = nn.Linear(4, 4), nn.Linear(4, 4)
            self.queries = nn.ParameterList([torch.randn(3, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.project(torch.tanh(self.queries[0])).t()

    model, x = to(torch.float64, Queries(), randn(3, 5, 4))
    with pytest.warns(UserWarning, match="torch.func"):
        PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="project.*parameters alone"):
        model(x)


# Modules of unknown kind on rows


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.weight
        return y, y.softmax(-1)


class Mixing(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.weight
        return y - y.mean(0), y


class Routed(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(4, 4), router

    def forward(self, x: Tensor) -> Tensor:
        y, weight = self.router(self.first(x).view(-1, 4))
        return (y * weight).view(x.shape)


@pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")
def test_module_of_unknown_kind_on_rows() -> None:
    model, x = to(torch.float64, Routed(Router()), randn(3, 5, 4))
    gather(model, x)


@pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")
def test_module_of_unknown_kind_that_mixes_rows() -> None:
    model, x = to(torch.float64, Routed(Mixing()), randn(3, 5, 4))
    PerSampleSquares(model)
    out = model(x)
    with pytest.raises(RuntimeError, match=r"router \(Mixing\).*mixes samples"):
        out.square().sum().backward()


# Relative positions


class Relative(nn.Module):
    """A bias of attention that samples share, as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Linear(4, 4), nn.Embedding(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.bias((places[:, None] - places).clamp(-4, 4) + 4).squeeze(-1)
        return (y @ y.transpose(1, 2) + bias).softmax(-1) @ y


class Labelled(nn.Module):
    """Ids that each sample has, made within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids.cumsum(1).remainder(9)))


@pytest.mark.parametrize("length", [3, 5])
def test_relative_positions_are_refused_by_name(length: int) -> None:
    model, x = to(torch.float64, Relative(), randn(3, length, 4))
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match=rf"bias was called with.*\({length}, {length}\)"):
        model(x)


def test_relative_positions_that_are_frozen() -> None:
    model, x = to(torch.float64, Relative(), randn(3, 3, 4))
    model.bias.requires_grad_(False)
    gather(model, x)


def test_ids_that_samples_have_are_told_apart_by_another_batch() -> None:
    model = Labelled().double().to(DEVICE)
    statistics = PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="table was called.*another size"):
        model(randint(9, 3, 3))
    model(randint(9, 2, 3))
    statistics.remove()
    gather(model, batches=[(randint(9, 2, 3),), (randint(9, 3, 3),)])


def test_ids_that_the_model_was_given() -> None:
    (model,) = to(torch.float64, LanguageModel())
    gather(model, randint(7, 3, 3))


# Calls of which every layer is seen when a checkpoint is run again


def test_every_layer_within_a_reentrant_checkpoint() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=True)

    model, x = to(torch.float64, Outer(), randn(3, 5, 4))
    statistics = PerSampleSquares(model)
    squared_error()(model(x)).sum().backward()
    plain = copy.deepcopy(model.inner)
    rows = [torch.autograd.grad(squared_error()(plain(x))[i], plain.weight)[0] for i in range(3)]
    expected = 3 * torch.stack(rows).square().sum(0)
    torch.testing.assert_close(statistics.mean_square(model.inner.weight), expected)
