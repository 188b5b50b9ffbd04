"""``torch.compile`` of a whole training step, optimizer and statistics included.

Our launch cannot be traced, so that the graph breaks around it, and backward, which a compiled step
calls from Python, would have every hook compiled that does not say that it is left alone.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import (
    ADAMW,
    Pair,
    assert_same,
    batches,
    each_pair,
    loss_of,
    network,
    values,
)
from ranks import in_ranks
from torch import Tensor, nn

import fusedopt

STEPS = 6
Step = Callable[[Tensor, Tensor], Any]
eager_backends = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


def _run(step: Step, compiler: str | None, after: Callable[[], Any] | None = None) -> list[Any]:
    """What a step returns, step after step; compiled where a compiler is named."""
    torch._dynamo.reset()
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about its own parts
        compiled = step if compiler is None else torch.compile(step, backend=compiler)
        for x, y in batches(STEPS, 4):
            results.append(compiled(x, y))
            if after is not None:
                after()
    assert not torch._dynamo.utils.counters["recompile_limit"]
    torch._dynamo.reset()
    return results


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, compiler: str | None) -> list[Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss

    # A learning rate that changes is no reason to compile anew.
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return _run(step, compiler, schedule.step)


@eager_backends
@each_pair
def test_as_torchs_optimizer_without_it(pair: Pair, compiler: str) -> None:
    theirs, ours = network(), network()
    _train(theirs, pair.theirs(theirs.parameters(), **pair.options), None)
    _train(ours, pair.ours(ours.parameters(), **pair.own), compiler)
    assert_same(values(ours), values(theirs), values(network()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_with_inductor(tmp_path: Path) -> None:
    # In a process of its own: its compiler imports setuptools, which has to come before whatever
    # another test has imported of distutils.
    in_ranks(1, tmp_path, _with_inductor)


def _with_inductor(rank: int) -> None:
    theirs, ours = network(), network()
    _train(theirs, torch.optim.AdamW(theirs.parameters(), **ADAMW.options), None)
    optimizer = fusedopt.AdamW(
        ours.parameters(), **ADAMW.own, clip=fusedopt.GlobalNorm(float("inf"))
    )
    _train(ours, optimizer, "inductor")
    # Forward and backward in fused loops.
    assert_same(values(ours), values(theirs), values(network()), atol=1e-6)


def _answers(statistics: Any, model: nn.Sequential) -> tuple[Any, ...]:
    weight = model[0].weight
    return (
        statistics.noise_scale().ratio,
        statistics.mean_square(weight),
        statistics.signal_to_noise(weight),
        statistics.samples,
    )


@pytest.mark.parametrize("source", [fusedopt.PerSampleSquares, fusedopt.MicroBatchSquares])
def test_with_statistics_and_what_they_are_asked(source: type) -> None:
    """Two backward passes a step, and questions between them and the update."""
    # Catches a hook or a method that dynamo traces: it fails, or works on stand-ins.
    runs = []
    for compiler in (None, "aot_eager"):
        model = network()
        by_samples = source is fusedopt.PerSampleSquares
        statistics = source(model) if by_samples else source()
        optimizer = fusedopt.BatchDecoupledAdam(
            model.parameters(), **ADAMW.own, statistics=statistics
        )

        def step(
            x: Tensor, y: Tensor, model=model, optimizer=optimizer, statistics=statistics
        ) -> Any:
            optimizer.zero_grad()
            for part, target in zip(x.split(2), y.split(2), strict=True):
                loss_of(model, part, target).div(2).backward()
                if isinstance(statistics, fusedopt.MicroBatchSquares):
                    statistics.accumulate(optimizer)
            answers = _answers(statistics, model)
            optimizer.step()
            return answers

        runs.append((_run(step, compiler), values(model)))
    (answers, theirs), (same, ours) = runs
    assert_same(ours, theirs, values(network()))
    for expected, got in zip(answers, same, strict=True):
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
