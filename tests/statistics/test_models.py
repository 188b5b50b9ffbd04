"""Squares of attention and of small models, against autograd."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from layer_parts import Factory, each_order, even_kernels
from marks import both_backends
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    check_squares,
    gather,
    randint,
    randn,
    rows_of,
    to,
    token_mean,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = even_kernels


# Attention


class Attention(nn.Module):
    def __init__(self, mode: str = "self", **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, **options)
        self.mode = mode
        self.call: dict[str, Any] = {}
        with torch.no_grad():
            for p in self.parameters():  # biases start as zeros
                p.copy_(torch.randn_like(p) / 2)

    def forward(self, query: Tensor, *memory: Tensor) -> Tensor:
        key, value = {
            "self": lambda: (query, query),
            "cross": lambda: (memory[0], memory[0]),
            "three": lambda: (memory[0], memory[1]),
        }[self.mode]()
        return self.inner(query, key, value, **self.call)[0]


ATTENTION: dict[str, dict[str, Any]] = {
    "self": {},
    "self-no-bias": {"bias": False},
    "self-no-weights": {"call": {"need_weights": False}},
    "self-weights-of-heads": {"call": {"average_attn_weights": False}},
    "self-dropout": {"dropout": 0.4},
    "self-bias-kv": {"add_bias_kv": True},
    "self-zero-attention": {"add_zero_attn": True},
    "cross": {"mode": "cross"},
    "cross-no-bias": {"mode": "cross", "bias": False},
    "three": {"mode": "three"},
    "three-dims": {"mode": "three", "kdim": 3, "vdim": 5},
    "kdim": {"mode": "three", "kdim": 3},
}


def _attention(name: str, batch_first: bool) -> tuple[Attention, list[Tensor]]:
    options = dict(ATTENTION[name])
    call = options.pop("call", {})
    model = Attention(**options, batch_first=batch_first)
    model.call = call
    inputs = [randn(3, 4, 4)]
    if model.mode != "self":
        inputs.append(randn(3, 5, options.get("kdim", 4)))
    if model.mode == "three":
        inputs.append(randn(3, 5, options.get("vdim", 4), seed=9))
    return model, inputs if batch_first else [x.transpose(0, 1) for x in inputs]


@each_order
@both_backends
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, backend: str, batch_first: bool) -> None:
    """All four projections, packed or apart: rows of q, k and v stand in one in_proj_weight."""
    model, inputs = _attention(name, batch_first)
    model, *inputs = to(DTYPES[backend], model, *inputs)
    with warnings.catch_warnings():
        if name in ("self-bias-kv", "self-zero-attention"):  # may go through torch.func
            warnings.simplefilter("ignore", UserWarning)
        gather(model, *inputs, backend=backend, batch_first=batch_first)


@each_order
@both_backends
def test_attention_with_masks(backend: str, batch_first: bool) -> None:
    """Padded keys and a causal mask; the loss ignores padded queries."""
    model, (x,) = _attention("self", batch_first)
    model, x = to(DTYPES[backend], model, x)
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]]).bool().to(DEVICE)
    causal = torch.ones(4, 4).triu(1).bool().to(DEVICE)
    model.call = {"key_padding_mask": padding, "attn_mask": causal}
    batch_dim = 0 if batch_first else 1

    def loss(out: Tensor) -> Tensor:
        out = out if batch_first else out.transpose(0, 1)
        return (out * ~padding[..., None]).square().flatten(1).sum(1) / len(out)

    gather(model, x, backend=backend, loss=loss, batch_first=batch_dim == 0)


@both_backends
def test_attention_as_the_model(backend: str) -> None:
    """Called directly, with three tensors; the output's second half is not differentiated."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    model, x, y = to(DTYPES[backend], model, randn(3, 4, 4), randn(3, 5, 4))
    gather(model, x, y, y, backend=backend)


def test_attention_weights_in_the_loss() -> None:
    """A loss on the attention weights reaches in_proj, and only it."""
    model, x = to(torch.float64, nn.MultiheadAttention(4, 2, batch_first=True), randn(3, 4, 4))
    plain = copy.deepcopy(model)

    def shares(m: nn.Module) -> Tensor:
        out, weights = m(x, x, x)
        return (out.square().sum((1, 2)) + weights.square().sum((1, 2))) / 3

    named = dict(plain.named_parameters())
    rows = dict(zip(named, rows_of(shares(plain), list(named.values())), strict=True))
    statistics = PerSampleSquares(model)
    shares(model).sum().backward()
    check_squares(statistics, model, Expected(rows))


# Models


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.3), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


MODELS: dict[str, Factory] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)),
        randn(4, 4),
    ),
    "block": lambda: (Block(), randn(3, 4, 4)),
    "conv1d": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)
        ),
        randn(3, 2, 7),
    ),
    "conv2d": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            Residual(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        randn(3, 2, 6, 5),
    ),
    "language": lambda: (LanguageModel(), randint(7, 3, 5)),
}


@both_backends
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, backend: str) -> None:
    model, x = to(DTYPES[backend], *MODELS[name]())
    gather(model, x, backend=backend)


@each_order
@both_backends
def test_block_in_both_orders(backend: str, batch_first: bool) -> None:
    x = randn(3, 5, 4)
    model, x = to(DTYPES[backend], Block(batch_first), x if batch_first else x.transpose(0, 1))
    gather(model, x, backend=backend, batch_first=batch_first)


@each_order
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_of_torch(norm_first: bool, batch_first: bool) -> None:
    """Its evaluation has a fast path that reads the weights of its children directly."""
    model = nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    x = randn(3, 5, 4)
    model, x = to(torch.float64, model, x if batch_first else x.transpose(0, 1))
    statistics = gather(model, x, backend="reference", batch_first=batch_first)
    model.eval()
    with torch.no_grad():
        model(x)
    assert statistics.samples == 3


def test_decoder_layer_of_torch() -> None:
    model = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    gather(*to(torch.float64, model, randn(3, 5, 4), randn(3, 2, 4)), backend="reference")


@both_backends
def test_language_model_with_token_mean(backend: str) -> None:
    """cross_entropy's mean over tokens: the normaliser is the batch's, the sample a sequence."""
    (model,) = to(DTYPES[backend], LanguageModel())
    targets = randint(7, 3, 5, seed=8)
    gather(model, randint(7, 3, 5), backend=backend, loss=token_mean(targets))


def test_known_modules_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("block", "conv2d", "language"):
            PerSampleSquares(MODELS[name]()[0].to(DEVICE))
