"""``PerSampleSquares``: the squares of every supported layer and of small models, against autograd.

float64 goes through the reference at a tight tolerance, float32 through the kernels. Sizes are odd,
so that no dimension is a multiple of a tile, and batch and time differ, so that taking one for the
other is an error of shape or of value.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_parts import Factory, evaluated_norm, even_kernels, random_norm
from marks import both_backends, each_reduction
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    assert_near,
    backward,
    check_squares,
    gather,
    randint,
    randn,
    rows_by_func,
    rows_of,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = even_kernels

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
    "layer-norm": lambda: (random_norm(nn.LayerNorm(5)), randn(3, 5)),
    "layer-norm-time": lambda: (random_norm(nn.LayerNorm(5)), randn(3, 4, 5)),
    "layer-norm-two-dims": lambda: (random_norm(nn.LayerNorm((4, 5))), randn(3, 2, 4, 5)),
    "layer-norm-all-dims": lambda: (random_norm(nn.LayerNorm((4, 5))), randn(3, 4, 5)),
    "layer-norm-no-bias": lambda: (random_norm(nn.LayerNorm(5, bias=False)), randn(3, 4, 5)),
    "layer-norm-eps": lambda: (random_norm(nn.LayerNorm(5, eps=0.3)), randn(1, 4, 5)),
    "rms-norm": lambda: (random_norm(nn.RMSNorm(5)), randn(3, 5)),
    "rms-norm-time": lambda: (random_norm(nn.RMSNorm(5, eps=0.2)), randn(3, 4, 5)),
    "rms-norm-two-dims": lambda: (random_norm(nn.RMSNorm((2, 3))), randn(3, 4, 2, 3)),
    "group-norm-flat": lambda: (random_norm(nn.GroupNorm(2, 6)), randn(3, 6)),
    "group-norm-1d": lambda: (random_norm(nn.GroupNorm(3, 6)), randn(3, 6, 4)),
    "group-norm-2d": lambda: (random_norm(nn.GroupNorm(1, 4, eps=0.2)), randn(3, 4, 2, 3)),
    "batch-norm-flat": lambda: (evaluated_norm(nn.BatchNorm1d(4)), randn(3, 4)),
    "batch-norm-1d": lambda: (evaluated_norm(nn.BatchNorm1d(4)), randn(3, 4, 5)),
    "batch-norm-2d": lambda: (evaluated_norm(nn.BatchNorm2d(4)), randn(3, 4, 2, 3)),
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
