"""``BatchDecoupledAdam`` and ``BatchDecoupledRMSprop``, fed by each source of squares.

The oracle is the formula as the design note prints it, a loop in float64 over per-sample gradients;
at ``virtual_batch_size`` = N it is ``torch.optim`` itself, to the last bit.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
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
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
    virtual_square,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import fusedopt
from fusedopt import (
    BackpackSquares,
    BatchDecoupledAdam,
    BatchDecoupledRMSprop,
    GlobalNorm,
    GradSampleSquares,
    MicroBatchSquares,
    PerSampleSquares,
)

# The interpreter computes with numpy, which reports what an overflow or a nan is part of here.
numpy_may_warn = pytest.mark.filterwarnings("ignore:(invalid value|overflow) enc:RuntimeWarning")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])

# One step in each type; float32 over the few steps of a trajectory here.
CLOSE = {"reference": 1e-12, "triton": 1e-5}

ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.6, 0.8), "weight_decay": 0.1}
RMSPROP: dict[str, Any] = {"lr": 0.05, "alpha": 0.7, "weight_decay": 0.1}


# Sources


class Source:
    """One way to the squares: attaches to a model and runs a backward over a batch."""

    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        self.model, self.backend, self.reduction = model, backend, reduction
        self.statistics: Any = None
        self.optimizer: Any = None

    def loss(self, out: Tensor, n: int) -> Tensor:
        errors = (out - _target(out)).square().flatten(1).sum(1)
        return errors / n if self.reduction == "mean" else errors

    def rows(self, x: Tensor, n: int) -> list[Tensor]:
        return rows_of(self.loss(self.model(x), n), list(self.model.parameters()))


def _target(out: Tensor) -> Tensor:
    """Of a sample alone: the same whatever the batch that it stands in."""
    return torch.linspace(-2, 2, out[0].numel(), dtype=out.dtype, device=out.device).view_as(out[0])


class FromModel(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = PerSampleSquares(model, reduction, backend=backend)

    def backward(self, x: Tensor) -> None:
        self.loss(self.model(x), len(x)).sum().backward()


class FromMicroBatches(Source):
    """Micro-batches of one sample: their squares are the samples'."""

    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = MicroBatchSquares()

    def backward(self, x: Tensor) -> None:
        for sample in x:
            self.loss(self.model(sample[None]), len(x)).sum().backward()
            self.statistics.accumulate(self.optimizer)


class FromGradSample(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = GradSampleSquares()

    def backward(self, x: Tensor) -> None:
        factor = len(x) if self.reduction == "mean" else 1
        rows = self.rows(x, len(x))
        for p, r in zip(self.model.parameters(), rows, strict=True):
            p.grad_sample = r * factor


class FromBackpack(Source):
    def __init__(self, model: nn.Module, backend: str = "reference", reduction: str = "mean"):
        super().__init__(model, backend, reduction)
        self.statistics = BackpackSquares(loss_reduction=reduction)

    def backward(self, x: Tensor) -> None:
        rows = self.rows(x, len(x))
        for p, r in zip(self.model.parameters(), rows, strict=True):
            p.grad, p.sum_grad_squared = r.sum(0), r.square().sum(0)
        self.statistics.batch_size = len(x)


SOURCES: dict[str, type[Source]] = {
    "model": FromModel,
    "micro-batches": FromMicroBatches,
    "grad-sample": FromGradSample,
    "backpack": FromBackpack,
}
each_source = pytest.mark.parametrize("source", SOURCES)


def _run(
    source: str,
    make: Callable[..., Any] = BatchDecoupledAdam,
    *,
    batches: Sequence[int] = (4, 4, 3),
    backend: str = "reference",
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, Any]:
    """Train the small network for a few steps; return it with optimizer and statistics."""
    model = mlp(dtype or DTYPES[backend])
    part = SOURCES[source](model, backend, reduction)
    defaults = ADAM if make is BatchDecoupledAdam else RMSPROP
    arguments = {**defaults, "virtual_batch_size": 2, **options}
    part.optimizer = make(
        model.parameters(), statistics=part.statistics, backend=backend, **arguments
    )
    for seed, n in enumerate(batches):
        part.backward(randn(n, 4, dtype=dtype or DTYPES[backend], seed=seed))
        part.optimizer.step()
        part.optimizer.zero_grad()
    return model, part.optimizer, part.statistics


# The definition, in float64


class ByHand:
    """The update as printed, from per-sample gradients ``[N, *p]``."""

    def __init__(self, params: Sequence[Tensor], b: int, **options: Any) -> None:
        self.params = [p.detach().double().clone() for p in params]
        self.b, self.options, self.t = b, options, 0
        self.state: list[dict[str, Tensor]] = [{} for _ in self.params]

    def _input(self, samples: Tensor, g: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Mean over all subsets of b samples, by enumeration; of the mean's square above N."""
        if self.b >= len(samples):
            return (g + shift).square()
        n, b = len(samples), self.b
        if isinstance(shift, float):
            return virtual_square(samples, b)
        w = (n - b) / (b * (n - 1))
        return (1 - w) * (g + shift).square() + w * samples.square().mean(0)

    def adam(self, gradients: Sequence[Tensor]) -> None:
        self.t += 1
        lr, (beta1, beta2) = self.options["lr"], self.options["betas"]
        eps, decay = self.options.get("eps", 1e-8), self.options["weight_decay"]
        sign = -1.0 if self.options.get("maximize") else 1.0
        for p, s, samples in zip(self.params, self.state, gradients, strict=True):
            samples = samples.double()
            g = samples.mean(0)
            a2 = self._input(samples, g)
            if not s:
                s.update(m=torch.zeros_like(p), v=torch.zeros_like(p), top=torch.zeros_like(p))
            s["m"] = beta1 * s["m"] + (1 - beta1) * g * sign
            s["v"] = beta2 * s["v"] + (1 - beta2) * a2
            s["top"] = torch.maximum(s["top"], s["v"])
            v = s["top"] if self.options.get("amsgrad") else s["v"]
            p *= 1 - lr * decay
            denominator = (v / (1 - beta2**self.t)).sqrt() + eps
            p -= lr * s["m"] / (1 - beta1**self.t) / denominator

    def rmsprop(self, gradients: Sequence[Tensor]) -> None:
        lr, alpha = self.options["lr"], self.options["alpha"]
        eps, decay = self.options.get("eps", 1e-8), self.options["weight_decay"]
        momentum, centred = self.options.get("momentum", 0), self.options.get("centered")
        sign = -1.0 if self.options.get("maximize") else 1.0
        for p, s, samples in zip(self.params, self.state, gradients, strict=True):
            samples = sign * samples.double()
            g = samples.mean(0)
            shift = decay * p
            a2 = self._input(samples, g, shift)
            g = g + shift
            if not s:
                s.update(v=torch.zeros_like(p), mean=torch.zeros_like(p), buf=torch.zeros_like(p))
            s["v"] = alpha * s["v"] + (1 - alpha) * a2
            s["mean"] = alpha * s["mean"] + (1 - alpha) * g
            v = s["v"] - s["mean"].square() if centred else s["v"]
            step = g / (v.sqrt() + eps)
            if momentum > 0:
                s["buf"] = step = momentum * s["buf"] + step
            p -= lr * step


def _samples(batches: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
    return [
        [randn(n, *s, seed=10 * k + i) for i, s in enumerate(shapes)] for k, n in enumerate(batches)
    ]


SHAPES = ((3, 5), (), (7,))


def _against_hand(
    make: Any, b: int, backend: str, batches: Sequence[int] = (5, 5, 4), **options: Any
) -> None:
    dtype = DTYPES[backend]
    params = [Parameter(randn(*s, dtype=dtype, seed=77)) for s in SHAPES]
    before = [p.detach().clone() for p in params]
    optimizer = make(
        params, statistics=GradSampleSquares(), virtual_batch_size=b, backend=backend, **options
    )
    hand = ByHand(params, b, **options)
    for gradients in _samples(batches, SHAPES):
        rounded = [g.to(dtype) for g in gradients]
        for p, g in zip(params, rounded, strict=True):
            p.grad_sample = g
        optimizer.step()
        (hand.adam if make is BatchDecoupledAdam else hand.rmsprop)(rounded)
    for p, expected in zip(params, hand.params, strict=True):
        tolerance = {"reference": 1e-11, "triton": 3e-5}[backend]
        assert_near(p, expected, tolerance, f"{tuple(p.shape)} at b = {b}")
    moved = [(p - s).abs().max() > 0.01 for p, s in zip(params, before, strict=True)]
    assert sum(moved) > 1


@both_backends
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_adam_is_the_mean_over_all_subsets(b: int, backend: str) -> None:
    """b = 1 is the per-sample definition (note 000), between them the exhaustive mean."""
    _against_hand(BatchDecoupledAdam, b, backend, **ADAM)


@both_backends
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"eps": 0.3}], ids=str)
def test_adam_variants(options: dict[str, Any], b: int, backend: str) -> None:
    """amsgrad over the decoupled moment; maximize turns the mean's sign and no square's."""
    _against_hand(BatchDecoupledAdam, b, backend, **ADAM, **options)


