"""``PerSampleSquares(every=k)``: what the second moment is where squares are made now and then.

The oracle is the moment as ``docs/batch_decoupled.md`` states it, a loop in float64 over gradients
of single samples: the square of each step's own gradient, beside squares of samples of the last
step that was measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, RMSPROP, target_alone
from marks import both_backends
from per_sample import DTYPES, assert_near, mlp, randn, rows_of
from torch import Tensor, nn

import fusedopt
from fusedopt import BatchDecoupledAdam, BatchDecoupledRMSprop, PerSampleSquares

BATCHES = (5, 4, 5, 5, 6, 5, 4, 5, 5)


def shares(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out - target_alone(out)).square().sum(1) / len(x)


def train(
    make: Any,
    every: int | None,
    b: float,
    batches: Sequence[int] = BATCHES,
    backend: str = "reference",
    clip: float | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    model = mlp(DTYPES[backend])
    rate = {} if every is None else {"every": every}
    statistics = PerSampleSquares(model, backend=backend, **rate)
    bound = None if clip is None else fusedopt.GlobalNorm(clip)
    optimizer = make(
        model.parameters(),
        statistics=statistics,
        virtual_batch_size=b,
        backend=backend,
        clip=bound,
        **options,
    )
    run(model, optimizer, batches)
    return model, optimizer


def run(model: nn.Module, optimizer: Any, batches: Sequence[int], start: int = 0) -> None:
    for seed, n in enumerate(batches, start):
        x = randn(n, 4, dtype=next(model.parameters()).dtype, seed=seed)
        shares(model, x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


class Hand:
    """The update as printed."""

    def __init__(self, model: nn.Module, every: int, b: float, options: dict[str, Any]) -> None:
        self.model = copy.deepcopy(model).double()
        self.params = list(self.model.parameters())
        self.every, self.b, self.options, self.t = every, b, options, 0
        self.state = [
            {name: torch.zeros_like(p) for name in ("m", "v", "top", "q")} for p in self.params
        ]

    def moments(self, x: Tensor, clip: float | None) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter's clipped gradient and second moment, and count the step."""
        rows = rows_of(shares(self.model, x.double()), self.params)
        n, b = len(x), self.b
        gradients = [r.sum(0) for r in rows]
        factor = 1.0
        if clip is not None:
            norm = torch.stack([g.norm() for g in gradients]).norm()
            factor = min(1.0, clip / (float(norm) + 1e-6))
        w = (n - b) / (b * (n - 1)) if b < n else 0.0
        found = []
        for r, g, s in zip(rows, gradients, self.state, strict=True):
            if self.t % self.every == 0:
                s["q"] = (factor * n * r).square().mean(0)
            own = (factor * g).square()
            found.append((factor * g, (1 - w) * own + w * s["q"]))
        self.t += 1
        return found

    def adam(self, x: Tensor, clip: float | None) -> None:
        options, found = self.options, self.moments(x, clip)
        lr, betas = options["lr"], options["betas"]
        correction = options.get("bias_correction", "adam")
        running = correction == "running_mean"
        k1, k2 = (max(1 - beta, 1 / self.t) if running else 1 - beta for beta in betas)
        sums = [1 - beta**self.t if correction == "adam" else 1.0 for beta in betas]
        with torch.no_grad():
            for p, s, (g, u) in zip(self.params, self.state, found, strict=True):
                s["m"] = (1 - k1) * s["m"] + k1 * g
                s["v"] = (1 - k2) * s["v"] + k2 * u
                s["top"] = torch.maximum(s["top"], s["v"])
                v = s["top"] if options.get("amsgrad") else s["v"]
                p *= 1 - lr * options["weight_decay"]
                p -= lr * s["m"] / sums[0] / ((v / sums[1]).sqrt() + 1e-8)

    def rmsprop(self, x: Tensor, clip: float | None) -> None:
        found, alpha = self.moments(x, clip), self.options["alpha"]
        total = 1 - alpha**self.t if self.options.get("bias_correction") else 1.0
        with torch.no_grad():
            for p, s, (g, u) in zip(self.params, self.state, found, strict=True):
                s["v"] = alpha * s["v"] + (1 - alpha) * u
                p -= self.options["lr"] * g / ((s["v"] / total).sqrt() + 1e-8)


