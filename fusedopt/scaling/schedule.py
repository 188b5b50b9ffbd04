"""Learning-rate schedules that follow the samples seen instead of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import check_optimizer, finite_numbers, not_negative, positive, saved
from .curve import Curve, PastEnd, SchedulerFactory

# Of the scheduler, within one step: each takes the host some tens of microseconds.
_MOST_STEPS = 1_000_000


def samples_schedule(
    scheduler_factory: SchedulerFactory,
    optimizer: Optimizer,
    from_batch: float,
    batch_size: float | None = None,
) -> SamplesSchedule:
    """Make a learning-rate schedule that holds for every batch size.

    It is written as a scheduler of torch's for batches of `from_batch`, and followed exactly
    whatever the batches are: a step's lr is the mean of the schedule over the samples of that step,
    so that the sum of lr over samples is that of the schedule, for larger and smaller batches,
    ratios that are no integers, and ragged last batches. Where all of a step's samples lie in one
    step of the scheduler, as with batches of `from_batch`, lr is that of torch's to the bit::

        optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
        schedule = fusedopt.scaling.samples_schedule(
            lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, max_lr=3e-4, total_steps=10_000, cycle_momentum=False),
            optimizer, from_batch=32, batch_size=512)
        fusedopt.scaling.rescale_(optimizer, 32, 512, rule="sqrt", beta_form="power")
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    In this order, what the scheduler has in absolute numbers (``max_lr``, ``eta_min``) is for
    batches of `from_batch`, and ``rescale_``, then or in the middle of a run, changes it as lr.
    Made after ``rescale_``, it has to be for the batches that are in use. The host runs torch's
    scheduler once for each `from_batch` samples.

    Args:
        scheduler_factory: called once, with an optimizer that has the learning rates of
            `optimizer`; returns a ``torch.optim.lr_scheduler.LRScheduler`` on it.
        optimizer: its ``lr`` is set now, and at each ``step()``; lr tensors are written in place.
        from_batch: samples of a step of the scheduler.
        batch_size: samples of the first step; None means `from_batch`.

    Returns:
        The schedule.

    Raises:
        TypeError: where the factory returns no scheduler, or ReduceLROnPlateau, or for what is no
            optimizer of torch's, or no number.
        ValueError: for sizes that are not positive, or so different that one batch is more than a
            million steps of the scheduler, a scheduler that was made for another
            optimizer, or one that changes more than learning rates, as OneCycleLR and CyclicLR do
            unless ``cycle_momentum=False``.
    """
    return SamplesSchedule(scheduler_factory, optimizer, from_batch, batch_size)


class SamplesSchedule:
    """A learning-rate schedule over samples: see ``samples_schedule``, which makes it.

    Attributes:
        optimizer: whose learning rates it sets.
        from_batch: samples of a step of the scheduler that it follows.
        samples: seen before the coming step.
        batch_size: samples of the coming step.
    """

    def __init__(
        self,
        scheduler_factory: SchedulerFactory,
        optimizer: Optimizer,
        from_batch: float,
        batch_size: float | None = None,
    ) -> None:
        check_optimizer(optimizer)
        from_batch = positive("from_batch", from_batch)
        batch_size = from_batch if batch_size is None else positive("batch_size", batch_size)
        self.optimizer = optimizer
        self.from_batch = from_batch
        self.samples: float = 0
        self.batch_size = batch_size
        self._curve = Curve(scheduler_factory, optimizer)
        self._means = self._mean(0, batch_size)
        for group in optimizer.param_groups:
            # A number where lr is a tensor: it is read at each step, and must not make that wait.
            group.setdefault("initial_lr", float(group["lr"]))
        self._base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._last_lrs: list[float] = []
        self._write()

    def step(self, batch_size: float | None = None) -> None:
        """Count the samples of a step, and set lr for the next. Call it after optimizer.step().

        Args:
            batch_size: samples of the next step; None means as many as before.

        Raises:
            ValueError: for a size that is not positive, groups that were added to the optimizer, or
                by the scheduler where the next step begins past its end. (A step that begins before
                has the mean of what there is.) Nothing has been written then.
        """
        size = positive("batch_size", self.batch_size if batch_size is None else batch_size)
        # Attributes may be set, and no number of steps leads to nan.
        positive("from_batch", self.from_batch)
        self._check_groups(self._base_lrs)
        done = positive("batch_size", self.batch_size)
        seen = not_negative("samples", self.samples) + done
        self._means = self._mean(seen, size)
        self.samples, self.batch_size = seen, size
        self._write()

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that were set last, a number for each group."""
        return list(self._last_lrs)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is, for ``load_state_dict`` of one that is made alike."""
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "from_batch": self.from_batch,
            "base_lrs": list(self._base_lrs),
            "means": list(self._means),
            "curve": self._curve.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another schedule was; before or after the optimizer's own state is loaded.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: where the number of groups differs, or for what no schedule saves. Nothing
                has changed then.
        """
        base_lrs = saved(state_dict, "base_lrs", finite_numbers)
        self._check_groups(base_lrs)
        means = saved(state_dict, "means", finite_numbers)
        self._check_groups(means)
        samples = saved(state_dict, "samples", not_negative)
        batch_size = saved(state_dict, "batch_size", positive)
        from_batch = saved(state_dict, "from_batch", positive)
        saved(state_dict, "curve", lambda _, curve: self._curve.load_state_dict(curve))
        self.samples, self.batch_size, self.from_batch = samples, batch_size, from_batch
        self._base_lrs, self._means = base_lrs, means
        self._write()

    def _check_groups(self, values: Sequence[float]) -> None:
        if len(values) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the schedule is for {len(values)} parameter groups, and the optimizer has"
                f" {len(self.optimizer.param_groups)}: make the schedule after the last group"
            )

    def _mean(self, start: float, size: float) -> list[float]:
        """Return the mean of the curve over samples from `start` on, for each group."""
        end = start + size
        if not end / self.from_batch - self._curve.index <= _MOST_STEPS:
            raise ValueError(
                f"a batch of {size} after {start} samples is more than {_MOST_STEPS} steps of the"
                f" scheduler, which are of from_batch = {self.from_batch} samples each"
            )
        while self._end_of_base_step() <= start:
            self._curve.advance()
        sums, covered = [0.0] * len(self.optimizer.param_groups), 0.0
        while True:
            stop = min(self._end_of_base_step(), end)
            # Exactly 1 for a step within a base step, whose lr then is left as it is to the bit.
            weight = (stop - start) / size
            sums = [x + weight * lr for x, lr in zip(sums, self._curve.lrs(), strict=True)]
            covered += weight
            if stop >= end:
                return sums
            start = stop
            try:
                self._curve.advance()
            except PastEnd:
                # A schedule may end within a step, or, as training does, right before one.
                return [x / covered for x in sums]

    def _end_of_base_step(self) -> float:
        return (self._curve.index + 1) * self.from_batch

    @torch.no_grad()
    def _write(self) -> None:
        self._last_lrs = []
        groups = self.optimizer.param_groups
        for group, mean, base in zip(groups, self._means, self._base_lrs, strict=True):
            # 1 to the bit, unless rescale_ has changed what the schedule started from.
            lr = mean * (float(group["initial_lr"]) / base if base else 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            self._last_lrs.append(lr)
