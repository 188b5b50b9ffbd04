"""``PerSampleSquares``: the squares of every supported layer and of small models, against autograd.

float64 goes through the reference at a tight tolerance, float32 through the kernels. Sizes are odd,
so that no dimension is a multiple of a tile, and batch and time differ, so that taking one for the
other is an error of shape or of value.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample import (
    BACKENDS,
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    check_squares,
    gather,
    mean_square_of,
    randint,
    randn,
    rows_by_func,
    rows_of,
    squared_error,
    to,
    token_mean,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
each_order = pytest.mark.parametrize(
    "batch_first", [True, False], ids=["batch-first", "time-first"]
)

# torch says so itself for even kernels, whose padding is one more on one side.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

Factory = Callable[[], tuple[Any, ...]]


def _norm(norm: nn.Module) -> nn.Module:
    """A norm whose gain and offset are not the ones and zeros they start as."""
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    return norm


def _evaluated(norm: nn.Module) -> nn.Module:
    norm = _norm(norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


# Module and inputs; all of them batch-first, so that torch.func can take the samples apart.
LAYERS: dict[str, Factory] = {
    "linear": lambda: (nn.Linear(5, 3), randn(4, 5)),
    "linear-time": lambda: (nn.Linear(5, 3), randn(3, 4, 5)),
    "linear-no-bias": lambda: (nn.Linear(5, 3, bias=False), randn(3, 4, 5)),
    "linear-space": lambda: (nn.Linear(3, 2), randn(3, 2, 4, 3)),
    "linear-one-sample": lambda: (nn.Linear(5, 3), randn(1, 4, 5)),
    "linear-one-token": lambda: (nn.Linear(5, 3), randn(3, 1, 5)),
    "linear-one-of-all": lambda: (nn.Linear(1, 1), randn(1, 1, 1)),
    "linear-one-feature": lambda: (nn.Linear(1, 1), randn(3, 2, 1)),
    "linear-transposed-input": lambda: (nn.Linear(5, 3), randn(5, 3, 4).permute(1, 2, 0)),
    "linear-sliced-input": lambda: (nn.Linear(5, 3), randn(6, 4, 10)[::2, :, 1:6]),
    "linear-expanded-input": lambda: (nn.Linear(5, 3), randn(3, 1, 5).expand(3, 4, 5)),
    "linear-beyond-a-tile": lambda: (nn.Linear(35, 70), randn(2, 19, 35)),
    "conv1d": lambda: (nn.Conv1d(3, 4, 3), randn(3, 3, 7)),
    "conv1d-options": lambda: (
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        randn(3, 4, 9),
    ),
    "conv1d-same": lambda: (nn.Conv1d(2, 3, 4, padding="same"), randn(3, 2, 6)),
    "conv1d-circular": lambda: (
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
        randn(3, 2, 5),
    ),
    "conv2d": lambda: (nn.Conv2d(2, 3, 3), randn(3, 2, 5, 4)),
    "conv2d-options": lambda: (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        randn(2, 4, 5, 6),
    ),
    "conv2d-depthwise": lambda: (nn.Conv2d(3, 6, 3, groups=3, padding=1), randn(3, 3, 4, 5)),
    "conv2d-pointwise": lambda: (nn.Conv2d(3, 2, 1, stride=2, bias=False), randn(3, 3, 4, 5)),
    "conv2d-same": lambda: (nn.Conv2d(2, 2, (2, 3), padding="same"), randn(3, 2, 4, 5)),
    "conv2d-valid": lambda: (nn.Conv2d(2, 2, 2, padding="valid"), randn(3, 2, 4, 3)),
    "conv2d-reflect": lambda: (
        nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="reflect"),
        randn(2, 2, 4, 5),
    ),
    "conv2d-channels-last": lambda: (
        nn.Conv2d(3, 4, 3),
        randn(2, 3, 5, 4).to(memory_format=torch.channels_last),
    ),
    "conv2d-one-position": lambda: (nn.Conv2d(2, 3, 4), randn(3, 2, 4, 4)),
    "conv2d-one-sample": lambda: (nn.Conv2d(2, 3, 2), randn(1, 2, 3, 4)),
    "layer-norm": lambda: (_norm(nn.LayerNorm(5)), randn(3, 5)),
    "layer-norm-time": lambda: (_norm(nn.LayerNorm(5)), randn(3, 4, 5)),
    "layer-norm-two-dims": lambda: (_norm(nn.LayerNorm((4, 5))), randn(3, 2, 4, 5)),
    "layer-norm-all-dims": lambda: (_norm(nn.LayerNorm((4, 5))), randn(3, 4, 5)),
    "layer-norm-no-bias": lambda: (_norm(nn.LayerNorm(5, bias=False)), randn(3, 4, 5)),
    "layer-norm-eps": lambda: (_norm(nn.LayerNorm(5, eps=0.3)), randn(1, 4, 5)),
    "rms-norm": lambda: (_norm(nn.RMSNorm(5)), randn(3, 5)),
    "rms-norm-time": lambda: (_norm(nn.RMSNorm(5, eps=0.2)), randn(3, 4, 5)),
    "rms-norm-two-dims": lambda: (_norm(nn.RMSNorm((2, 3))), randn(3, 4, 2, 3)),
    "group-norm-flat": lambda: (_norm(nn.GroupNorm(2, 6)), randn(3, 6)),
    "group-norm-1d": lambda: (_norm(nn.GroupNorm(3, 6)), randn(3, 6, 4)),
    "group-norm-2d": lambda: (_norm(nn.GroupNorm(1, 4, eps=0.2)), randn(3, 4, 2, 3)),
    "batch-norm-flat": lambda: (_evaluated(nn.BatchNorm1d(4)), randn(3, 4)),
    "batch-norm-1d": lambda: (_evaluated(nn.BatchNorm1d(4)), randn(3, 4, 5)),
    "batch-norm-2d": lambda: (_evaluated(nn.BatchNorm2d(4)), randn(3, 4, 2, 3)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_reduction
@each_layer
def test_layer_against_torch_func(name: str, reduction: str) -> None:
    """vmap of grad in float64 at 1e-11: a rule that is right only nearly is caught."""
    model, *inputs = to(torch.float64, *LAYERS[name]())
    expected = rows_by_func(copy.deepcopy(model), inputs, reduction)
    statistics = PerSampleSquares(model, reduction, backend="reference")
    backward(model, [inputs], squared_error(reduction))
    check_squares(statistics, model, Expected(expected, reduction))


@each_layer
def test_layer_in_the_kernels(name: str) -> None:
    model, *inputs = to(torch.float32, *LAYERS[name]())
    gather(model, *inputs, backend="triton")


@pytest.mark.parametrize("name", ["linear-time", "conv2d", "layer-norm-time", "batch-norm-2d"])
def test_the_two_oracles_agree(name: str) -> None:
    model, *inputs = to(torch.float64, *LAYERS[name]())
    by_func = rows_by_func(model, inputs, "mean")
    by_loop = rows_of(squared_error()(model(*inputs)), list(model.parameters()))
    for (key, rows), others in zip(by_func.items(), by_loop, strict=True):
        assert_near(rows, others, 1e-12, key)


@pytest.mark.parametrize("inputs", [32, 33, 65, 129])
@pytest.mark.parametrize("outputs", [31, 64])
@pytest.mark.parametrize("time", [1, 17, 64])
def test_linear_sizes(time: int, outputs: int, inputs: int) -> None:
    """Around multiples of tile sizes; T = 1 takes the other formula."""
    model, x = to(torch.float64, nn.Linear(inputs, outputs), randn(5, time, inputs))
    gather(model, x, backend="reference")


@pytest.mark.parametrize(
    "shape", [(2, 33, 5, 67), (9, 1, 34, 3), (1, 70, 3, 2), (33, 2, 4, 5)], ids=str
)
def test_linear_sizes_in_the_kernels(shape: tuple[int, ...]) -> None:
    """Beyond one tile in each dimension in turn: outputs, inputs, tokens, samples."""
    batch, time, inputs, outputs = shape
    model, x = to(torch.float32, nn.Linear(inputs, outputs), randn(batch, time, inputs))
    gather(model, x, backend="triton")


@both_backends
@pytest.mark.parametrize("layer", ["linear", "layer-norm", "rms-norm", "embedding"])
def test_empty_sequences(layer: str, backend: str) -> None:
    """No token is no gradient, but B samples still count. Catches a reshape that guesses -1."""
    layers = {
        "linear": lambda: (nn.Linear(5, 3), randn(3, 0, 5)),
        "layer-norm": lambda: (nn.LayerNorm(5), randn(3, 0, 5)),
        "rms-norm": lambda: (nn.RMSNorm(5), randn(3, 0, 5)),
        "embedding": lambda: (nn.Embedding(6, 2), randint(6, 3, 0)),
    }
    model, x = to(DTYPES[backend], *layers[layer]())
    statistics = gather(model, x, backend=backend)
    assert statistics.samples == 3
    for p in model.parameters():
        assert not statistics.mean_square(p).any()


@both_backends
def test_bits_are_the_gradient_of_the_whole_batch(backend: str) -> None:
    """With statistics attached the output of the model keeps its bits."""
    model, x = to(DTYPES[backend], nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), randn(3, 2, 4))
    plain = model(x)
    PerSampleSquares(model, backend=backend)
    assert torch.equal(model(x), plain)


@both_backends
def test_gradient_of_the_input(backend: str) -> None:
    """The layer still hands on the gradient of its input, and skips it where nobody asks."""
    model, x = to(DTYPES[backend], nn.Sequential(*_every_layer()), randn(3, 4, 6))
    plain = copy.deepcopy(model)
    PerSampleSquares(model, backend=backend)
    gradients = []
    for m in (plain, model):
        leaf = x.clone().requires_grad_()
        squared_error()(m(leaf)).sum().backward()
        gradients.append(leaf.grad)
    tolerance = 1e-12 if backend == "reference" else 1e-5
    assert_near(gradients[1], gradients[0], tolerance, "input")


def _every_layer() -> list[nn.Module]:
    return [
        nn.Linear(6, 4),
        nn.LayerNorm(4),
        nn.Tanh(),
        nn.RMSNorm(4),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
    ]


# Embeddings


EMBEDDINGS: dict[str, Factory] = {
    "tokens": lambda: (nn.Embedding(7, 3), randint(7, 3, 6)),
    "repeated": lambda: (nn.Embedding(2, 3), randint(2, 3, 6)),
    "one-a-sample": lambda: (nn.Embedding(7, 3), randint(7, 5)),
    "one-token": lambda: (nn.Embedding(7, 3), randint(7, 5, 1)),
    "one-sample": lambda: (nn.Embedding(3, 2), randint(3, 1, 5)),
    "more-dimensions": lambda: (nn.Embedding(4, 3), randint(4, 3, 2, 4)),
    "int32": lambda: (nn.Embedding(4, 3), randint(4, 3, 5).int()),
    "time-strided": lambda: (nn.Embedding(4, 3), randint(4, 5, 3).t()),
    "padding": lambda: (nn.Embedding(4, 3, padding_idx=1), randint(4, 3, 6)),
    "padding-from-the-end": lambda: (nn.Embedding(4, 3, padding_idx=-1), randint(4, 3, 6)),
    "padding-alone": lambda: (
        nn.Embedding(4, 3, padding_idx=0),
        torch.cat((torch.zeros(1, 5).long().to(DEVICE), randint(4, 2, 5))),
    ),
    "wide": lambda: (nn.Embedding(5, 37), randint(5, 2, 3)),
}


@each_reduction
@both_backends
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding(name: str, backend: str, reduction: str) -> None:
    """Repeated tokens are summed within a sample before they are squared; padding has no row."""
    model, ids = to(DTYPES[backend], *EMBEDDINGS[name]())
    gather(model, ids, backend=backend, reduction=reduction)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embedding_options_are_right_or_refused(options: dict[str, bool]) -> None:
    """Frequencies count over the whole batch; a sparse gradient no optimizer of ours takes."""
    ids = randint(3, 3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.Embedding(5, 3, **options)).to(DEVICE)
        try:
            PerSampleSquares(model)
            squared_error()(model(ids)).sum().backward()
        except (RuntimeError, ValueError) as error:
            assert "'0'" in str(error) or "Embedding" in str(error)
            return
    assert not options.get("sparse"), "sparse=True went through without an error"
    gather(nn.Embedding(5, 3, **options).double().to(DEVICE), ids)


@both_backends
def test_embedding_max_norm(backend: str) -> None:
    """Renormalisation happens in forward, in place: it must still happen, and once."""
    model = nn.Embedding(5, 3, max_norm=0.5).to(DEVICE, DTYPES[backend])
    ids = randint(5, 3, 4)
    try:
        gather(model, ids, backend=backend)
    except (RuntimeError, ValueError) as error:
        assert "max_norm" in str(error)


class Positions(nn.Module):
    """Tokens and positions; the ids of the positions have no batch."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.positions = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)
        self.flat = flat

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        places = places if self.flat else places[None]
        return self.head(torch.tanh(self.tokens(ids) + self.positions(places)))