RMSPROP_VARIANTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.6},
    {"centered": True},
    {"momentum": 0.6, "centered": True, "maximize": True, "eps": 0.1},
    {"weight_decay": 0.0},
]


@both_backends
@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize("options", RMSPROP_VARIANTS, ids=str)
def test_rmsprop_by_hand(options: dict[str, Any], b: int, backend: str) -> None:
    """The coupled decay shifts the mean gradient, not the squares."""
    _against_hand(BatchDecoupledRMSprop, b, backend, **{**RMSPROP, **options})


@pytest.mark.parametrize("b", [1.5, 2.5])
def test_virtual_batch_size_need_not_be_whole(b: float) -> None:
    samples = randn(5, 7)
    p = Parameter(randn(7, seed=1))
    p.grad_sample = samples
    optimizer = BatchDecoupledAdam(
        [p], **ADAM, statistics=GradSampleSquares(), virtual_batch_size=b
    )
    optimizer.step()
    w = (5 - b) / (b * 4)
    a2 = (1 - w) * samples.mean(0).square() + w * samples.square().mean(0)
    assert_near(optimizer.state[p]["exp_avg_sq"], 0.2 * a2, 1e-12, "exp_avg_sq")


# The whole batch: torch's optimizers


def _same_bits(ours: Any, theirs: Any) -> None:
    mine = [p for g in ours.param_groups for p in g["params"]]
    others = [p for g in theirs.param_groups for p in g["params"]]
    for p, q in zip(mine, others, strict=True):
        assert torch.equal(p.detach(), q.detach())
        state, expected = ours.state[p], theirs.state[q]
        assert set(state) == {k for k, v in expected.items() if v is not None}
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[key])), key


TORCH: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "adam": (BatchDecoupledAdam, "AdamW", ADAM),
    "adam-amsgrad": (BatchDecoupledAdam, "AdamW", {**ADAM, "amsgrad": True, "maximize": True}),
    "adam-no-decay": (BatchDecoupledAdam, "AdamW", {**ADAM, "weight_decay": 0.0}),
    "adam-defaults": (BatchDecoupledAdam, "AdamW", {}),
    "rmsprop": (BatchDecoupledRMSprop, "RMSprop", RMSPROP),
    "rmsprop-centred": (
        BatchDecoupledRMSprop,
        "RMSprop",
        {**RMSPROP, "centered": True, "momentum": 0.5, "maximize": True},
    ),
    "rmsprop-defaults": (BatchDecoupledRMSprop, "RMSprop", {}),
}


