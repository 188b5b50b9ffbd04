"""Batch sizes that grow during a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from .batch import rescale, rescale_
from .checks import check_optimizer, not_negative, number, positive, saved
from .holders import state_holder


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
        TypeError: for what is no optimizer of torch's.
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
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.milestones = _checked(milestones)
        self.rule = rule
        self.beta_form = beta_form
        self.samples: float = 0
        self.batch_size = self._size_at(0)
        # Now, and not after days of training. With a state that was loaded, hyper-parameters are
        # those of a later batch size, and only the names can be checked.
        groups = [{}] if state_holder(optimizer).state else optimizer.param_groups
        self._groups = len(optimizer.param_groups)
        for size in self.milestones.values():
            for group in groups:
                rescale(group, self.batch_size, size, rule, beta_form=beta_form)

    def step(self, count: float | None = None) -> None:
        """Count the samples of a step; at a milestone, rescale. Call it after optimizer.step().

        Args:
            count: samples of the step; None means ``batch_size``.

        Raises:
            ValueError: for a count that is not positive, for groups that were added to the
                optimizer after the batch grew, or as ``rescale_``. Nothing has changed then.
        """
        count = positive("count", self.batch_size if count is None else count)
        size = self._size_at(not_negative("samples", self.samples) + count)
        self._check_groups()
        if size != self.batch_size:
            rescale_(self.optimizer, self.batch_size, size, self.rule, beta_form=self.beta_form)
        self.samples += count
        self.batch_size = size

    def state_dict(self) -> dict[str, Any]:
        """Return the samples seen, the batch size that the optimizer is scaled to, and how."""
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "milestones": dict(self.milestones),
            "rule": self.rule,
            "beta_form": self.beta_form,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another warm-up was. The optimizer's own state has what was rescaled.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: where the milestones up to there were others, the rule or the form is
                another, or for what no warm-up saves. Nothing has changed then.
        """
        passed = saved(state_dict, "samples", not_negative)
        theirs, ours = (
            {samples: size for samples, size in milestones.items() if samples <= passed}
            for milestones in (saved(state_dict, "milestones", _checked_saved), self.milestones)
        )
        if theirs != ours:
            raise ValueError(f"the state has passed the milestones {theirs}, and these are {ours}")
        size = saved(state_dict, "batch_size", number)
        if size != self._size_at(passed):
            raise ValueError(
                f"state_dict['batch_size'] is {size}, and after {passed} samples it is"
                f" {self._size_at(passed)}"
            )
        # Not there in states that were saved before.
        for name in ("rule", "beta_form"):
            if name in state_dict and state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"state_dict[{name!r}] is {state_dict[name]!r}, and here it is"
                    f" {getattr(self, name)!r}: the optimizer is scaled by that"
                )
        self.samples, self.batch_size = passed, self._size_at(passed)

    def _check_groups(self) -> None:
        """Raise ValueError for groups of which it is not known which batch size they are for."""
        found = len(self.optimizer.param_groups)
        if found > self._groups and self.batch_size != self._size_at(0):
            raise ValueError(
                f"the warm-up has rescaled {self._groups} parameter groups, and the optimizer has"
                f" {found}: give the new ones what scaling.rescale returns for a batch of"
                f" {self.batch_size}, make the warm-up anew and load this one's state_dict()"
            )
        self._groups = found

    def _size_at(self, samples: float) -> int:
        passed = bisect_right(list(self.milestones), samples)
        return list(self.milestones.values())[passed - 1]


def _checked(milestones: Mapping[int, int]) -> dict[int, int]:
    if not isinstance(milestones, Mapping):
        raise TypeError(f"milestones must be a dictionary, got {milestones!r}")
    keys = list(milestones)
    if not keys or keys[0] != 0:
        raise ValueError(f"milestones must start at 0 samples, got {dict(milestones)}")
    for key in keys:
        number("a key of milestones", key)
    if any(not after > before for before, after in zip(keys, keys[1:], strict=False)):
        raise ValueError(f"milestones must increase, got {keys}")
    for samples, size in milestones.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"milestones[{samples}] must be a batch size of at least 1, an integer, got {size}"
            )
    return dict(milestones)


def _checked_saved(name: str, milestones: Any) -> dict[int, int]:
    try:
        return _checked(milestones)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