@both_backends
def test_positions_without_a_batch_dimension(backend: str) -> None:
    """[1, T] ids serve every sample: each has its own row, not one row for the batch."""
    (model,) = to(DTYPES[backend], Positions(flat=False))
    gather(model, randint(5, 3, 4), backend=backend)


@pytest.mark.parametrize("tokens", [4, 3], ids=["other-than-batch", "as-many-as-samples"])
def test_flat_positions_are_right_or_refused(tokens: int) -> None:
    """[T] ids could be a batch of T; silently wrong is the one thing they may not be."""
    (model,) = to(torch.float64, Positions(flat=True))
    try:
        gather(model, randint(5, 3, tokens), backend="reference")
    except RuntimeError as error:
        assert "positions" in str(error)


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


# Parameters that are used more than once


class Twice(nn.Module):
    """One module called twice, at two different lengths."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))[:, 1:])


TWICE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "layer-norm": lambda: _norm(nn.LayerNorm(4)),
    "rms-norm": lambda: _norm(nn.RMSNorm(4)),
}


@both_backends
@pytest.mark.parametrize("name", TWICE)
def test_module_used_twice(name: str, backend: str) -> None:
    """The uses are summed before they are squared: S1 + S2 lacks the cross term."""
    gather(*to(DTYPES[backend], Twice(TWICE[name]), randn(3, 4, 4)), backend=backend)


@both_backends
def test_flat_module_used_twice(backend: str) -> None:
    """Without a time dimension the uses become one: (E**2)'(A**2) over both is not exact."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared)
    gather(*to(DTYPES[backend], model, randn(3, 4)), backend=backend)