@both_backends
@pytest.mark.parametrize("source", ["model", "micro-batches", "backpack"])
@pytest.mark.parametrize("case", TORCH)
def test_whole_batch_is_the_plain_optimizer_bitwise(case: str, source: str, backend: str) -> None:
    """virtual_batch_size = N: the bits of fusedopt's class, and of torch's on the reference.

    Catches an a2 formed as (1 - 0) g**2 + 0 q, which is nan where q overflows, and any change of
    the order of operations.
    """
    make, name, options = TORCH[case]
    n, dtype = 3, torch.float32
    model = mlp(dtype)
    part = SOURCES[source](model, backend, "mean")
    part.optimizer = ours = make(
        model.parameters(),
        statistics=part.statistics,
        virtual_batch_size=n,
        backend=backend,
        **options,
    )
    plain = [Parameter(p.detach().clone()) for p in model.parameters()]
    rivals = [getattr(fusedopt, name)(plain, backend=backend, **options)]
    if backend == "reference" and DEVICE.type == "cpu":
        again = [Parameter(p.detach().clone()) for p in plain]
        rivals.append(getattr(torch.optim, name)(again, foreach=False, **options))
    for seed in range(3):
        part.backward(randn(n, 4, dtype=dtype, seed=seed))
        for rival in rivals:
            for p, q in zip(model.parameters(), rival.param_groups[0]["params"], strict=True):
                q.grad = p.grad.clone()
            rival.step()
        ours.step()
        ours.zero_grad()
    for rival in rivals:
        _same_bits(ours, rival)


@both_backends
@pytest.mark.parametrize("case", ["adam", "rmsprop-centred"])
def test_whole_batch_of_samples_is_the_plain_optimizer(case: str, backend: str) -> None:
    """GradSampleSquares makes the mean itself, in one order of summation or another."""
    make, name, options = TORCH[case]
    p, q = (Parameter(randn(33, dtype=DTYPES[backend], seed=1)) for _ in range(2))
    ours = make(
        [p], statistics=GradSampleSquares(), virtual_batch_size=4, backend=backend, **options
    )
    theirs = getattr(torch.optim, name)([q], foreach=False, **options)
    for seed in range(3):
        p.grad_sample = randn(4, 33, dtype=DTYPES[backend], seed=seed)
        q.grad = p.grad_sample.mean(0)
        ours.step()
        theirs.step()
    assert_near(p, q, 10 * CLOSE[backend], "p")


@numpy_may_warn
@both_backends
def test_whole_batch_does_not_read_squares_that_overflow(backend: str) -> None:
    """0 * inf is nan: at w = 0 the squares have no say."""
    p = Parameter(torch.ones(3, device=DEVICE))
    statistics = BackpackSquares()
    optimizer = BatchDecoupledAdam(
        [p], statistics=statistics, virtual_batch_size=4, backend=backend
    )
    p.grad, p.sum_grad_squared = torch.ones_like(p), torch.full_like(p, float("inf"))
    statistics.batch_size = 4
    optimizer.step()
    assert torch.isfinite(p).all()


# Sources against each other


@each_reduction
@both_backends
@pytest.mark.parametrize("b", [1, 2, 3])
@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_sources_agree(make: Any, b: int, backend: str, reduction: str) -> None:
    """Four ways to one statistic, a ragged last batch, mean and sum losses: one trajectory."""
    runs = {}
    for name in SOURCES:
        if name == "micro-batches" and reduction == "sum":
            continue  # its rows are contributions to a mean
        if backend == "triton" and name in ("micro-batches", "backpack") and b != 2:
            continue  # the interpreter is slow
        options = {"backend": backend, "reduction": reduction, "virtual_batch_size": b}
        runs[name] = _run(name, make, **options)[0]
    expected = _run("model", make, virtual_batch_size=b)[0]
    start = mlp()
    for name, model in runs.items():
        for key, p in expected.named_parameters():
            actual = dict(model.named_parameters())[key]
            tolerance = {"reference": 1e-10, "triton": 2e-4}[backend]
            assert_near(actual, p, tolerance, f"{name}: {key}")
            assert not torch.allclose(p.detach(), dict(start.named_parameters())[key].detach())


@each_source
@both_backends
def test_clip(source: str, backend: str) -> None:
    """The norm of the mean gradient decides, for mean and sum losses alike; at b = N it is

    clip_grad_norm_ and AdamW.
    """
    for reduction in ("mean", "sum"):
        if source == "micro-batches" and reduction == "sum":
            continue
        clips = GlobalNorm(0.05), GlobalNorm(1e6)
        for b in (1, 3):
            for clip in clips:
                model, optimizer, _ = _run(
                    source,
                    batches=(3, 3),
                    backend=backend,
                    reduction=reduction,
                    clip=clip,
                    virtual_batch_size=b,
                )
                expected, norm = _clipped_by_hand(b, clip.max_norm)
                assert clip.last.item() == pytest.approx(norm, rel=1e-4)
                assert (norm > 0.05) or clip.max_norm > 1
                for p, q in zip(model.parameters(), expected, strict=True):
                    tolerance = {"reference": 1e-6, "triton": 2e-4}[backend]
                    assert_near(p, q, tolerance, f"{reduction}, b = {b}, {clip.max_norm}")


def _clipped_by_hand(b: int, max_norm: float) -> tuple[list[Tensor], float]:
    """Two steps in float64 over the same batches."""
    model = mlp()
    params = list(model.parameters())
    hand = ByHand(params, b, **ADAM)
    norm = 0.0
    part = Source(model)
    for seed in range(2):
        rows = part.rows(randn(3, 4, seed=seed), 3)
        for p, r in zip(params, rows, strict=True):
            p.grad = r.sum(0)
        norm = clip_grad_norm_(params, 1e30).item()
        c = min(1.0, max_norm / (norm + 1e-6))
        hand.adam([3 * r * c for r in rows])
        for p, q in zip(params, hand.params, strict=True):
            p.data.copy_(q)
    return hand.params, norm