def against_hand(
    make: Any, every: int, b: int, backend: str, clip: float | None = None, **options: Any
) -> None:
    hand = Hand(mlp(DTYPES[backend]), every, b, options)
    for seed, n in enumerate(BATCHES):
        x = randn(n, 4, dtype=DTYPES[backend], seed=seed)
        (hand.adam if make is BatchDecoupledAdam else hand.rmsprop)(x, clip)
    model, _ = train(make, every, b, backend=backend, clip=clip, **options)
    tolerance = {"reference": 1e-9, "triton": 1e-4}[backend]
    for p, expected in zip(model.parameters(), hand.params, strict=True):
        assert_near(p, expected, tolerance, f"{tuple(p.shape)}")
    start = list(mlp(DTYPES[backend]).parameters())
    assert all((p - s).abs().max() > 0.01 for p, s in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("backend", "every", "b"),
    [("reference", k, b) for k in (1, 2, 4, 20) for b in (1, 2, 4)]
    + [("triton", 4, b) for b in (2, 4)],
)
def test_adam_by_hand(every: int, b: int, backend: str) -> None:
    """Batches of 4 to 6, so that w changes from step to step, and is 0 at some for b = 4.

    Catches: weights k (1 - beta2) of squares at the steps that have some, the w of the step that
    was measured, squares of the sum over another number of samples.
    """
    against_hand(BatchDecoupledAdam, every, b, backend, **ADAM)


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"bias_correction": None},
        {"bias_correction": "running_mean"},
        {"bias_correction": "running_mean", "betas": (0.6, 0.75)},
    ],
    ids=str,
)
def test_variants_by_hand(options: dict[str, Any], every: int) -> None:
    against_hand(BatchDecoupledAdam, every, 2, "reference", **{**ADAM, **options})


@pytest.mark.parametrize(("every", "backend"), [(1, "reference"), (3, "reference"), (3, "triton")])
def test_clipped_by_hand(every: int, backend: str) -> None:
    """The factor of the step that is measured on its squares, and of no other.

    Catches: kept squares that are clipped again at every step, or not at all.
    """
    against_hand(BatchDecoupledAdam, every, 2, backend, clip=0.8, **ADAM)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("every", [2, 4])
def test_rmsprop_by_hand_now_and_then(every: int, corrected: bool) -> None:
    options = {**RMSPROP, "weight_decay": 0.0, "bias_correction": corrected}
    against_hand(BatchDecoupledRMSprop, every, 2, "reference", **options)


# Ends that are known


def bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same_states(a: Any, b: Any) -> bool:
    assert all(a.state.values())
    pairs = zip(a.state.values(), b.state.values(), strict=True)
    return all(torch.equal(x[k], y[k]) for x, y in pairs for k in y)


@both_backends
@pytest.mark.parametrize("b", [3])
def test_every_step_is_bitwise_as_before(b: int, backend: str) -> None:
    model, optimizer = train(BatchDecoupledAdam, 1, b, backend=backend, **ADAM)
    other, expected = train(BatchDecoupledAdam, None, b, backend=backend, **ADAM)
    assert bits(model, other) and same_states(optimizer, expected)


@both_backends
@pytest.mark.filterwarnings("ignore:virtual_batch_size=5 is more than the 3")
@pytest.mark.parametrize(("every", "clip"), [(2, None), (4, 0.8), (16, None)])
def test_whole_batch_is_adamw_bitwise_for_any_k(
    every: int, clip: float | None, backend: str
) -> None:
    """The last batch of an epoch is smaller: it is as ordinary.

    Catches: weights that are not Adam's at steps without squares, and a sum with 0 times squares.
    """
    model, bound = mlp(DTYPES[backend]), None if clip is None else fusedopt.GlobalNorm(clip)
    optimizer = BatchDecoupledAdam(
        model.parameters(),
        **ADAM,
        statistics=PerSampleSquares(model, every=every, backend=backend),
        virtual_batch_size=5,
        backend=backend,
        clip=bound,
    )
    other = copy.deepcopy(model)
    bound = None if clip is None else fusedopt.GlobalNorm(clip)
    plain = fusedopt.AdamW(other.parameters(), **ADAM, backend=backend, clip=bound)
    for seed, n in enumerate((5, 5, 5, 3, 5, 5)):
        shares(model, randn(n, 4, dtype=DTYPES[backend], seed=seed)).sum().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    assert bits(model, other) and same_states(optimizer, plain)


def test_gradients_without_squares_are_torchs() -> None:
    """The whole way beside AdamW, in the observed model and the plain one."""
    with pytest.warns(UserWarning, match="ordinary"):
        model, _ = train(BatchDecoupledAdam, 3, 6, **ADAM)
    other = mlp()
    run(other, torch.optim.AdamW(other.parameters(), **ADAM), BATCHES)
    assert bits(model, other)


# Checkpoints


