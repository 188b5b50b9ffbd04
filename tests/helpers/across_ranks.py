"""What statistics say of a batch that several processes share, to be held against one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from multiprocessing import Manager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from observed import adam_over
from per_sample import randint
from ranks import in_ranks
from torch import Tensor, nn

Scenario = Callable[[int], None]
# Seconds for all scenarios of a world: many times what they take.
LIMIT = 400.0


def outcomes_of(
    scenarios: Mapping[int, Sequence[Scenario]], folders: pytest.TempPathFactory
) -> Callable[[int], dict[str, str]]:
    """Return what tells by the number of processes what each scenario raised.

    They are run when first asked for.
    """

    @cache
    def of(world: int) -> dict[str, str]:
        return run_all(world, folders.mktemp("ranks"), scenarios[world])

    return of


def run_all(world: int, directory: Path, scenarios: Sequence[Scenario]) -> dict[str, str]:
    """Run scenarios one after the other in the same processes, and say what each one raised.

    Starting processes takes longer than most of what they do. After a failure there is no going on:
    the processes may not be at the same place.

    Returns:
        By the scenario's name what the first process that failed raised, or nothing; those after a
        failure are left out.
    """
    with Manager() as manager:
        results = manager.dict()
        try:
            in_ranks(world, directory, _one_by_one, scenarios, results, limit=LIMIT)
        except Exception as error:
            if not any(results.values()):
                raise error
        return {name: next(filter(None, [v for (n, _), v in results.items() if n == name]), "")
                for name, _ in results.keys()}  # fmt: skip


def _one_by_one(rank: int, scenarios: Sequence[Scenario], results: Any) -> None:
    dist.barrier()
    for scenario in scenarios:
        key = scenario.__name__, rank
        try:
            scenario(rank)
        except BaseException:
            results[key] = f"process {rank}: {traceback.format_exc()}"
            raise
        results[key] = ""
        # A failure elsewhere ends this process here.
        dist.barrier()


def alone(statistics: Any) -> Any:
    """Take what statistics have gathered in this process for all that there is."""
    if not hasattr(alone, "group"):
        alone.group = dist.new_subgroups(group_size=1)[0]
    statistics.all_reduce(alone.group)
    return statistics


def ids(step: int, count: int = 8, length: int = 3) -> Tensor:
    """The whole batch of a step: tokens of vocabulary 7."""
    return randint(7, count, length, seed=step)


def share(x: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
    """The samples of one process, of which each has another number."""
    return x.split(list(sizes))[rank]


def local_loss(outputs: Tensor, parts: int, total: int) -> Tensor:
    """The loss of a process whose average over ``parts`` processes is the mean over the batch."""
    return parts / total * losses(outputs).sum()


def losses(outputs: Tensor) -> Tensor:
    return outputs.square().flatten(1).sum(1)


def full(tensor: Any) -> Tensor:
    """The whole tensor, whatever processes have parts of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def findings(model: nn.Module, statistics: Any) -> dict[str, Any]:
    """All that statistics say between backward and step."""
    found: dict[str, Any] = {"samples": statistics.samples}
    for name, value in zip(("signal", "noise", "ratio"), statistics.noise_scale(), strict=True):
        found[name] = value.clone()
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        if p.grad is not None:
            squares = full(statistics.mean_square(p)).clone()
            ratio = full(statistics.signal_to_noise(p))
            found[f"squares of {name}"] = squares
            # Of gradients that are zero but for rounding (a bias of keys) it is anything.
            ratio = torch.where(squares > 1e-20 * squares.max(), ratio, 0.0)
            found[f"signal to noise of {name}"] = ratio
    return found


def adam(model: nn.Module, statistics: Any, **options: Any) -> Any:
    # Adam makes steps of gradients that are zero but for rounding, without an eps that is larger.
    options = {"virtual_batch_size": 2, "weight_decay": 0.0, "eps": 1e-3, **options}
    return adam_over(model.parameters(), statistics, **options)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {
        n.removeprefix("module."): full(p.detach()).clone() for n, p in model.named_parameters()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], within: float, what: str) -> None:
    """Hold findings, or parameters, against those of one process, by the largest element."""
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert found[name] == value, f"{what}: {name} {found[name]} {value}"
            continue
        own = found[name]
        assert own.shape == value.shape, f"{what}: {name}"
        # Zero over zero is nan in both; where the variance is but rounding, the ratio is anything.
        plain = value.isfinite() & (value.abs() < 1e6)
        if "signal to noise" not in name:
            assert bool(plain.all()), f"{what}: {name}"
        error = (own - value)[plain].abs()
        scale = value[plain].abs()
        worst = float((error / (1e-12 + scale.max())).max()) if error.numel() else 0.0
        assert worst <= within, f"{what}: {name} is {worst:.2e} from one process"


def all_equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
