"""Modules of unknown kind: what is run again in backward is what ran in forward, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from per_sample import Expected, assert_near, gather, randn, squared_error
from torch import Tensor, nn

from fusedopt import PerSampleSquares

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.func:UserWarning")


class Affine(nn.Module):
    """A scale and a shift of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Perceptron(nn.Module):
    """Two products, which autocast makes in narrow types, and outputs that are not small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, 2 * width))
        self.v = nn.Parameter(torch.randn(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.v


class Centred(Affine):
    """Mixes the samples."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(0)


class Exchanged(Affine):
    """Mixes the samples, and leaves each one's sum as it was."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        mean = y.mean(0)
        return y + mean - mean.flip(-1)


class Dropping(Affine):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def model_of(middle: nn.Module, device: torch.device) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), middle).to(device, torch.float64)


@pytest.mark.parametrize("kind", [Affine, Perceptron])
def test_autocast(device: torch.device, kind: Any) -> None:
    """Run again under the autocast of forward, which backward stands outside of."""

    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return self.inner(x).float()

    inner = nn.Sequential(nn.Linear(3, 6), kind(6), nn.Linear(6, 6))
    x = randn(5, 4, 3, dtype=torch.float32)
    # The products of a sample alone and of the batch are rounded apart.
    gather(Cast(inner).to(device), x, tolerance=2e-2, backend="reference")


def test_rounding_of_autocast_is_not_taken_for_mixing(device: torch.device) -> None:
    """An output of many elements of order 4 (review 20)."""
    model = nn.Sequential(Perceptron(32)).to(device)
    statistics = PerSampleSquares(model)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(randn(8, 16, 32, dtype=torch.float32))
    out.float().square().mean().backward()
    assert statistics.samples == 8


def test_backward_inside_autocast(device: torch.device) -> None:
    """Forward outside of autocast, backward inside: the state is that of forward."""
    model, x = nn.Sequential(Perceptron(6)).to(device), randn(5, 6, dtype=torch.float32)
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error("mean"))
    statistics = PerSampleSquares(model, backend="reference")
    shares = squared_error("mean")(model(x)).sum()
    with torch.autocast(device.type, torch.bfloat16):
        shares.backward()
    # In full precision: products in bfloat16 are off by hundreds of times this.
    q = expected.mean_square("0.w")
    assert_near(statistics.mean_square(model[0].w), q, 2e-5, "mean square of w")


@pytest.mark.parametrize("kind", [Affine, Perceptron])
def test_in_place_operation_on_the_output(device: torch.device, kind: Any) -> None:
    middle = nn.Sequential(kind(6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    gather(model_of(middle, device), randn(5, 4, 3), backend="reference")


def test_outputs_are_not_saved(device: torch.device) -> None:
    """Nothing of the size of the output is kept for the comparison."""
    model = nn.Sequential(Affine(6)).to(device, torch.float64)
    PerSampleSquares(model, backend="reference")
    x = randn(5, 40, 6)
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= x.numel():
            kept.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert kept == {x.data_ptr()}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
def test_lstm(device: torch.device, batch_first: bool) -> None:
    """Tuples of outputs, of which some have no error."""
    model = First(nn.LSTM(3, 4, batch_first=batch_first)).to(device, torch.float64)
    x = randn(5, 2, 3) if batch_first else randn(2, 5, 3)
    gather(model, x, backend="reference", batch_first=batch_first)


def test_lstm_in_float32(device: torch.device) -> None:
    """The fused kernel that forward runs has no rule in torch.func."""
    model = First(nn.LSTM(3, 4, batch_first=True)).to(device)
    gather(model, randn(5, 2, 3).to(torch.float32), tolerance=1e-4, backend="reference")


def test_bilinear(device: torch.device) -> None:
    model = nn.Bilinear(3, 4, 2).to(device, torch.float64)
    gather(model, randn(5, 3), randn(5, 4), backend="reference")


def test_complex_output(device: torch.device) -> None:
    """One output that is complex, with the conjugate bit that views of it have."""

    class Spectrum(Affine):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x)).conj()

    class Magnitude(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x.resolve_conj()).square().sum(-1)

    gather(
        model_of(nn.Sequential(Spectrum(6), Magnitude()), device), randn(5, 3), backend="reference"
    )


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("length", [1, 3000])
@pytest.mark.parametrize("kind", [Centred, Exchanged, Dropping])
def test_refused_by_name(device: torch.device, kind: Any, length: int, scale: float) -> None:
    """However many elements it has and however small they are."""
    model = model_of(nn.Sequential(nn.Identity(), kind(6)), device)
    with torch.no_grad():
        for p in model[1][1].parameters():
            p.mul_(scale)
    PerSampleSquares(model, backend="reference")
    out = model(randn(8, length, 3))
    with pytest.raises(RuntimeError, match=rf"1\.1 \({kind.__name__}\).*mixes samples"):
        out.square().sum().backward()


def test_refused_where_a_sample_alone_is_not_a_number(device: torch.device) -> None:
    class Standardised(Affine):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y / y.std(0)

    model = model_of(Standardised(6), device)
    PerSampleSquares(model, backend="reference")
    out = model(randn(8, 3))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="mixes samples"):
        out.square().sum().backward()


def test_infinite_output_is_not_taken_for_mixing(device: torch.device) -> None:
    """A step that a loss scaler skips: the squares say so, not an error."""
    model = model_of(Affine(6), device)
    statistics = PerSampleSquares(model, backend="reference")
    x = randn(5, 3)
    x[2, 1] = float("inf")
    model(x).square().sum().backward()
    assert not statistics.mean_square(model[1].scale).isfinite().all()


def test_packed_samples_are_not_found_in_the_width(device: torch.device) -> None:
    """A width that is the number of samples is no batch."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = nn.Sequential(nn.Linear(3, 2), Gain()).to(device, torch.float64)
    statistics = PerSampleSquares(model, backend="reference")
    with statistics.segments(torch.tensor([0, 2, 6], device=device)):
        out = model(randn(6, 3))
    with pytest.raises(RuntimeError, match="batch dimension of size 2"):
        out.square().sum().backward()


def test_per_token_first_layer(device: torch.device) -> None:
    """Before any other layer has said how many tokens there are."""
    model = nn.Sequential(Affine(3), nn.Linear(3, 2)).to(device, torch.float64)
    gather(model, randn(7, 3), backend="reference", sample="token")