@both_backends
@pytest.mark.parametrize("source", ["model", "backpack", "micro-batches", "grad-sample"])
def test_loss_scale(source: str, backend: str) -> None:
    """Everything scaled by 2**k, another k each step, and unscaled in it: the plain trajectory."""
    x = [randn(3, 4, dtype=torch.float32, seed=s) for s in range(3)]
    results: dict[str, list[Tensor]] = {}
    for mode in ("plain", "scaled"):
        model = mlp(torch.float32)
        part = SOURCES[source](model, backend, "mean")
        part.optimizer = BatchDecoupledAdam(
            model.parameters(),
            statistics=part.statistics,
            virtual_batch_size=2,
            backend=backend,
            clip=GlobalNorm(0.5),
            **ADAM,
        )
        scaler = torch.amp.GradScaler(
            DEVICE.type, init_scale=256.0, growth_interval=1, enabled=mode != "plain"
        )
        plain_loss = part.loss
        part.loss = lambda out, n, f=plain_loss, s=scaler: s.scale(f(out, n))
        for batch in x:
            part.backward(batch)
            if source == "grad-sample":
                for p in model.parameters():  # the scaler looks for overflows in .grad
                    p.grad = p.grad_sample.mean(0)
            scaler.step(part.optimizer)
            scaler.update()
            part.optimizer.zero_grad()
        results[mode] = [p.detach().clone() for p in model.parameters()]
    for a, b in zip(results["scaled"], results["plain"], strict=True):
        assert_near(a, b, 1e-5, "scaled")


@numpy_may_warn
@both_backends
def test_overflow_skips_the_step(backend: str) -> None:
    """An inf in a gradient: nothing moves, the step count neither, and the next step is whole."""
    model = mlp(torch.float32)
    statistics = PerSampleSquares(model, backend=backend)
    optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=statistics, backend=backend, **ADAM
    )
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    x = randn(3, 4, dtype=torch.float32)
    loss = model(x).square().sum(1).mean()
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)
    assert scaler.get_scale() == 2.0
    scaler.scale(squared_error()(model(x)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin = mlp(torch.float32)
    other = BatchDecoupledAdam(
        twin.parameters(),
        statistics=PerSampleSquares(twin, backend=backend),
        backend=backend,
        **ADAM,
    )
    backward(twin, [(x,)], squared_error())
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(p, q, 1e-5, "after the overflow")
        assert optimizer.state[p]["step"] == 1


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(dtype: torch.dtype, backend: str) -> None:
    """Rounded once on storing: within an ulp or two of the definition from the same state."""
    samples = randn(4, 7).to(dtype)
    p = Parameter(randn(7, seed=1).to(dtype))
    hand = ByHand([p], 2, **ADAM)
    optimizer = BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    p.grad_sample = samples
    optimizer.step()
    hand.adam([samples])
    assert p.dtype == dtype
    assert_near(p, hand.params[0], 2 * torch.finfo(dtype).eps, "p")
    assert_near(optimizer.state[p]["exp_avg_sq"], hand.state[0]["v"], 0.01, "exp_avg_sq")


@both_backends
def test_mixed_precision_model(backend: str) -> None:
    """A bfloat16 body with float32 norms, squares of both, in one optimizer."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6).to(DEVICE, torch.bfloat16), nn.Linear(6, 3).to(DEVICE)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).float())

    model = Mixed()
    wide = copy.deepcopy(model)
    wide.body.float()
    x = randn(4, 4, dtype=torch.bfloat16)
    expected = Expected.of(nn.Sequential(_Widen(wide)), [(x,)], squared_error())
    optimizer = BatchDecoupledAdam(
        model.parameters(),
        statistics=PerSampleSquares(model, backend=backend),
        virtual_batch_size=1,
        backend=backend,
        **ADAM,
    )
    squared_error()(model(x)).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        q = expected.mean_square(f"0.wide.{name}")
        assert_near(optimizer.state[p]["exp_avg_sq"], 0.2 * q, 0.05, name)


class _Widen(nn.Module):
    def __init__(self, wide: Any) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return self.wide.head(torch.tanh(self.wide.body(x.float())))


# Batches


@each_source
def test_ragged_batches(source: str) -> None:
    """w is formed of each step's own count: N = 5, 2, 4 at b = 2 is w = 3/8, 0, 1/3."""
    model = mlp()
    hand = ByHand(list(model.parameters()), 2, **ADAM)
    part = SOURCES[source](model)
    part.optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=part.statistics, virtual_batch_size=2, **ADAM
    )
    for seed, n in enumerate((5, 2, 4)):
        x = randn(n, 4, seed=seed)
        # Of a copy: the rows' own backward passes are not for the statistics.
        rows = Source(copy.deepcopy(model)).rows(x, n)
        part.backward(x)
        assert part.statistics.samples == n or source in ("grad-sample", "backpack")
        part.optimizer.step()
        part.optimizer.zero_grad()
        hand.adam([n * r for r in rows])
        for p, q in zip(model.parameters(), hand.params, strict=True):
            assert_near(p, q, 1e-10, f"step {seed}")


@each_source
@pytest.mark.parametrize("b", [1, 4])
def test_one_sample(source: str, b: int) -> None:
    """N = 1: N - 1 is zero; the square of the mean is the mean of the square."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, _, _ = _run(source, batches=(1, 1), virtual_batch_size=b)
    plain = mlp()
    torch_adam = torch.optim.AdamW(plain.parameters(), **ADAM)
    for seed in range(2):
        rows = Source(plain).rows(randn(1, 4, seed=seed), 1)
        for p, r in zip(plain.parameters(), rows, strict=True):
            p.grad = r[0]
        torch_adam.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(p, q, 1e-11, "one sample")


@each_source
def test_virtual_batch_above_the_batch_warns_once(source: str) -> None:
    """Less noise than the batch has cannot be had: w = 0, said once and not every step."""
    with pytest.warns(UserWarning, match="virtual_batch_size") as caught:
        model, _, _ = _run(source, batches=(3, 3, 3), virtual_batch_size=8)
    assert len([w for w in caught if "virtual_batch_size" in str(w.message)]) == 1
    same, _, _ = _run(source, batches=(3, 3, 3), virtual_batch_size=3)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach())


def test_trajectory_does_not_depend_on_how_a_batch_is_split() -> None:
    """Accumulation over 1, 2 or 4 passes."""
    ends = []
    for parts in (1, 2, 4):
        model = mlp()
        optimizer = BatchDecoupledAdam(
            model.parameters(), statistics=PerSampleSquares(model), virtual_batch_size=2, **ADAM
        )
        for seed in range(3):
            for part in randn(4, 4, seed=seed).chunk(parts):
                ((model(part) - _target(model(part))).square().sum() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert_near(b, a, 1e-11, "split")


# Arguments and checks


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
@pytest.mark.parametrize("b", [0, -1, 0.5, float("nan"), 0.999])
def test_bad_virtual_batch_size(make: Any, b: float) -> None:
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="virtual_batch_size"):
        make([p], statistics=GradSampleSquares(), virtual_batch_size=b)


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_statistics_are_needed(make: Any) -> None:
    p = Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="statistics"):
        make([p], statistics=None)
    with pytest.raises(TypeError):
        make([p])
    with pytest.raises(TypeError):
        make([p], statistics=object())


@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_bad_hyper_parameters_are_torchs_errors(make: Any) -> None:
    for options in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            make([Parameter(torch.ones(2))], statistics=GradSampleSquares(), **options)


@pytest.mark.parametrize(
    ("make", "name"), [(BatchDecoupledAdam, "AdamW"), (BatchDecoupledRMSprop, "RMSprop")]
)
def test_groups_and_states_are_torchs(make: Any, name: str) -> None:
    """Drop-in: the keys of torch's class, and virtual_batch_size."""
    p, q = Parameter(torch.ones(2, device=DEVICE)), Parameter(torch.ones(2, device=DEVICE))
    ours = make([p], statistics=GradSampleSquares())
    theirs = getattr(torch.optim, name)([q])
    missing = set(theirs.param_groups[0]) - set(ours.param_groups[0])
    assert not missing
    assert ours.param_groups[0]["virtual_batch_size"] == 1
    for key, value in theirs.param_groups[0].items():
        if key not in ("params", "foreach", "fused"):
            assert ours.param_groups[0][key] == value, key
    p.grad_sample, q.grad = torch.ones(3, 2, device=DEVICE), torch.ones(2, device=DEVICE)
    ours.step()
    theirs.step()
    assert set(ours.state[p]) == set(theirs.state[q])


def _refused(optimizer: Any, match: str, kind: Any = RuntimeError) -> None:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(kind, match=match):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p.detach(), b)
    after = optimizer.state_dict()["state"]
    assert set(after) == set(state)
    for key in state:
        for name, value in state[key].items():
            assert torch.equal(torch.as_tensor(after[key][name]), torch.as_tensor(value))


