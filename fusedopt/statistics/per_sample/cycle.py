"""Which steps squares are made at, and what is known of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from ...memory.dtypes import compute_dtype
from ...tracing import untraced
from ..grad_version import weakly
from .records import Records
from .sample_count import SampleCount

# The entry of a parameter's state that has the mean of squares of an earlier step.
KEPT = "mean_square"


class Cycle:
    """The steps of a model whose squares are made at every n-th of them alone.

    What says at which is each parameter's own count of steps, which is saved with its state, the
    same in all processes, and stays where a step is skipped; a parameter without squares of an
    earlier step needs them at any. These are kept in its state, as means over the samples and in
    the unit of the squared gradient that the update reads: clipped, and without a loss scale.

    Args:
        every: n.
        records: of the model.
        optimizers: lists those that are fed.

    Attributes:
        measures: whether squares of all parameters are made in the latest call of the model.
    """

    def __init__(
        self, every: int, records: Records, optimizers: Callable[[], Iterable[Any]]
    ) -> None:
        self.every = every
        self.measures = True
        self._records = records
        self._optimizers = optimizers
        self._asked = False
        # By parameter, what the step under way is to keep.
        self._latest: dict[int, Tensor] = {}
        # What the check of a step has found, for what it reads.
        self._checked: tuple[Sequence[Tensor], list[bool]] | None = None

    def ask(self) -> None:
        """Make all squares until a step is taken, whatever its number."""
        self._asked = True

    def stepped(self) -> None:
        """Note that a step was taken."""
        self._asked = False

    @untraced
    def begin(self) -> None:
        """Decide, at a call of the model, whose squares it is to make."""
        self._records.begin()
        trained = [r for r in self._records if r.parameter.requires_grad]
        states = self._states()
        due = self._due([r.parameter for r in trained], states)
        if in_several_processes() and not all(due):
            # All or none, or processes would disagree on what is to be added up. What has never had
            # a gradient need not get one now.
            known = [bool(states.get(id(r.parameter))) for r in trained]
            due = [any(d and k for d, k in zip(due, known, strict=True))] * len(trained)
        if self._asked:
            due = [True] * len(trained)
        self.measures = all(due)
        for record, own in zip(trained, due, strict=True):
            if record.due != own:
                record.due = own
                if not own:
                    record.remove()
            if own:
                record.watch()

    @untraced
    def takes(self, parameters: Iterable[Tensor]) -> bool:
        """Whether squares of any of a layer's parameters are made in the latest call."""
        found = map(self._records.find, parameters)
        return any(r is None or (r.due and r.parameter.requires_grad) for r in found)

    @untraced
    def follow(self, call: SampleCount, result: Any) -> None:
        """Count the samples of a call, not all of whose gradients are looked at, in backward."""
        if call.count is None:
            raise RuntimeError(
                f"PerSampleSquares(every={self.every}) counts the samples of a call by the batch"
                " dimension of its first tensor, and the model was called without one"
            )
        outputs = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
        reached = _Reached(self._records, call)
        for y in outputs:
            if y.requires_grad:
                y.register_hook(reached)
        if not outputs:
            # They are in something that torch cannot look into.
            reached(None)

    def found(self, parameters: Sequence[Tensor]) -> list[bool]:
        """Return what ``reads`` has returned for a step, which is under way."""
        checked, self._checked = self._checked, None
        if checked is not None and checked[0] is parameters:
            return checked[1]
        return self.reads(parameters)

    def reads(self, parameters: Sequence[Tensor]) -> list[bool]:
        """Say, of each parameter, whether its next step is to read squares of this batch."""
        records = map(self._records.find, parameters)
        due = self._due(parameters, self._states())
        # There may be some though none were due.
        flags = [
            d or (r is not None and r.squares is not None)
            for r, d in zip(records, due, strict=True)
        ]
        self._checked = parameters, flags
        return flags

    def means(
        self, parameters: Sequence[Tensor], squares: Sequence[Tensor | None], count: int
    ) -> list[Tensor]:
        """Return means of squares, of this batch where there are any, or kept.

        Args:
            parameters: to be updated.
            squares: for each, the sum over samples of those of contributions to its gradient; None
                for what was kept, which is in the unit of the update already.
            count: the number of samples.
        """
        states = self._states()
        self._latest = {}
        found = []
        for p, own in zip(parameters, squares, strict=True):
            if own is None:
                # Loading a state casts it to the parameter's type.
                found.append(states[id(p)][KEPT].to(compute_dtype([p.dtype])))
                continue
            # Not into what was kept: the step may yet be skipped.
            self._latest[id(p)] = own * count
            found.append(self._latest[id(p)])
        return found

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Keep what was measured at the step that is about to be taken."""
        states = self._states()
        for p in parameters:
            if id(p) in self._latest:
                states[id(p)][KEPT] = self._latest[id(p)]
        self._latest = {}

    def _due(self, parameters: Sequence[Tensor], states: dict[int, Any]) -> list[bool]:
        own = [
            _is_due(p, states[id(p)], self.every) if id(p) in states else None for p in parameters
        ]
        # What no optimizer has that is fed goes with the others.
        rest = not states or True in own
        return [rest if due is None else due for due in own]

    def _states(self) -> dict[int, Any]:
        """Return the states of the parameters of all optimizers."""
        return {
            id(p): optimizer.state.get(p, {})
            for optimizer in self._optimizers()
            for group in optimizer.param_groups
            for p in group["params"]
        }


def _is_due(parameter: Tensor, state: dict[str, Any], every: int) -> bool:
    """Whether the next step of a parameter needs squares of its batch."""
    kept = state.get(KEPT)
    if not isinstance(kept, Tensor) or kept.shape != parameter.shape:
        return True
    # Counts need not be whole.
    return kept.device != parameter.device or float(state.get("step", 0.0)) % every < 1


class _Reached:
    """A hook for what a model returned, which counts the samples of the call."""

    def __init__(self, records: Records, call: SampleCount) -> None:
        self._reach = weakly(records.reach)
        self._call = call

    def __call__(self, _: Tensor | None) -> None:
        self._reach(self._call)


def in_several_processes() -> bool:
    """Whether other processes see samples of the same batch."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1
