"""The pitfalls of per-sample squares, a to r, as the design note lists them: one test or more each.

A pitfall is a mistake that somebody has made: most of them give numbers that look right.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import Manager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
    mlp,
    randint,
    randn,
    rows_of,
    squared_error,
    to,
    token_mean,
)
from ranks import in_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def _adam(params: Any, statistics: Any, **options: Any) -> BatchDecoupledAdam:
    arguments = {"lr": 0.1, "betas": (0.6, 0.8), "weight_decay": 0.0, **options}
    arguments.setdefault("backend", "reference")  # "auto" is the slow interpreter in these tests
    return BatchDecoupledAdam(params, statistics=statistics, **arguments)


# a


@both_backends
def test_pitfall_a_loss_reduction(backend: str) -> None:
    """By hand: y = w x, loss y: g_i = x_i, q = (1 + 4 + 9 + 16) / 4, whatever the reduction.

    Catches rows that keep the 1/N of a mean loss (q too small by N**2), and a factor N for N**2.
    """
    x = torch.tensor([[1.0], [2.0], [-3.0], [4.0]], device=DEVICE, dtype=DTYPES[backend])
    for reduction in ("mean", "sum"):
        model = nn.Linear(1, 1, bias=False).to(x)
        statistics = PerSampleSquares(model, reduction, backend=backend)
        getattr(model(x), reduction)().backward()
        assert statistics.samples == 4
        assert statistics.mean_square(model.weight).item() == pytest.approx(7.5, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
@each_reduction
def test_pitfall_a_accumulated_and_scaled(reduction: str, parts: int) -> None:
    """loss / K over K micro-batches is the mean over the whole batch, and has its squares."""
    (model,) = to(torch.float64, mlp())
    x, targets = randn(6, 4), randn(6, 3, seed=5)
    n = 6 if reduction == "mean" else 1
    plain = copy.deepcopy(model)
    shares = (plain(x) - targets).square().sum(1) / n
    named = dict(plain.named_parameters())
    rows = dict(zip(named, rows_of(shares, list(named.values())), strict=True))
    statistics = PerSampleSquares(model, reduction)
    for part, target in zip(x.chunk(parts), targets.chunk(parts), strict=True):
        errors = (model(part) - target).square().sum(1)
        loss = errors.mean() / parts if reduction == "mean" else errors.sum()
        loss.backward()
    check_squares(statistics, model, Expected(rows, reduction))


def test_pitfall_a_unknown_reduction() -> None:
    for options in ({"loss_reduction": "none"}, {"sample": "word"}):
        with pytest.raises(ValueError):
            PerSampleSquares(mlp(), **options)
    with pytest.raises(ValueError):
        BackpackSquares(loss_reduction="none")


# b


@both_backends
@pytest.mark.parametrize("tied", [False, True])
def test_pitfall_b_ignored_and_padded_tokens(backend: str, tied: bool) -> None:
    """Mean over valid tokens; ragged sequences, one of them ignored whole; padding_idx.

    The sample is still a sequence and N still the number of sequences: dividing by the number of
    valid tokens of a sequence, or counting tokens, changes q by a factor of a sequence's length.
    """
    (model,) = to(DTYPES[backend], LanguageModel(tied=tied, padding_idx=0))
    lengths = torch.tensor([5, 2, 0, 3], device=DEVICE)
    valid = torch.arange(5, device=DEVICE) < lengths[:, None]
    ids = torch.where(valid, 1 + randint(6, 4, 5), 0)
    targets = torch.where(valid, randint(7, 4, 5, seed=8), -100)
    statistics = gather(model, ids, backend=backend, loss=token_mean(targets))
    assert statistics.samples == 4


def test_pitfall_b_cross_entropy_of_torch() -> None:
    """The loss as users write it, against rows that sum to its gradient."""
    (model,) = to(torch.float64, LanguageModel())
    ids, targets = randint(7, 3, 5), randint(7, 3, 5, seed=8)
    targets[0, 2:] = -100
    plain = copy.deepcopy(model)
    expected = Expected.of(plain, [(ids,)], token_mean(targets))
    statistics = PerSampleSquares(model)
    logits = model(ids)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    check_squares(statistics, model, expected)


# c


@both_backends
def test_pitfall_c_ragged_last_batch(backend: str) -> None:
    """4, 4 and 2 samples: each step divides by its own count, an accumulated one by the sum."""
    (model,) = to(DTYPES[backend], mlp())
    batches = [(randn(n, 4, dtype=DTYPES[backend], seed=n + i),) for i, n in enumerate((4, 4, 2))]
    statistics = PerSampleSquares(model, backend=backend)
    for batch in batches:
        model.zero_grad()
        statistics.reset()
        expected = Expected.of(copy.deepcopy(model), [batch], squared_error())
        backward(model, [batch], squared_error())
        check_squares(statistics, model, expected)
        assert statistics.samples == len(batch[0])


def test_pitfall_c_ragged_list_of_samples() -> None:
    """p.grad_sample as a list, the last one shorter: no zero row may be counted."""
    p = nn.Parameter(randn(3))
    samples = randn(6, 3, seed=1)
    whole, ragged = GradSampleSquares(), GradSampleSquares()
    results = []
    for statistics, value in ((whole, samples), (ragged, [samples[:4], samples[4:]])):
        q = nn.Parameter(p.detach().clone())
        q.grad_sample = value
        optimizer = _adam([q], statistics)
        optimizer.step()
        results.append((q.detach(), statistics.samples))
    assert results[0][1] == results[1][1] == 6
    assert_near(results[1][0], results[0][0], 1e-12, "list")


# d


@both_backends
@pytest.mark.parametrize("time", [2, 3, 5])
def test_pitfall_d_time_first(backend: str, time: int) -> None:
    """[T, B, D]: as the same samples in [B, T, D], also where T equals B = 3."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(DTYPES[backend], model, randn(3, time, 4))
    first = gather(copy.deepcopy(model), x, backend=backend)
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, batch_first=False, backend=backend)
    out = model(x.transpose(0, 1).contiguous())
    squared_error()(out.transpose(0, 1)).sum().backward()
    check_squares(statistics, model, expected)
    assert first.samples == statistics.samples == 3