@both_backends
def test_convolution_used_twice(backend: str) -> None:
    """On images of two sizes."""
    shared = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    gather(*to(DTYPES[backend], model, randn(3, 2, 6, 5)), backend=backend)


@both_backends
def test_group_and_batch_norm_used_twice(backend: str) -> None:
    group, batch = _norm(nn.GroupNorm(2, 4)), _evaluated(nn.BatchNorm1d(4))
    model = nn.Sequential(group, nn.Tanh(), batch, nn.Tanh(), group, nn.Tanh(), batch)
    gather(*to(DTYPES[backend], model, randn(3, 4, 3)), backend=backend)


@both_backends
def test_attention_used_twice(backend: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            y = self.inner(x, x, x)[0]
            return self.inner(y, memory, memory)[0]

    gather(*to(DTYPES[backend], Again(), randn(3, 4, 4), randn(3, 2, 4)), backend=backend)


@both_backends
def test_embedding_used_twice(backend: str) -> None:
    """Of source and target: the same token in both is one row."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat((self.embedding(a), self.embedding(b) * 2), 1)

    gather(
        *to(DTYPES[backend], Both(), randint(3, 3, 4), randint(3, 3, 2, seed=5)), backend=backend
    )


@both_backends
@pytest.mark.parametrize("time", [None, 3], ids=["flat", "time"])
def test_weight_of_two_modules(backend: str, time: int | None) -> None:
    """Shared weight, biases apart."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = randn(3, 4) if time is None else randn(3, time, 4)
    gather(*to(DTYPES[backend], model, x), backend=backend)


def test_weight_of_modules_of_different_kinds() -> None:
    """Linear and a 1x1 convolution cannot share a shape, a norm's gain and a bias can."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight = model[0].bias
    gather(*to(torch.float64, model, randn(3, 2, 4)), backend="reference")


@each_reduction
@both_backends
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_tied_embedding_and_head(backend: str, padding_idx: int | None, reduction: str) -> None:
    """S_embedding + S_head + 2 (cross term), with tokens that repeat within a sample."""
    (model,) = to(DTYPES[backend], LanguageModel(tied=True, padding_idx=padding_idx))
    ids = randint(4, 3, 6)  # of 7: some rows belong to the head alone
    targets = randint(7, 3, 6, seed=8)

    def loss(logits: Tensor) -> Tensor:
        shares = token_mean(targets)(logits)
        return shares if reduction == "mean" else shares * targets.numel()

    gather(model, ids, backend=backend, loss=loss, reduction=reduction)


def test_tied_three_ways() -> None:
    """Encoder's and decoder's embedding and the head, as in the original transformer."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(5, 4), nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.source.weight = self.target.weight = self.head.weight

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(torch.tanh(self.source(a).mean(1, keepdim=True) + self.target(b)))

    model, a, b = to(torch.float64, Translator(), randint(5, 3, 4), randint(5, 3, 3, seed=5))
    gather(model, a, b, backend="reference")


def test_module_registered_twice() -> None:
    """Under two names, in two containers, used in each."""
    shared = nn.Linear(4, 4)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(shared, nn.Tanh())
            self.b = nn.ModuleDict({"c": shared})

        def forward(self, x: Tensor) -> Tensor:
            return self.b["c"](self.a(x))

    gather(*to(torch.float64, Holder(), randn(3, 2, 4)), backend="reference")


def test_use_that_is_thrown_away() -> None:
    """A second call whose output reaches no loss adds nothing, and is no error."""

    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x * 2)
            return self.layer(x)

    gather(*to(torch.float64, Wasteful(), randn(3, 2, 4)), backend="reference")


