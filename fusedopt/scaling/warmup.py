"""Batch sizes that grow during a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from .batch import rescale, rescale_
from .checks import check_positive


class BatchSizeWarmup:
    """Grow the batch at milestones, and rescale the optimizer at each, in place.

    With a schedule of the learning rate that follows the samples too::

        warmup = fusedopt.scaling.BatchSizeWarmup(
            optimizer, {0: 32, 10_000: 64, 50_000: 512}, rule="decoupled")
        schedule = fusedopt.scaling.samples_schedule(
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10_000),
            optimizer, from_batch=32)
        while warmup.samples < 320_000:
            x, y = draw(warmup.batch_size)
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            schedule.step(warmup.batch_size)

    The warm-up steps first: the schedule has to know the size of the next batch. Where steps are
    replayed from a CUDA graph, call ``optimizer.push_hyperparameters()`` after ``step()``.

    Args:
        optimizer: with hyper-parameters for the first batch size.
        milestones: for numbers of samples seen, the batch size from there on. The first is 0.
        rule: as for ``rescale``.
        beta_form: as for ``rescale``.

    Attributes:
        optimizer: that is rescaled.
        milestones: as given.
        batch_size: of the next batch, in samples.
        samples: seen so far.

    Raises:
        ValueError: for milestones that do not start at 0 or do not increase, batch sizes that are
            no positive integers, or as ``rescale`` for any of the batch sizes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Mapping[int, int],
        rule: str,
        beta_form: str | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.milestones = _checked(milestones)
        self.rule = rule
        self.beta_form = beta_form
        self.samples: float = 0
        self.batch_size = self._size_at(0)
        # Now, and not after days of training. With a state that was loaded, hyper-parameters are
        # those of a later batch size, and only the names can be checked.
        groups = [{}] if optimizer.state else optimizer.param_groups
        for size in self.milestones.values():
            for group in groups:
                rescale(group, self.batch_size, size, rule, beta_form=beta_form)

    def step(self, count: float | None = None) -> None:
        """Count the samples of a step; at a milestone, rescale. Call it after optimizer.step().

        Args:
            count: samples of the step; None means ``batch_size``.

        Raises:
            ValueError: for a count that is not positive, or as ``rescale_``. Nothing has changed
                then.
        """
        count = self.batch_size if count is None else count
        check_positive("count", count)
        size = self._size_at(self.samples + count)
        if size != self.batch_size:
            rescale_(self.optimizer, self.batch_size, size, self.rule, beta_form=self.beta_form)
        self.samples += count
        self.batch_size = size

    def state_dict(self) -> dict[str, Any]:
        """Return the samples seen and the batch size that the optimizer is scaled to."""
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "milestones": dict(self.milestones),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another warm-up was. The optimizer's own state has what was rescaled.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: where the milestones up to there were others.
        """
        passed = state_dict["samples"]
        theirs, ours = (
            {samples: size for samples, size in milestones.items() if samples <= passed}
            for milestones in (state_dict["milestones"], self.milestones)
        )
        if theirs != ours:
            raise ValueError(f"the state has passed the milestones {theirs}, and these are {ours}")
        self.samples = state_dict["samples"]
        self.batch_size = state_dict["batch_size"]

    def _size_at(self, samples: float) -> int:
        passed = bisect_right(list(self.milestones), samples)
        return list(self.milestones.values())[passed - 1]


def _checked(milestones: Mapping[int, int]) -> dict[int, int]:
    keys = list(milestones)
    if not keys or keys[0] != 0:
        raise ValueError(f"milestones must start at 0 samples, got {dict(milestones)}")
    if any(not after > before for before, after in zip(keys, keys[1:], strict=False)):
        raise ValueError(f"milestones must increase, got {keys}")
    for samples, size in milestones.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"milestones[{samples}] must be a batch size of at least 1, an integer, got {size}"
            )
    return dict(milestones)