# e


@both_backends
@pytest.mark.parametrize("make", [mlp, lambda dtype: to(dtype, LanguageModel(tied=True))[0]])
def test_pitfall_e_accumulation(make: Any, backend: str) -> None:
    """Three backward passes: squares and counts add. Catches overwriting (the last pass alone)

    and squaring the accumulated gradient (which has cross terms between the passes).
    """
    model = make(DTYPES[backend])
    if isinstance(model, LanguageModel):
        batches = [(randint(7, n, 4, seed=n),) for n in (3, 2, 1)]
    else:
        batches = [(randn(n, 4, dtype=DTYPES[backend], seed=n),) for n in (3, 2, 1)]

    def loss(out: Tensor) -> Tensor:
        return squared_error("sum")(out) / 6

    statistics = gather(model, batches=batches, loss=loss, backend=backend)
    assert statistics.samples == 6


def test_pitfall_e_micro_batches() -> None:
    """p.grad is a running sum: the micro-batch's own gradient is squared, not that sum."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    gradients = randn(4, 3)
    statistics = MicroBatchSquares()
    optimizer = _adam([p], statistics, virtual_batch_size=1)
    for g in gradients:
        (p * g).sum().div(4).backward()
        statistics.accumulate(optimizer)
    assert statistics.samples == 4
    assert_near(statistics.mean_square(p), gradients.square().mean(0), 1e-12, "micro-batches")


# f


def _two_ranks_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """q of the whole batch from two ranks' squares, each of two accumulation steps."""
    share = []
    for rank in range(2):
        part = x[4 * rank : 4 * rank + 4]
        rows = []
        for micro in part.chunk(2):
            out = model(micro)
            rows += rows_of(out.square().sum(1) / 4, [model[0].weight])
        share.append(torch.cat(rows).square().sum(0))
    return 8 * (share[0] + share[1]) / 4


def test_pitfall_f_formula_over_ranks() -> None:
    """S = sum of S_r / R**2, N = sum of N_r: the q of one process with all samples."""
    (model,) = to(torch.float64, mlp())
    x = randn(8, 4)
    rows = rows_of(model(x).square().sum(1) / 8, [model[0].weight])[0]
    assert_near(_two_ranks_by_hand(model, x), mean_square_of(rows), 1e-12, "two ranks")