def test_layer_that_reaches_no_loss() -> None:
    """A head without gradient: the others are exact, and it has no squares to speak of."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.body(x))
            return self.a(y), self.b(y)

    model, x = to(torch.float64, TwoHeads(), randn(3, 4))
    plain = copy.deepcopy(model)
    statistics = PerSampleSquares(model)
    backward(model, [(x,)], squared_error())
    assert model.b.weight.grad is None
    del plain.b  # autograd gives its parameters no rows at all
    plain.b = nn.Identity()
    check_squares(statistics, model, Expected.of(plain, [(x,)], squared_error()))


# Samples


@each_reduction
@both_backends
def test_tokens_as_samples(backend: str, reduction: str) -> None:
    """Every position is a sample: the same as a batch of B T samples without time."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, 4, 4))
    plain = copy.deepcopy(model)
    factor = 12 if reduction == "mean" else 1

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 3)) / factor

    expected = Expected.of(plain, [(x.reshape(12, 4),)], loss, reduction)
    statistics = PerSampleSquares(model, reduction, sample="token", backend=backend)
    backward(model, [(x,)], loss)
    check_squares(statistics, model, expected)


@both_backends
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_of_a_language_model(backend: str, tied: bool) -> None:
    (model,) = to(DTYPES[backend], LanguageModel(tied=tied))
    ids = randint(3, 3, 4)
    plain = copy.deepcopy(model)

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 7)) / 12

    expected = Expected.of(plain, [(ids.reshape(12, 1),)], loss)
    statistics = PerSampleSquares(model, sample="token", backend=backend)
    backward(model, [(ids,)], loss)
    check_squares(statistics, model, expected)


