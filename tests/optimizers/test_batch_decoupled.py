"""``BatchDecoupledAdam`` and ``BatchDecoupledRMSprop``, fed by each source of squares.

The oracle is the formula as the design note prints it, a loop in float64 over per-sample gradients;
at ``virtual_batch_size`` = N it is ``torch.optim`` itself, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, CLOSE, RMSPROP, SOURCES, ByHand
from marks import both_backends, numpy_may_warn
from per_sample import DEVICE, DTYPES, assert_near, mlp, randn
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import BackpackSquares, BatchDecoupledAdam, BatchDecoupledRMSprop, GradSampleSquares

# The definition, in float64


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