def _rank(rank: int, tied: bool, results: Any) -> None:
    torch.manual_seed(0)
    model = LanguageModel(tied=tied).double()
    x = randint(7, 8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=tied)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics, virtual_batch_size=2)
    mine = x[4 * rank : 4 * rank + 4].chunk(2)
    with parallel.no_sync():
        (parallel(mine[0]).square().sum() / 4).backward()
    (parallel(mine[1]).square().sum() / 4).backward()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step()
        refused = "it was not"
    except RuntimeError as error:
        refused = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    statistics.all_reduce()
    squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
    samples = statistics.samples
    optimizer.step()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    # A second step: what was reduced once is not taken for this one.
    optimizer.zero_grad()
    parallel(mine[0]).square().mean().backward()
    try:
        optimizer.step()
        again = "it was not"
    except RuntimeError as error:
        again = str(error)
    results[rank] = (refused, same, samples, squares, after, again)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="two processes on the CPU")
@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_pitfall_f_two_processes(tied: bool, tmp_path: Path) -> None:
    """Two ranks with two accumulation steps each are one process with all eight samples.

    Catches a forgotten 1/R**2, squares of the reduced gradient, counts of one rank alone, and a
    step that runs on unreduced squares.
    """
    with Manager() as manager:
        results = manager.dict()
        in_ranks(2, tmp_path, _rank, tied, results)
        ranks = [results[0], results[1]]
    torch.manual_seed(0)
    model = LanguageModel(tied=tied).double()
    x = randint(7, 8, 3)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics, virtual_batch_size=2)
    (model(x).square().sum() / 8).backward()
    squares = {n: statistics.mean_square(p).clone() for n, p in model.named_parameters()}
    optimizer.step()
    for refused, same, samples, theirs, after, again in ranks:
        assert "all_reduce" in refused
        assert "all_reduce" in again
        assert same, "the step that raised had changed parameters"
        assert samples == 8
        for name, p in model.named_parameters():
            assert_near(theirs[name], squares[name], 1e-11, name)
            assert_near(after[name], p, 1e-11, name)


# g


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


gloo = pytest.mark.skipif(
    DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="one gloo group on the CPU"
)


@gloo
def test_pitfall_g_sharded_parameters_are_refused(mesh: Any) -> None:
    """FSDP2's parameters: a message that names one and the way out, before anything is hooked."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(4, 3))
    weight = distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)])
    model[0].weight = nn.Parameter(weight)
    with pytest.raises(RuntimeError, match=r"0\.weight.*MicroBatchSquares|MicroBatchSquares"):
        PerSampleSquares(model)


@gloo
@pytest.mark.parametrize("b", [1, 2, 4])
def test_pitfall_g_micro_batches_on_sharded_parameters(mesh: Any, b: int) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    start, gradients = randn(4, 3), randn(4, 4, 3, seed=1)
    sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    plain = nn.Parameter(start.clone())
    for p in (sharded, plain):
        statistics = MicroBatchSquares()
        optimizer = _adam([p], statistics, virtual_batch_size=b)
        for g in gradients:
            if p is plain:
                (p * g / 4).sum().backward()
            elif p.grad is None:
                p.grad = distribute_tensor(g / 4, mesh, [Shard(0)])
            else:
                p.grad += distribute_tensor(g / 4, mesh, [Shard(0)])
            statistics.accumulate(optimizer)
        optimizer.step()
        assert statistics.samples == 4
        assert isinstance(optimizer.state[p]["exp_avg_sq"], DTensor) == (p is sharded)
    assert_near(sharded.full_tensor(), plain, 1e-12, "sharded")
    assert not torch.equal(plain, start)


@gloo
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pitfall_g_fully_sharded_model(mesh: Any) -> None:
    """fully_shard itself: refused by one, and the other gives the plain model's steps."""
    from torch.distributed.fsdp import fully_shard

    (plain,) = to(torch.float64, mlp())
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(RuntimeError, match="MicroBatchSquares"):
        PerSampleSquares(sharded)
    x = randn(8, 4)
    for model in (plain, sharded):
        statistics = MicroBatchSquares()
        optimizer = _adam(model.parameters(), statistics, virtual_batch_size=2)
        for _ in range(2):
            for part in x.chunk(4):
                (squared_error()(model(part)).sum() / 4).backward()
                statistics.accumulate(optimizer)
            assert statistics.samples == 4
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert_near(q.full_tensor(), p, 1e-11, "fully sharded")


# h


