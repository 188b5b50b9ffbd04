"""Pitfalls of per-sample squares, k, l, n and r: what models do.

The letters are the design note's. A pitfall is a mistake that somebody has made: most of
them give numbers that look right.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from marks import both_backends
from observed import adam_without_decay
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    LanguageModel,
    assert_near,
    backward,
    check_squares,
    gather,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedopt import MicroBatchSquares, PerSampleSquares

# k


class Checkpointed(nn.Module):
    """A tower of checkpointed bodies between an embedding and a head."""

    def __init__(self, reentrant: bool, tied: bool = False, uses: int = 1) -> None:
        super().__init__()
        self.language = LanguageModel(tied=tied)
        del self.language.middle
        self.body = nn.Sequential(
            nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5)
        )
        self.reentrant, self.uses, self.checkpointed = reentrant, uses, True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.language.embedding(ids)
        for _ in range(self.uses):
            if self.checkpointed:
                x = checkpoint(self.body, x, use_reentrant=self.reentrant)
            else:
                x = self.body(x)
        return self.language.head(x)


@both_backends
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_pitfall_k_checkpointing(reentrant: bool, tied: bool, uses: int, backend: str) -> None:
    """Forward runs twice, first without gradients: each sample counts once, each use once.

    Reentrant checkpoints are backward passes of their own: a module in two of them may be refused.
    """
    (model,) = to(DTYPES[backend], Checkpointed(reentrant, tied, uses))
    ids = randint(7, 3, 4)
    plain = copy.deepcopy(model)
    plain.checkpointed = False
    expected = Expected.of(plain, [(ids,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    for _ in range(2):  # the second time finds nothing left of the first
        model.zero_grad()
        statistics.reset()
        try:
            backward(model, [(ids,)], squared_error())
        except RuntimeError as error:
            assert "body" in str(error) and "use_reentrant=False" in str(error)
            assert reentrant and uses == 2
            continue
        check_squares(statistics, model, expected)


def test_pitfall_k_refused_checkpoint_leaves_a_usable_model() -> None:
    """After the error of a reentrant checkpoint, the same model without it is exact."""
    (model,) = to(torch.float64, Checkpointed(True, uses=2))
    ids = randint(7, 3, 4)
    plain = copy.deepcopy(model)
    plain.checkpointed = False
    expected = Expected.of(plain, [(ids,)], squared_error())
    statistics = PerSampleSquares(model)
    try:
        backward(model, [(ids,)], squared_error())
    except RuntimeError:
        model.zero_grad()
        statistics.reset()
        model.checkpointed = False
        backward(model, [(ids,)], squared_error())
    check_squares(statistics, model, expected)


# l


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_pitfall_l_batch_norm_in_training(kind: Any) -> None:
    """Samples are coupled: refused where it is built, with the module's name and the ways out."""
    model = nn.Sequential(nn.Linear(4, 5), Deep()).to(DEVICE)
    model[1].norm = kind(5).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"1\.norm") as raised:
        PerSampleSquares(model)
    message = str(raised.value)
    assert "BatchNorm" in message and "eval" in message
    assert "GroupNorm" in message or "MicroBatchSquares" in message
    assert not _hooked(model), "the refused model keeps hooks"


def _hooked(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ]


def test_pitfall_l_batch_norm_put_into_training_later() -> None:
    """model.train() after construction: refused at forward, and works again after eval()."""
    (model,) = to(torch.float64, Deep())
    model.norm.eval()
    statistics = PerSampleSquares(model)
    model.train()
    x = randn(3, 4)
    with pytest.raises(RuntimeError, match="norm"):
        model(x)
    model.norm.eval()
    statistics.reset()
    model.zero_grad()
    expected = _expected_of_deep(model, x)
    backward(model, [(x,)], squared_error())
    check_squares(statistics, model, expected)


def _expected_of_deep(model: nn.Module, x: Tensor) -> Expected:
    plain = Deep().to(x)
    plain.load_state_dict(model.state_dict())
    plain.norm.eval()
    return Expected.of(plain, [(x,)], squared_error())


def test_pitfall_l_batch_norm_without_parameters_couples_as_well() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False))
    with pytest.raises(RuntimeError, match=r"^1 |'1'"):
        PerSampleSquares(model)


def test_pitfall_l_batch_norm_without_running_statistics() -> None:
    """track_running_stats=False takes the batch's statistics in evaluation, too."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    with pytest.raises(RuntimeError, match=r"^1 |'1'"):
        PerSampleSquares(model)
        model(randn(3, 4, dtype=torch.float32))


# n


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@both_backends
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_pitfall_n_compiled_model(compiler: str, backend: str) -> None:
    """torch.compile of the model: the gradient and squares of the eager one, step after step."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, 2, 4))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    compiled = torch.compile(model, backend=compiler)
    for _ in range(3):
        model.zero_grad()
        statistics.reset()
        squared_error()(compiled(x)).sum().backward()
        check_squares(statistics, model, expected)
    torch._dynamo.reset()


# r


@both_backends
def test_pitfall_r_frozen_weights(backend: str) -> None:
    """No squares for what does not train, though gradients flow through it; nothing allocated."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, 2, 4))
    for p in (model[0].bias, model[1].weight, model[3].weight):
        p.requires_grad_(False)
    statistics = gather(model, x, backend=backend)
    for p in model.parameters():
        if not p.requires_grad:
            assert p.grad is None
            with pytest.raises(Exception):  # noqa: B017 - which class is not said
                statistics.mean_square(p)


@both_backends
def test_pitfall_r_frozen_layers_below(backend: str) -> None:
    """A first layer that is frozen whole: no gradient reaches it at all."""
    model, x = to(DTYPES[backend], LanguageModel(), randint(7, 3, 4))
    for p in (*model.embedding.parameters(), *model.middle.parameters()):
        p.requires_grad_(False)
    gather(model, x, backend=backend)


class Routed(nn.Module):
    """An expert that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, routed: bool) -> Tensor:
        y = self.stem(x)
        return y + self.expert(torch.tanh(y)) if routed else y


@both_backends
def test_pitfall_r_parameter_without_gradient_in_a_micro_step(backend: str) -> None:
    """Its squares grow by nothing, its count by the samples: they are rows of zeros."""
    model, x = to(DTYPES[backend], Routed(), randn(6, 4))
    batches = [(x[:2], True), (x[2:5], False), (x[5:], True)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 6

    statistics = gather(model, batches=batches, loss=loss, backend=backend)
    assert statistics.samples == 6
    optimizer = adam_without_decay(model.parameters(), statistics, backend=backend)
    optimizer.step()


def test_pitfall_r_micro_batch_without_gradient() -> None:
    """MicroBatchSquares: the same; p.grad of a parameter may appear late."""
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    g = randn(2, 3)
    statistics = MicroBatchSquares()
    optimizer = adam_without_decay([p, q], statistics)
    (p * g[0]).sum().div(2).backward()
    statistics.accumulate(optimizer)
    ((p + q) * g[1]).sum().div(2).backward()
    statistics.accumulate(optimizer)
    assert statistics.samples == 2
    assert_near(statistics.mean_square(p), g.square().mean(0), 1e-12, "p")
    assert_near(statistics.mean_square(q), g[1].square() / 2, 1e-12, "q")
    optimizer.step()