errors = (RuntimeError, ValueError, TypeError)


@pytest.mark.parametrize("warm", [False, True])
def test_grad_sample_counts_must_match(warm: bool) -> None:
    """4 samples of one parameter and 3 of another: refused before anything moves."""
    p, q = Parameter(randn(3, seed=1)), Parameter(randn(2, seed=2))
    optimizer = BatchDecoupledAdam([p, q], statistics=GradSampleSquares())
    if warm:
        p.grad_sample, q.grad_sample = randn(4, 3), randn(4, 2)
        optimizer.step()
    p.grad_sample, q.grad_sample = randn(4, 3), randn(3, 2)
    _refused(optimizer, "4.*3|3.*4", errors)


def test_grad_sample_of_another_shape() -> None:
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 2)
    _refused(optimizer, "shape|\\(3", errors)
    p.grad_sample = [randn(4, 3), randn(2, 2)]
    _refused(optimizer, "shape|\\(3", errors)


def test_grad_sample_missing() -> None:
    """A parameter with .grad and without .grad_sample was forgotten; one with neither is idle."""
    p, q = Parameter(randn(3, seed=1)), Parameter(randn(2, seed=2))
    optimizer = BatchDecoupledAdam([p, q], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 3)
    optimizer.step()
    assert not optimizer.state[q] if q in optimizer.state else True
    q.grad = torch.ones_like(q)
    p.grad_sample = randn(4, 3)
    _refused(optimizer, "grad_sample", errors)


def test_grad_sample_is_not_used_twice() -> None:
    """zero_grad() clears p.grad_sample too: an old one would be stepped again in silence."""
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares())
    p.grad_sample = randn(4, 3)
    optimizer.step()
    optimizer.zero_grad()
    assert getattr(p, "grad_sample", None) is None
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)


def test_backpack_needs_a_batch_size() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = BackpackSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    p.grad, p.sum_grad_squared = randn(3), randn(3).square()
    _refused(optimizer, "batch_size")
    statistics.batch_size = 4
    optimizer.step()
    optimizer.zero_grad()
    # zero_grad() takes the squares with the gradient: old ones may not meet a new gradient.
    p.grad = randn(3)
    _refused(optimizer, "sum_grad_squared")


def test_backpack_missing_or_misshaped() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = BackpackSquares(batch_size=4)
    optimizer = BatchDecoupledAdam([p], statistics=statistics)
    p.grad = randn(3)
    _refused(optimizer, "sum_grad_squared")
    p.sum_grad_squared = randn(2).square()
    _refused(optimizer, "shape|\\(3|\\(2", errors)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backpack_over_several_backward_passes(reduction: str) -> None:
    """BackPACK overwrites at each backward: accumulate() adds squares and counts."""
    rows = randn(5, 3)
    p = Parameter(randn(3, seed=1))
    q = Parameter(p.detach().clone())
    statistics = BackpackSquares(loss_reduction=reduction)
    optimizer = BatchDecoupledAdam([p], statistics=statistics, virtual_batch_size=2, **ADAM)
    for part in (rows[:3], rows[3:]):
        p.grad = part.sum(0) if p.grad is None else p.grad + part.sum(0)
        p.sum_grad_squared = part.square().sum(0)
        statistics.batch_size = len(part)
        statistics.accumulate(optimizer)
    assert statistics.samples == 5
    optimizer.step()
    hand = ByHand([q], 2, **ADAM)
    hand.adam([rows * 5 if reduction == "mean" else rows])
    assert_near(p, hand.params[0], 1e-12, "p")