@both_backends
def test_pitfall_h_clipping(backend: str) -> None:
    """c multiplies the gradient and c**2 the squares. At b = N the step is that of clipped AdamW;

    at b = 1 with c on the gradient alone the second moment would not shrink with the first.
    """
    samples = randn(4, 7, dtype=DTYPES[backend])
    norm = samples.mean(0).norm().item()
    for max_norm in (norm / 5, norm * 5):
        c = min(1.0, max_norm / (norm + 1e-6))
        for b in (1, 2, 4):
            p = nn.Parameter(randn(7, dtype=DTYPES[backend], seed=1))
            p.grad_sample = samples
            optimizer = _adam(
                [p],
                GradSampleSquares(),
                virtual_batch_size=b,
                clip=GlobalNorm(max_norm),
                backend=backend,
            )
            optimizer.step()
            w = (4 - b) / (b * 3)
            a2 = (1 - w) * samples.mean(0).square() + w * samples.square().mean(0)
            state = optimizer.state[p]
            tolerance = 1e-7 if backend == "reference" else 1e-5
            assert_near(state["exp_avg"], 0.4 * c * samples.mean(0), tolerance, "exp_avg")
            assert_near(state["exp_avg_sq"], 0.2 * c**2 * a2, tolerance, "exp_avg_sq")


# i


@both_backends
def test_pitfall_i_loss_scale(backend: str) -> None:
    """Squares are divided by scale**2 in the step that the scaler calls."""
    x = randn(4, 4, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        statistics = PerSampleSquares(model, backend=backend)
        optimizer = _adam(model.parameters(), statistics, virtual_batch_size=2, backend=backend)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, enabled=enabled)
        for _ in range(2):
            scaler.scale(squared_error()(model(x)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for mine, other in zip(*results, strict=True):
        assert_near(other, mine, 1e-6, "scaled")


@both_backends
def test_pitfall_i_unscaled_before_the_step(backend: str) -> None:
    """unscale_() leaves the squares scaled; they follow the gradients."""
    x = randn(4, 4, dtype=torch.float32)
    ends = []
    for enabled in (False, True):
        model = mlp(torch.float32)
        statistics = PerSampleSquares(model, backend=backend)
        optimizer = _adam(model.parameters(), statistics, virtual_batch_size=2, backend=backend)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0, enabled=enabled)
        scaler.scale(squared_error()(model(x)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append([p.detach().clone() for p in model.parameters()])
    for mine, other in zip(*ends, strict=True):
        assert_near(other, mine, 1e-6, "unscaled")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) enc:RuntimeWarning")
@both_backends
def test_pitfall_i_squares_overflow_first(backend: str) -> None:
    """Gradients of 1e25 are finite, their squares are not: the step must not be taken."""
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    statistics = MicroBatchSquares()
    optimizer = _adam([p], statistics, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    for _ in range(2):
        scaler.scale(p.sum() * 1e25).backward()
        statistics.accumulate(optimizer)
    assert torch.isfinite(p.grad).all()
    scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.ones_like(p))
    assert not optimizer.state[p] or optimizer.state[p]["step"] == 0
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    statistics.accumulate(optimizer)
    scaler.step(optimizer)
    assert torch.isfinite(p).all() and not torch.equal(p.detach(), torch.ones_like(p))


# j


@both_backends
def test_pitfall_j_autocast(backend: str) -> None:
    """Inputs in float32, errors in bfloat16: within bfloat16's rounding of the exact squares."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = to(torch.float32, model, randn(4, 3, 6))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    squared_error()(out.float()).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)


@both_backends
def test_pitfall_j_backward_inside_autocast(backend: str) -> None:
    """backward() under autocast may not recast: squares of bfloat16 errors stay float32."""
    model, x = to(torch.float32, nn.Sequential(nn.Linear(6, 3)), randn(4, 3, 6))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    statistics = PerSampleSquares(model, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        squared_error()(model(x).float()).sum().backward()
    check_squares(statistics, model, expected, tolerance=0.06)


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


# m


def _right_or_refused(make: Callable[[], nn.Module], x: Tensor) -> None:
    """Squares of every parameter, exact, or a RuntimeError by the end of step()."""
    torch.manual_seed(1)
    plain = make()
    torch.manual_seed(1)
    model = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            statistics = PerSampleSquares(model)
            backward(model, [(x,)], squared_error())
        optimizer = _adam(model.parameters(), statistics)
        expected = Expected.of(plain, [(x,)], squared_error())
        named = dict(model.named_parameters())
        squares = {name: statistics.mean_square(named[name]) for name in expected.rows}
        optimizer.step()
    except RuntimeError as error:
        assert _names_a_module_or_parameter(str(error), plain), str(error)
        return
    for name, q in squares.items():
        assert_near(q, expected.mean_square(name), 1e-10, name)


def _names_a_module_or_parameter(message: str, model: nn.Module) -> bool:
    names = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
    return any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm"])
def test_pitfall_m_reparametrised_weights(how: str) -> None:
    """The squares of W are not those of what W is computed from."""

    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            {
                "weight_norm": nn.utils.parametrizations.weight_norm,
                "spectral_norm": nn.utils.parametrizations.spectral_norm,
                "orthogonal": nn.utils.parametrizations.orthogonal,
                "old_weight_norm": nn.utils.weight_norm,
            }[how](layer)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer).double().to(DEVICE).eval()

    _right_or_refused(make, randn(3, 4))


class Functional(nn.Module):
    """The weight of a layer, used past the layer too (or only)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.how == "transposed":
            return torch.tanh(self.layer(x)) @ weight
        if self.how == "alone":
            return nn.functional.linear(x, weight.t())
        if self.how == "penalty":
            return self.layer(x) + weight.square().sum()
        return self.layer(x)


@pytest.mark.parametrize("how", ["transposed", "alone"])
def test_pitfall_m_weight_used_past_its_module(how: str) -> None:
    """Found at step(), by the parameter's name; nothing is stepped."""
    (model,) = to(torch.float64, nn.Sequential(nn.Linear(4, 4), Functional(how)))
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics)
    squared_error()(model(randn(3, 4))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"1\.layer\.weight"):
        optimizer.step()
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p)
    assert not optimizer.state


