"""Modules of kinds that are not known, and known ones called in other ways."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_parts import Factory, each_order, even_kernels, random_norm
from marks import both_backends
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    check_squares,
    gather,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = even_kernels


class Gain(nn.Module):
    """Parameters of its own, used in a way that no rule here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.offset = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.gain) + self.offset


class Pooling(nn.Module):
    """Parameters of its own next to layers that are known: a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.layer(torch.tanh(x))


UNKNOWN: dict[str, Factory] = {
    "gain": lambda: (nn.Sequential(nn.Linear(3, 4), Gain(), nn.Linear(4, 2)), randn(3, 2, 3)),
    "prelu": lambda: (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), randn(3, 3)),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(1, 2, 2)), randn(3, 1, 3, 2, 3)),
    "transposed": lambda: (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), randn(3, 2, 3, 2)),
    "used-twice": lambda: (nn.Sequential(*[Gain()] * 2, nn.Linear(4, 2)), randn(3, 2, 4)),
    "instance-norm": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 3, 2, bias=False), random_norm(nn.InstanceNorm1d(3, affine=True))
        ),
        randn(3, 2, 5),
    ),
    "gru": lambda: (First(nn.GRU(3, 4, batch_first=True)), randn(3, 2, 3)),
}


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)[0]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_module(name: str) -> None:
    """Through torch.func on that module alone, with a warning that says so."""
    model, *inputs = to(torch.float64, *UNKNOWN[name]())
    with pytest.warns(UserWarning, match="torch.func"):
        gather(model, *inputs)


DIFFICULT: dict[str, Factory] = {
    "lstm": lambda: (First(nn.LSTM(3, 4, batch_first=True)), randn(3, 2, 3)),
    "lstm-layers": lambda: (
        First(nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)),
        randn(3, 2, 3),
    ),
    "embedding-bag": lambda: (nn.Sequential(nn.EmbeddingBag(5, 3)), randint(5, 3, 4)),
    "adaptive": lambda: (nn.Sequential(nn.LPPool1d(2, 2), nn.PReLU()), randn(3, 2, 6).abs() + 1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", DIFFICULT)
def test_difficult_module_is_right_or_refused(name: str) -> None:
    """What torch.func may not know how to batch: an error that names the module."""
    model, *inputs = to(torch.float64, *DIFFICULT[name]())
    with pytest.warns(UserWarning, match="torch.func"):
        try:
            gather(model, *inputs)
        except RuntimeError as error:
            assert "inner" in str(error) or "0" in str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@each_order
def test_transformer_of_torch(batch_first: bool) -> None:
    """nn.Transformer whole, with masks."""
    model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=batch_first)
    source, target = randn(3, 4, 4), randn(3, 5, 4)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            padding = torch.zeros(3, 4, dtype=torch.bool, device=a.device)
            padding[1, 2:] = True
            causal = torch.ones(5, 5, device=a.device).triu(1).bool()
            return self.inner(a, b, tgt_mask=causal, src_key_padding_mask=padding)

    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    gather(
        *to(torch.float64, Masked(), source, target), backend="reference", batch_first=batch_first
    )


def test_warning_names_the_module_and_the_cost() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Gain()).to(DEVICE)
    with pytest.warns(UserWarning) as caught:
        PerSampleSquares(model)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "1" in messages[0] and "Gain" in messages[0] and "sample" in messages[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_bilinear() -> None:
    """Two inputs with a batch."""
    model, a, b = to(torch.float64, nn.Bilinear(3, 4, 2), randn(3, 3), randn(3, 4))
    with pytest.warns(UserWarning, match="Bilinear"):
        gather(model, a, b)


def test_parameters_beside_known_layers() -> None:
    """The own parameters through torch.func, or an error that names the module; never half."""
    model, x = to(torch.float64, Pooling(), randn(3, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gather(model, x)


def test_parameters_of_a_container_inside_a_model() -> None:
    model, x = to(torch.float64, nn.Sequential(nn.Linear(3, 4), Pooling()), randn(3, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gather(model, x)


def test_unknown_module_with_dropout() -> None:
    """What torch.func runs again must drop what the first run dropped."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(40))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x * self.gain, 0.5, self.training)

    model, x = to(torch.float64, nn.Sequential(nn.Linear(3, 40), Noisy()), randn(3, 3))
    with pytest.warns(UserWarning):
        try:
            gather(model, x)
        except RuntimeError as error:
            assert "'1'" in str(error) or "Noisy" in str(error)


def test_subclass_of_a_known_layer_is_not_taken_for_it() -> None:
    """Its forward is its own: the rule of the base class would be silently wrong."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * 2, self.bias)

    model, x = to(torch.float64, nn.Sequential(Doubled(4, 3)), randn(3, 2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gather(model, x)


def test_subclass_that_only_adds_a_name() -> None:
    """Subclasses that keep forward (NonDynamicallyQuantizableLinear is torch's own) are known."""

    class Named(nn.Linear):
        pass

    gather(*to(torch.float64, nn.Sequential(Named(4, 3)), randn(3, 2, 4)))


def test_model_called_with_keywords() -> None:
    """The first tensor may be a keyword's."""

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, *, input_ids: Tensor, scale: float = 1.0) -> Tensor:
            return self.layer(self.embedding(input_ids)) * scale

    (model,) = to(torch.float64, Keyword())
    plain, ids = copy.deepcopy(model), randint(5, 3, 4)

    class Positional(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids, scale=2.0)

    expected = Expected.of(Positional(plain), [(ids,)], squared_error())
    statistics = PerSampleSquares(model)
    squared_error()(model(input_ids=ids, scale=2.0)).sum().backward()
    rows = {name.removeprefix("inner."): value for name, value in expected.rows.items()}
    check_squares(statistics, model, Expected(rows))


@both_backends
def test_layer_called_with_a_keyword(backend: str) -> None:
    """``layer(input=x)`` is legal for every module."""

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(5, 4), nn.Linear(4, 3)
            self.norm = nn.LayerNorm(3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(input=self.layer(input=self.embedding(input=ids)))

    gather(*to(DTYPES[backend], Keyword(), randint(5, 3, 4)), backend=backend)