@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_a_checkpoint_in_the_midst_of_a_cycle(stop: int) -> None:
    """Cycles of 4: the count of steps says where in one it is. Catches a cycle that begins anew."""
    whole, _ = train(BatchDecoupledAdam, 4, 2, **ADAM)
    model, optimizer = train(BatchDecoupledAdam, 4, 2, BATCHES[:stop], **ADAM)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = train(BatchDecoupledAdam, 4, 2, (), **ADAM)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, BATCHES[stop:], stop)
    assert bits(model, whole)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"state_dtype": "int8"}), (torch.bfloat16, {"master": "remainder"})],
)
def test_kept_squares_beside_states_in_other_formats(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Catches: kept squares that are coded as a state is, or loaded in the parameter's type."""
    ends = []
    for stop in (0, 5):
        model, optimizer = _of(dtype, options)
        run(model, optimizer, BATCHES[:stop])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer = _of(dtype, options)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        run(model, optimizer, BATCHES[stop:], stop)
        kept = {optimizer.state[p]["mean_square"].dtype for p in model.parameters()}
        assert kept == {torch.float32}
        ends.append(model)
    assert bits(*ends)


def _of(dtype: torch.dtype, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = mlp(dtype)
    statistics = PerSampleSquares(model, every=4, backend="reference")
    return model, BatchDecoupledAdam(
        model.parameters(), **ADAM, **options, statistics=statistics, backend="reference"
    )


def test_goes_on_from_squares_at_every_step() -> None:
    """A state of AdamW, or of squares at every step, has none that were kept: they are made first.

    Catches: squares of nothing, where the count of steps says that this is no step to make some.
    """
    model, optimizer = train(BatchDecoupledAdam, 1, 2, BATCHES[:6], **ADAM)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.statistics.remove()
    statistics = PerSampleSquares(model, every=4)
    other = BatchDecoupledAdam(
        model.parameters(), **ADAM, statistics=statistics, virtual_batch_size=2
    )
    other.load_state_dict(state)
    measured = []
    for i in range(6, 12):
        run(model, other, (5,), i)
        measured.append(statistics.measured)
    # Counts of steps before: 6 to 11.
    assert measured == [True, False, True, False, False, False]


def test_what_torch_makes_of_a_checkpoint() -> None:
    """Kept squares ride along, and are nothing to AdamW of torch's."""
    model, optimizer = train(BatchDecoupledAdam, 4, 2, **ADAM)
    saved = optimizer.state_dict()
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(plain.parameters(), **ADAM)
    other.load_state_dict(copy.deepcopy(saved))
    run(plain, other, (5,), 20)
    exported = fusedopt.export_state_dict(optimizer)
    assert all("exp_avg_sq" in state for state in exported["state"].values())


# Scalers of the loss


class Overflows:
    """Multiplies the loss by infinity at some calls."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at, self.calls = at, 0

    def __call__(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * (math.inf if self.calls in self.at else 1.0)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_skipped_step_is_measured_again(unscale: bool) -> None:
    """Overflows at the first, the fourth (measured) and the sixth call, of cycles of 3.

    Catches: a phase that goes by calls or attempts, by which a moment of nothing is divided.
    """
    model, options = mlp(), {**ADAM, "backend": "reference"}
    statistics = PerSampleSquares(model, every=3)
    optimizer = BatchDecoupledAdam(
        model.parameters(), **options, statistics=statistics, virtual_batch_size=2
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    spoil, measured = Overflows([1, 5, 7]), []
    taken = [0, 0, 1, 2, 3, 3, 4, 4, 5]
    for seed in taken:
        scaler.scale(spoil(shares(model, randn(5, 4, seed=seed)).sum())).backward()
        measured.append(statistics.measured)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert measured == [True, True, False, False, True, True, False, False, False]
    other, _ = train(BatchDecoupledAdam, 3, 2, (5,) * 6, **ADAM)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_near(p, q, 1e-9, "with a scaler")


# What does not go with it


def refused(message: str, make: Callable[..., Any] = BatchDecoupledAdam, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        train(make, 2, 2, (5,), **options)


def test_options_that_are_refused() -> None:
    refused(r"param_groups\[0\] keeps step counts", **{**ADAM, "capturable": True})
    refused("centered=True, which", BatchDecoupledRMSprop, **{**RMSPROP, "centered": True})


def test_refusals_leave_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    optimizer = BatchDecoupledAdam(
        model.parameters(), capturable=True, statistics=PerSampleSquares(model, every=2)
    )
    shares(model, randn(5, 4)).sum().backward()
    with pytest.raises(ValueError, match="every=2"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)


def test_gradient_release_refuses() -> None:
    model = mlp()
    optimizer = BatchDecoupledAdam(model.parameters(), statistics=PerSampleSquares(model, every=2))
    with pytest.raises(ValueError, match="every=2"):
        fusedopt.gradient_release(model, optimizer)


@pytest.mark.parametrize("every", [0, -1, 1.5, 2.0, True, "2", None])
def test_no_number_of_steps(every: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="every must be a whole number of steps"):
        PerSampleSquares(model, every=every)
    assert type(model[0]) is nn.Linear


def test_tokens_for_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="sample='token'"):
        PerSampleSquares(mlp(), sample="token", every=2)