def test_pitfall_m_penalty_in_the_loss() -> None:
    """A weight penalty is no sample's: what it adds to p.grad has no squares."""
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics)
    loss = squared_error()(model(randn(3, 4))).sum() + 0.1 * model[0].weight.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        optimizer.step()


CHANGES: dict[str, Callable[[list[Tensor]], Any]] = {
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.01),
    "mul_": lambda params: params[0].grad.mul_(0.5),
    "another": lambda params: setattr(params[0], "grad", params[0].grad * 0.5),
}


@pytest.mark.parametrize("how", CHANGES)
def test_pitfall_m_gradients_changed_by_hand(how: str) -> None:
    """Squares cannot follow what was done to p.grad: refused by name, with the way out."""
    (model,) = to(torch.float64, mlp())
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics)
    squared_error()(model(randn(3, 4))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    CHANGES[how](list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"0\.weight.*GlobalNorm.*rescale"):
        optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)
    assert not optimizer.state
    optimizer.zero_grad()
    squared_error()(model(randn(3, 4))).sum().backward()
    optimizer.step()  # the next one is whole again


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_pitfall_m_rescaled_gradients(factor: float) -> None:
    """rescale(factor) says what every gradient was multiplied by: the squares follow by its square.

    Half the loss from the start is the same.
    """
    (model,) = to(torch.float64, mlp())
    x = randn(3, 4)
    plain = copy.deepcopy(model)
    expected = Expected.of(plain, [(x,)], lambda out: squared_error()(out) * factor)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics)
    squared_error()(model(x)).sum().backward()
    for p in model.parameters():
        p.grad.mul_(factor)
    statistics.rescale(factor)
    check_squares(statistics, model, expected)
    optimizer.step()
    for name, p in model.named_parameters():
        assert_near(optimizer.state[p]["exp_avg_sq"], 0.2 * expected.mean_square(name), 1e-11, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pitfall_m_hook_on_a_parameter(when: str) -> None:
    """p.register_hook changes the gradient on its way to p.grad: refused, or right."""
    (model,) = to(torch.float64, mlp())
    x = randn(3, 4)
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    if when == "before":
        model[0].weight.register_hook(lambda g: g * 2)
    statistics = PerSampleSquares(model)
    optimizer = _adam(model.parameters(), statistics)
    if when == "after":
        model[0].weight.register_hook(lambda g: g * 2)
    try:
        squared_error()(model(x)).sum().backward()
        squares = statistics.mean_square(model[0].weight).clone()
        optimizer.step()
    except RuntimeError as error:
        assert "0.weight" in str(error)
        return
    q = expected.mean_square("0.weight") * 4
    assert_near(squares, q, 1e-11, "squares of the doubled gradient")


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


# o and p


def _kernel_sources() -> dict[str, str]:
    folder = Path(inspect.getfile(fusedopt.kernels)).parent / "per_sample"
    sources = {path.name: path.read_text() for path in folder.glob("**/*.py")}
    assert len(sources) > 1
    return sources


def _code(source: str) -> str:
    """Without comments and docstrings: they may name what is avoided."""
    return re.sub(r"#.*|\"\"\"(.|\n)*?\"\"\"", "", source)


@pytest.mark.parametrize("word", ["autotune", "atomic_"])
def test_pitfall_o_no_autotune_that_accumulates(word: str) -> None:
    """A tuner runs a kernel once a configuration: what adds in place would add each time."""
    for name, source in _kernel_sources().items():
        assert word not in _code(source), f"{name} uses {word}"


def test_pitfall_o_first_call_of_each_shape() -> None:
    """The first call of a shape gives what the second gives, bit for bit."""
    for width in (3, 11, 18):
        model, x = to(torch.float32, nn.Linear(width, width + 1), randn(2, 3, width))
        statistics = gather(model, x, backend="triton")
        first = [statistics.mean_square(p).clone() for p in model.parameters()]
        statistics.reset()
        model.zero_grad()
        backward(model, [(x,)], squared_error())
        for p, q in zip(model.parameters(), first, strict=True):
            assert torch.equal(statistics.mean_square(p), q)


def test_pitfall_p_no_spinning_and_equal_bits() -> None:
    """Partial sums are added in a fixed order by a later kernel, never waited for."""
    for name, source in _kernel_sources().items():
        code = _code(source)
        for word in ("atomic_cas", "atomic_xchg", "debug_barrier"):
            assert word not in code, f"{name} uses {word}"
    bits = []
    for _ in range(3):
        (model,) = to(torch.float32, mlp())
        x = randn(9, 4, dtype=torch.float32)
        statistics = PerSampleSquares(model, backend="triton")
        backward(model, [(x,)], squared_error())
        bits.append([(statistics.mean_square(p), p.grad) for p in model.parameters()])
    for other in bits[1:]:
        for (q, g), (q2, g2) in zip(bits[0], other, strict=True):
            assert torch.equal(q, q2) and torch.equal(g, g2)


# q


@both_backends
def test_pitfall_q_dropout(backend: str) -> None:
    """Masks belong to samples: one forward, no other mask in the squares than in the gradient."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    gather(*to(DTYPES[backend], model, randn(3, 2, 4)), backend=backend)


@both_backends
def test_pitfall_q_coupled_decay_stays_out_of_the_squares(backend: str) -> None:
    """RMSprop's decay is added to the mean gradient, in the direction and in its square."""
    samples = randn(4, 7, dtype=DTYPES[backend])
    start = randn(7, dtype=DTYPES[backend], seed=1)
    for b, w in ((1, 1.0), (2, 1 / 3), (4, 0.0)):
        p = nn.Parameter(start.clone())
        p.grad_sample = samples
        optimizer = BatchDecoupledRMSprop(
            [p],
            lr=0.1,
            alpha=0.6,
            weight_decay=0.5,
            statistics=GradSampleSquares(),
            virtual_batch_size=b,
            backend=backend,
        )
        optimizer.step()
        g = samples.mean(0) + 0.5 * start
        a2 = (1 - w) * g.square() + w * samples.square().mean(0)
        tolerance = 1e-12 if backend == "reference" else 1e-5
        assert_near(optimizer.state[p]["square_avg"], 0.4 * a2, tolerance, f"b = {b}")
        expected = start - 0.1 * g / ((0.4 * a2).sqrt() + 1e-8)
        assert_near(p, expected, tolerance, f"p at b = {b}")


def test_pitfall_q_decoupled_decay_stays_out_of_the_squares() -> None:
    samples = randn(4, 7)
    states = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(randn(7, seed=1))
        p.grad_sample = samples
        optimizer = _adam([p], GradSampleSquares(), weight_decay=decay)
        optimizer.step()
        states.append((optimizer.state[p]["exp_avg_sq"], p.detach()))
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][1], states[1][1])


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
    optimizer = _adam(model.parameters(), statistics, backend=backend)
    optimizer.step()


def test_pitfall_r_micro_batch_without_gradient() -> None:
    """MicroBatchSquares: the same; p.grad of a parameter may appear late."""
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    g = randn(2, 3)
    statistics = MicroBatchSquares()
    optimizer = _adam([p, q], statistics)
    (p * g[0]).sum().div(2).backward()
    statistics.accumulate(optimizer)
    ((p + q) * g[1]).sum().div(2).backward()
    statistics.accumulate(optimizer)
    assert statistics.samples == 2
    assert_near(statistics.mean_square(p), g.square().mean(0), 1e-12, "p")
    assert_near(statistics.mean_square(q), g[1].square() / 2, 1e-12, "q")
    optimizer.step()