def test_micro_batches_without_accumulate() -> None:
    p = Parameter(randn(3, seed=1))
    optimizer = BatchDecoupledAdam([p], statistics=MicroBatchSquares())
    p.grad = randn(3)
    _refused(optimizer, "accumulate")


def test_micro_batches_with_a_backward_after_the_last_accumulate() -> None:
    """A gradient that grew since belongs to no micro-batch: refused."""
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    (p * randn(3)).sum().backward()
    statistics.accumulate(optimizer)
    (p * randn(3, seed=8)).sum().backward()
    _refused(optimizer, "accumulate")


def test_micro_batches_forget_on_zero_grad() -> None:
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for keep in (True, False, True):
        for _ in range(2):
            (p * randn(3)).sum().backward()
            statistics.accumulate(optimizer)
        assert statistics.samples == 2
        # Two equal micro-batches, each of which contributes g to the sum.
        assert_near(statistics.mean_square(p), (2 * randn(3)).square(), 1e-12, "q")
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep)
        assert statistics.samples == 0


def test_micro_batches_with_a_new_gradient_tensor_each_time() -> None:
    """p.grad = p.grad + g, as autograd itself accumulates under create_graph=True."""
    p = Parameter(randn(3, seed=1))
    gradients = randn(4, 3)
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for g in gradients:
        p.grad = g / 4 if p.grad is None else p.grad + g / 4
        statistics.accumulate(optimizer)
    assert statistics.samples == 4
    assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "q")


def test_micro_batches_over_hand_cleared_gradients() -> None:
    """p.grad = None between steps starts anew, as with PerSampleSquares."""
    p = Parameter(randn(3, seed=1))
    statistics = MicroBatchSquares()
    optimizer = BatchDecoupledAdam([p], statistics=statistics, backend="reference")
    for seed in range(3):
        gradients = randn(2, 3, seed=seed)
        for g in gradients:
            (p * g / 2).sum().backward()
            statistics.accumulate(optimizer)
        assert statistics.samples == 2
        assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "q")
        optimizer.step()
        p.grad = None


# GradSampleSquares' forms


@both_backends
@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_grad_sample_batches(n: int, backend: str) -> None:
    """Any number of samples, in one pass; p.grad is neither needed nor read nor written."""
    dtype = DTYPES[backend]
    samples = randn(n, 5, 9, dtype=dtype)
    for grad in (None, torch.full((5, 9), float("nan"), dtype=dtype, device=DEVICE)):
        p = Parameter(randn(5, 9, dtype=dtype, seed=1))
        hand = ByHand([p], 1, **ADAM)
        p.grad, p.grad_sample = grad, samples
        optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend, **ADAM)
        optimizer.step()
        hand.adam([samples])
        assert_near(p, hand.params[0], CLOSE[backend], f"n = {n}")
        assert grad is None or p.grad is grad and grad.isnan().all()


@both_backends
def test_grad_sample_list(backend: str) -> None:
    """Opacus makes a list at accumulation: its parts are one batch."""
    dtype = DTYPES[backend]
    samples = randn(6, 9, dtype=dtype)
    p = Parameter(randn(9, dtype=dtype, seed=1))
    hand = ByHand([p], 2, **ADAM)
    statistics = GradSampleSquares()
    optimizer = BatchDecoupledAdam(
        [p], statistics=statistics, virtual_batch_size=2, backend=backend, **ADAM
    )
    for parts in ([samples[:3], samples[3:]], [samples[:5], samples[5:]], [samples]):
        p.grad_sample = list(parts)
        optimizer.step()
        hand.adam([samples])
        assert statistics.samples == 6
    assert_near(p, hand.params[0], 3 * CLOSE[backend], "list")


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_sample_in_16_bits(dtype: torch.dtype, backend: str) -> None:
    """16-bit samples of float32 parameters: summed and squared in float32."""
    samples = (randn(5, 9) / 100).to(dtype)
    p = Parameter(randn(9, dtype=torch.float32, seed=1))
    hand = ByHand([p], 1, **ADAM)
    p.grad_sample = samples
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend, **ADAM)
    optimizer.step()
    hand.adam([samples])
    assert_near(p, hand.params[0], 1e-5, "p")
    assert_near(optimizer.state[p]["exp_avg_sq"], hand.state[0]["v"], 1e-5, "exp_avg_sq")


@numpy_may_warn
@both_backends
def test_grad_sample_overflow_in_a_sample_skips_the_step(backend: str) -> None:
    """Under a scaler: an inf in one sample, or in a square alone, while p.grad looks finite."""
    for value in (float("inf"), 1e30):
        p = Parameter(torch.ones(3, device=DEVICE))
        p.grad_sample = torch.ones(4, 3, device=DEVICE)
        p.grad_sample[1, 2] = value
        p.grad = torch.ones_like(p)
        optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0)
        scaler.scale(torch.ones((), device=DEVICE))
        scaler.step(optimizer)
        assert torch.equal(p.detach(), torch.ones_like(p)), value
        assert not optimizer.state[p] or optimizer.state[p]["step"] == 0


