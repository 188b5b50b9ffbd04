"""The batch-decoupled optimizers in a training: groups, schedules, checkpoints and closures."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, CLOSE, RMSPROP, SOURCES, ByHand, Source, each_source, train
from marks import both_backends
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    mlp,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor
from torch.nn import Parameter

from fusedopt import BatchDecoupledAdam, BatchDecoupledRMSprop, GradSampleSquares, PerSampleSquares


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
    _, optimizer, _ = train("model")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert set(loaded) == {"state", "param_groups"}
    assert "statistics" not in loaded["param_groups"][0]


def test_copy_of_model_and_optimizer_together() -> None:
    """deepcopy((model, optimizer)): an own copy, or an error; the original is untouched."""
    model, optimizer, _ = train("model")
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