@both_backends
def test_tokens_of_a_module_used_twice(backend: str) -> None:
    shared = nn.Linear(4, 4)
    model, x = to(DTYPES[backend], nn.Sequential(shared, nn.Tanh(), shared), randn(3, 4, 4))

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out.reshape(12, 4)) / 12

    expected = Expected.of(copy.deepcopy(model), [(x.reshape(12, 4),)], loss)
    statistics = PerSampleSquares(model, sample="token", backend=backend)
    backward(model, [(x,)], loss)
    check_squares(statistics, model, expected)


def test_tokens_that_are_pooled_are_refused() -> None:
    """A layer behind the pooling has B rows and not B T: its tokens are not the samples."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(1))

    model, x = to(torch.float64, Pooled(), randn(3, 5, 4))
    PerSampleSquares(model, sample="token")
    with pytest.raises(RuntimeError, match="head"):
        model(x).sum().backward()


LENGTHS = {"ragged": [3, 1, 4], "empty-within": [2, 0, 3], "empty-ends": [0, 4, 0], "one": [5]}


@both_backends
@pytest.mark.parametrize("leading", [True, False], ids=["1-tokens", "tokens"])
@pytest.mark.parametrize("name", LENGTHS)
def test_segments(name: str, leading: bool, backend: str) -> None:
    """Packed sequences are samples; an empty one has a row of zeros and counts."""
    lengths = LENGTHS[name]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    model = nn.Sequential(
        nn.Embedding(3, 4), nn.Linear(4, 5), nn.RMSNorm(5), nn.LayerNorm(5), nn.Linear(5, 3)
    )
    model, ids = to(DTYPES[backend], model, randint(3, tokens))
    n = len(lengths)

    def loss(out: Tensor) -> Tensor:
        errors = squared_error("sum")(out.reshape(tokens, -1))
        parts = [errors[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return torch.stack(parts) / n

    expected = Expected.of(copy.deepcopy(model), [(ids,)], loss)
    statistics = PerSampleSquares(model, backend=backend)
    with statistics.segments(ends.to(DEVICE, torch.int32)):
        out = model(ids[None] if leading else ids)
    loss(out).sum().backward()
    check_squares(statistics, model, expected)


def test_segments_then_dense() -> None:
    """The context ends: the next forward has a batch dimension again, and both add up."""
    model, x = to(torch.float64, nn.Linear(4, 3), randn(6, 4))
    loss = squared_error("sum")

    def packed(out: Tensor) -> Tensor:
        errors = loss(out)
        return torch.stack((errors[:2].sum(), errors[2:].sum())) / 5

    plain = copy.deepcopy(model)
    rows = rows_of(packed(plain(x)), list(plain.parameters()))
    later = rows_of(loss(plain(x[:3])) / 5, list(plain.parameters()))
    statistics = PerSampleSquares(model)
    with statistics.segments(torch.tensor([0, 2, 6], device=DEVICE)):
        out = model(x)
    packed(out).sum().backward()
    (loss(model(x[:3])) / 5).sum().backward()
    assert statistics.samples == 5
    for p, first, second in zip(model.parameters(), rows, later, strict=True):
        q = mean_square_of(torch.cat((first, second)))
        assert_near(statistics.mean_square(p), q, 1e-11, "packed and dense")


# Modules that are not known


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
        nn.Sequential(nn.Conv1d(2, 3, 2, bias=False), _norm(nn.InstanceNorm1d(3, affine=True))),
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


def test_known_modules_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("block", "conv2d", "language"):
            PerSampleSquares(MODELS[name]()[0].to(DEVICE))


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