@both_backends
def test_grad_sample_layouts(backend: str) -> None:
    """Batch last in memory, expanded, sliced; a transposed parameter."""
    dtype = DTYPES[backend]
    base = randn(4, 6, 5, dtype=dtype)
    forms = [
        base.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        base.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((base, base * 0), -1)[..., 0],
        base[:1].expand(4, 6, 5),
    ]
    for place, form in enumerate(forms):
        for transposed in (False, True):
            value = randn(6, 5, dtype=dtype, seed=1)
            p = Parameter(value.t().contiguous().t() if transposed else value)
            hand = ByHand([p], 2, **ADAM)
            p.grad_sample = form
            optimizer = BatchDecoupledAdam(
                [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
            )
            optimizer.step()
            hand.adam([form])
            assert_near(p, hand.params[0], CLOSE[backend], f"{place}, {transposed}")


@both_backends
def test_grad_sample_empty_and_scalar_parameters(backend: str) -> None:
    dtype = DTYPES[backend]
    shapes = ((0, 3), (), (1,))
    params = [Parameter(randn(*s, dtype=dtype, seed=1)) for s in shapes]
    hand = ByHand(params, 2, **ADAM)
    samples = [randn(3, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    for p, s in zip(params, samples, strict=True):
        p.grad_sample = s
    optimizer = BatchDecoupledAdam(
        params, statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    optimizer.step()
    hand.adam(samples)
    for p, q in zip(params, hand.params, strict=True):
        assert_near(p, q, CLOSE[backend], str(tuple(p.shape)))


@both_backends
def test_grad_sample_allocates_no_second_batch(backend: str) -> None:
    """Reduction, averages and update read [batch, *param] once and write nothing of its size."""
    p = Parameter(randn(40, 50, dtype=torch.float32))
    p.grad_sample = randn(8, 40, 50, dtype=torch.float32)
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), backend=backend)
    with Allocations() as seen:
        optimizer.step()
    assert seen.largest < 8 * 2000 or _is_view(seen), seen.what


def _is_view(seen: Allocations) -> bool:
    # Views of the samples themselves share their storage, and are no allocation.
    return any(name in seen.what for name in ("view", "slice", "select", "detach", "alias", "as_s"))


# Groups, schedules, checkpoints


@both_backends
def test_groups_with_their_own_virtual_batch(backend: str) -> None:
    dtype = DTYPES[backend]
    sizes = (1, 2, 4)
    params = [Parameter(randn(7, dtype=dtype, seed=i)) for i in range(3)]
    hands = [ByHand([p], b, **ADAM) for p, b in zip(params, sizes, strict=True)]
    groups = [{"params": [p], "virtual_batch_size": b} for p, b in zip(params, sizes, strict=True)]
    optimizer = BatchDecoupledAdam(groups, statistics=GradSampleSquares(), backend=backend, **ADAM)
    for seed in range(2):
        samples = [randn(4, 7, dtype=dtype, seed=10 * seed + i) for i in range(3)]
        for p, hand, s in zip(params, hands, samples, strict=True):
            p.grad_sample = s
            hand.adam([s])
        optimizer.step()
    for p, hand, b in zip(params, hands, sizes, strict=True):
        assert_near(p, hand.params[0], CLOSE[backend] * 5, f"b = {b}")


def test_add_param_group_and_edits() -> None:
    """A group that comes later; a size that changes between steps is live."""
    p, q = (Parameter(randn(7, seed=i)) for i in range(2))
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), **ADAM)
    optimizer.add_param_group({"params": [q], "virtual_batch_size": 3})
    hand = ByHand([p], 1, **ADAM)
    for seed, b in enumerate((1, 3, 2)):
        optimizer.param_groups[0]["virtual_batch_size"] = b
        p.grad_sample, q.grad_sample = randn(4, 7, seed=seed), randn(4, 7, seed=5)
        optimizer.step()
        hand.b = b
        hand.adam([p.grad_sample])
    assert_near(p, hand.params[0], 1e-11, "p")
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [Parameter(randn(2))], "virtual_batch_size": 0})


@both_backends
def test_scheduler(backend: str) -> None:
    dtype = DTYPES[backend]
    p = Parameter(randn(7, dtype=dtype, seed=1))
    hand = ByHand([p], 2, **ADAM)
    optimizer = BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for seed in range(3):
        p.grad_sample = randn(4, 7, dtype=dtype, seed=seed)
        hand.options = {**ADAM, "lr": ADAM["lr"] / (1 + seed)}
        optimizer.step()
        hand.adam([p.grad_sample])
        schedule.step()
    assert_near(p, hand.params[0], CLOSE[backend] * 5, "scheduled")


@both_backends
@pytest.mark.parametrize("make", [BatchDecoupledAdam, BatchDecoupledRMSprop])
def test_checkpoint(make: Any, backend: str) -> None:
    """Saved and loaded in the middle: the same bits as the run that went through."""
    options = (ADAM if make is BatchDecoupledAdam else RMSPROP) | {"virtual_batch_size": 2}
    dtype = DTYPES[backend]

    def run(cut: bool) -> Tensor:
        p = Parameter(randn(9, dtype=dtype, seed=1))
        optimizer = make([p], statistics=GradSampleSquares(), backend=backend, **options)
        for seed in range(4):
            if cut and seed == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                p = Parameter(p.detach().clone())
                other = {**options, "virtual_batch_size": 1, "lr": 1.0}
                optimizer = make([p], statistics=GradSampleSquares(), backend=backend, **other)
                optimizer.load_state_dict(torch.load(file))
                assert optimizer.param_groups[0]["virtual_batch_size"] == 2
            p.grad_sample = randn(4, 9, dtype=dtype, seed=seed)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(cut=True), run(cut=False))


