"""By-products of the squares: noise scale and signal-to-noise ratio, from samples by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from decoupled_by_hand import ADAM, SOURCES, Source
from marks import both_backends, each_reduction
from per_sample import DEVICE, DTYPES, Expected, mlp, randn, squared_error
from torch import Tensor
from torch.nn import Parameter

from fusedopt import BatchDecoupledAdam, GradSampleSquares, MicroBatchSquares, PerSampleSquares


def _moments(samples: Tensor) -> tuple[float, float]:
    """|G|**2 and tr Sigma, unbiased, from the samples themselves."""
    n = len(samples)
    trace = samples.var(0, unbiased=True).sum().item()
    return samples.mean(0).square().sum().item() - trace / n, trace


@both_backends
@each_reduction
@pytest.mark.parametrize("source", ["model", "grad-sample", "backpack"])
def test_noise_scale(source: str, reduction: str, backend: str) -> None:
    """Against the sample variance: the trace is the sum of the unbiased variances."""
    model = mlp(DTYPES[backend])
    part = SOURCES[source](model, backend, reduction)
    part.optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=part.statistics, backend=backend, **ADAM
    )
    plain = copy.deepcopy(model)
    x = randn(6, 4, dtype=DTYPES[backend])
    rows = Source(plain).rows(x, 6)
    flat = torch.cat([6 * r.flatten(1) for r in rows], 1).double()
    part.backward(x)
    if source != "model":
        part.optimizer.step()
    signal, noise = _moments(flat)
    scale = part.statistics.noise_scale()
    assert scale.signal.shape == scale.noise.shape == scale.ratio.shape == ()
    assert scale.signal.device.type == DEVICE.type
    close = {"reference": 1e-9, "triton": 1e-4}[backend]
    assert scale.noise.item() == pytest.approx(noise, rel=close)
    assert scale.signal.item() == pytest.approx(signal, rel=close, abs=close * noise)
    assert scale.ratio.item() == pytest.approx(noise / signal, rel=10 * close)


def test_noise_scale_is_unbiased() -> None:
    """g_i ~ N(mu, sigma**2): the mean over many batches is |mu|**2 and the trace."""
    torch.manual_seed(1)
    mu = torch.linspace(-1, 1, 20, dtype=torch.float64, device=DEVICE)
    p = Parameter(torch.zeros_like(mu))
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam(
        [p], lr=0.0, weight_decay=0.0, statistics=statistics, backend="reference"
    )
    signals, noises = [], []
    for _ in range(400):
        p.grad_sample = mu + 2 * torch.randn(3, 20, dtype=torch.float64).to(DEVICE)
        optimizer.step()
        scale = statistics.noise_scale()
        signals.append(scale.signal.item())
        noises.append(scale.noise.item())
    for values, truth in ((signals, mu.square().sum().item()), (noises, 80.0)):
        values = torch.tensor(values)
        error = (values.std() / len(values) ** 0.5).item()
        assert abs(values.mean().item() - truth) < 4 * error
        # The biased estimators (|gbar|**2 and q - gbar**2) are this far off, which must show.
    assert 80 / 3 > 8 * (torch.tensor(signals).std() / 20).item()


def test_noise_scale_of_many_elements() -> None:
    """torch's own float32 norm on a CPU is off by 4e-4 at ten million elements."""
    p = Parameter(torch.zeros(10_000_000))
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    p.grad_sample = torch.randn(2, *p.shape) + 1
    optimizer.step()
    first, second = p.grad_sample.double()
    # Of two samples, what they have in common is the signal.
    expected = first.dot(second).item()
    assert statistics.noise_scale().signal.item() == pytest.approx(expected, rel=1e-5)


def test_noise_scale_averages_before_it_divides() -> None:
    """EMA of numerator and denominator, bias-corrected from the first call on."""
    p = Parameter(randn(9, seed=1))
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    decay, signal, noise = 0.7, 0.0, 0.0
    for t in range(1, 5):
        p.grad_sample = randn(4, 9, seed=t) + 1
        optimizer.step()
        s, n = _moments(p.grad_sample)
        signal, noise = decay * signal + (1 - decay) * s, decay * noise + (1 - decay) * n
        scale = statistics.noise_scale(decay=decay)
        correction = 1 - decay**t
        assert scale.signal.item() == pytest.approx(signal / correction, rel=1e-6)
        assert scale.noise.item() == pytest.approx(noise / correction, rel=1e-6)
        assert scale.ratio.item() == pytest.approx(noise / signal, rel=1e-6)


def test_noise_scale_of_micro_batches() -> None:
    """Micro-batches stand for samples: their variance, and not one of single samples."""
    p = Parameter(randn(9, seed=1))
    gradients = randn(5, 9, seed=2) + 1
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for g in gradients:
        (p * g / 5).sum().backward()
        statistics.accumulate(optimizer)
    signal, noise = _moments(gradients)
    scale = statistics.noise_scale()
    assert scale.signal.item() == pytest.approx(signal, rel=1e-9)
    assert scale.noise.item() == pytest.approx(noise, rel=1e-9)


def test_noise_scale_needs_two_samples() -> None:
    model = mlp()
    statistics = PerSampleSquares(model)
    with pytest.raises((RuntimeError, ValueError)):
        statistics.noise_scale()
    squared_error()(model(randn(1, 4))).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match="2|two"):
        statistics.noise_scale()


@each_reduction
@both_backends
def test_signal_to_noise(backend: str, reduction: str) -> None:
    """gbar**2 over the (biased) variance, elementwise."""
    model = mlp(DTYPES[backend])
    plain = copy.deepcopy(model)
    x = randn(6, 4, dtype=DTYPES[backend])
    statistics = PerSampleSquares(model, reduction, backend=backend)
    shares = squared_error(reduction)
    expected = Expected.of(plain, [(x,)], shares, reduction)
    shares(model(x)).sum().backward()
    for name, p in model.named_parameters():
        gradients = expected.rows[name].double() * (6 if reduction == "mean" else 1)
        truth = gradients.mean(0).square() / gradients.var(0, unbiased=False)
        ratio = statistics.signal_to_noise(p)
        assert ratio.shape == p.shape
        close = {"reference": 1e-9, "triton": 1e-3}[backend]
        torch.testing.assert_close(ratio.double(), truth, rtol=close, atol=close)


def test_signal_to_noise_of_equal_samples() -> None:
    """No variance: infinite, or nan where there is no signal either; never negative."""
    p = Parameter(randn(4, seed=1))
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    p.grad_sample = torch.tensor([0.1, -0.7, 3.3, 0.0]).double().to(DEVICE).expand(3, 4)
    optimizer.step()
    ratio = statistics.signal_to_noise(p)
    assert (ratio[:3] > 1e10).all()
    assert not (ratio < 0).any()