@both_backends
def test_checkpoint_of_torch(backend: str) -> None:
    """AdamW's checkpoint, mid-run, keeps the constructor's virtual batch; and back to AdamW."""
    dtype = DTYPES[backend]
    p = Parameter(randn(9, dtype=dtype, seed=1))
    theirs = torch.optim.AdamW([p], foreach=False, **ADAM)
    hand = ByHand([p], 4, **ADAM)
    samples = [randn(4, 9, dtype=dtype, seed=s) for s in range(6)]
    for s in samples[:2]:
        p.grad = s.mean(0)
        theirs.step()
        hand.adam([s])
    ours = BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, lr=1.0
    )
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["virtual_batch_size"] == 2
    assert ours.param_groups[0]["lr"] == ADAM["lr"]
    hand.b = 2
    for s in samples[2:4]:
        p.grad_sample = s
        ours.step()
        hand.adam([s])
    back = torch.optim.AdamW([p], foreach=False, lr=1.0)
    back.load_state_dict(ours.state_dict())
    hand.b = 4
    for s in samples[4:]:
        p.grad = s.mean(0)
        back.step()
        hand.adam([s])
    assert_near(p, hand.params[0], 10 * CLOSE[backend], "there and back")


def test_checkpoint_holds_no_statistics() -> None:
    """Only numbers and states: it loads with weights_only, without the model."""
    _, optimizer, _ = _run("model")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert set(loaded) == {"state", "param_groups"}
    assert "statistics" not in loaded["param_groups"][0]


def test_copy_of_model_and_optimizer_together() -> None:
    """deepcopy((model, optimizer)): an own copy, or an error; the original is untouched."""
    model, optimizer, _ = _run("model")
    before = [p.detach().clone() for p in model.parameters()]
    try:
        twin, other = copy.deepcopy((model, optimizer))
        squared_error()(twin(randn(3, 4))).sum().backward()
        other.step()
    except (RuntimeError, TypeError) as error:
        assert len(str(error)) > 20, "an error that says nothing"
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)
        assert p.grad is None


@each_source
def test_closure(source: str) -> None:
    """step(closure): squares are those that the closure's backward gathered."""
    model = mlp()
    part = SOURCES[source](model)
    part.optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=part.statistics, virtual_batch_size=2, **ADAM
    )
    rows = Source(copy.deepcopy(model)).rows(randn(4, 4), 4)
    hand = ByHand(list(model.parameters()), 2, **ADAM)

    def closure() -> float:
        part.optimizer.zero_grad()
        part.backward(randn(4, 4))
        return 3.0

    assert part.optimizer.step(closure) == 3.0
    hand.adam([4 * r for r in rows])
    for p, q in zip(model.parameters(), hand.params, strict=True):
        assert_near(p, q, 1e-11, "closure")


def test_language_model_with_tied_head() -> None:
    """One parameter in two modules, in the optimizer once."""
    (model,) = to(torch.float64, LanguageModel(tied=True))
    plain = copy.deepcopy(model)
    hand = ByHand(list(model.parameters()), 2, **ADAM)
    optimizer = BatchDecoupledAdam(
        model.parameters(), statistics=PerSampleSquares(model), virtual_batch_size=2, **ADAM
    )
    expected = Expected.of(plain, [(randint(3, 4, 5),)], squared_error())
    backward(model, [(randint(3, 4, 5),)], squared_error())
    optimizer.step()
    hand.adam([4 * r for r in expected.rows.values()])
    for (name, p), q in zip(model.named_parameters(), hand.params, strict=True):
        assert_near(p, q, 1e-10, name)


def test_tensor_lr_and_ignored_options() -> None:
    """torch's arguments: lr as a tensor, foreach and fused ignored, differentiable refused."""
    p, q = (Parameter(randn(7, seed=1)) for _ in range(2))
    samples = randn(4, 7)
    for parameter, lr in ((p, torch.tensor(0.05, dtype=torch.float64)), (q, 0.05)):
        parameter.grad_sample = samples
        options = {**ADAM, "lr": lr, "foreach": True}
        BatchDecoupledAdam([parameter], statistics=GradSampleSquares(), **options).step()
    assert_near(p, q, 1e-12, "tensor lr")
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        BatchDecoupledAdam([p], statistics=GradSampleSquares(), differentiable=True)


@both_backends
def test_capturable(backend: str) -> None:
    """Coefficients on the device: the numbers of the host's, the ragged batch's own w included."""
    ends = []
    for capturable in (False, True):
        p = Parameter(randn(7, dtype=DTYPES[backend], seed=1))
        optimizer = BatchDecoupledAdam(
            [p],
            statistics=GradSampleSquares(),
            virtual_batch_size=2,
            backend=backend,
            capturable=capturable,
            **ADAM,
        )
        for n in (5, 3):
            p.grad_sample = randn(n, 7, dtype=DTYPES[backend])
            optimizer.step()
        ends.append(p.detach())
    assert_near(ends[1], ends[0], 1e-6, "capturable")


@both_backends
def test_complex_samples(backend: str) -> None:
    """As torch: pairs of reals, each with its own moment."""
    value = torch.complex(randn(5, seed=1), randn(5, seed=2))
    samples = torch.complex(randn(4, 5, seed=3), randn(4, 5, seed=4))
    if backend == "triton":
        value, samples = value.to(torch.complex64), samples.to(torch.complex64)
    p = Parameter(value.clone())
    real = Parameter(torch.view_as_real(value).clone())
    p.grad_sample, real.grad_sample = samples, torch.view_as_real(samples)
    hand = ByHand([real], 2, **ADAM)
    optimizer = BatchDecoupledAdam(
        [p], statistics=GradSampleSquares(), virtual_batch_size=2, backend=backend, **ADAM
    )
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        assert "complex" in str(error)
        return
    hand.adam([real.grad_sample])
    assert_near(torch.view_as_real(p.detach()), hand.params[0], CLOSE[backend], "complex")


def test_negative_zero_and_zero_gradients() -> None:
    """Samples that are all zero move nothing but by decay, and make no nan."""
    p = Parameter(randn(7, seed=1))
    start = p.detach().clone()
    p.grad_sample = torch.zeros(4, 7, dtype=torch.float64, device=DEVICE)
    optimizer = BatchDecoupledAdam([p], statistics=GradSampleSquares(), **ADAM)
    optimizer.step()
    assert_near(p, start * (1 - 0.05 * 0.1), 1e-12, "p")


# By-products


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
