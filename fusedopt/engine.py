"""What takes an optimizer's steps: it keeps the plan, and makes another where that does not fit."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checkpoint import Present, check_present, initialise, is_initialising
from .formats import check_parameters, format_of, keeps_steps
from .formats.fitting import fit_states
from .memory.device import is_capturing
from .step.checks import check_gradients, check_memory, check_states, describe
from .step.device_group import DeviceGroup
from .step.norm import join_norm
from .step.options import check_numbers, complete, explained
from .step.plan import Plan
from .step.request import Request, gather, with_factors
from .step.span import Span, in_several_processes, span_of
from .step.states import create_states, remove_states
from .step.wrappers import check_in_backward, flat_group


class Engine:
    """The steps of one optimizer, which is handed to every call: it is not kept.

    Attributes:
        plan: of the latest step, or None.
        captured: plans that CUDA graphs go on reading, the current one aside.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.captured: list[Plan] = []
        self._present = Present()
        # The processes to clip with, and what they were found for.
        self._span: Span | None = None
        self._span_of: tuple[Any, ...] | None = None

    def step(
        self, optimizer: Any, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            optimizer: whose parameters.
            grad_scale: the loss scale, or None.
            found_inf: whether the scaler has found an overflow, or None.
        """
        try:
            self._step(optimizer, grad_scale, found_inf)
        except Exception as error:
            self._explain(optimizer, error)
            raise

    def _step(self, optimizer: Any, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        statistics = optimizer.statistics
        if not optimizer.state and is_initialising(optimizer):
            initialise(optimizer)
            return
        plan = self.plan
        known = None if plan is None else plan.known
        span = self.find_span(optimizer, anew=plan is None)
        request = gather(optimizer, grad_scale, found_inf, known, span)
        if request is None:
            if span is not None:
                self._join(optimizer, span, found_inf)
            return
        if plan is None or not plan.fits(request):
            with _without_collections():
                plan = self._make_plan(optimizer, request)
        plan.check_capture()
        try:
            plan.prepare(request, optimizer.step_norm)
            skipped = plan.is_skipped(request)
        except Exception:
            self._undo(optimizer, plan)
            raise
        if skipped:
            if plan.created:
                self._undo(optimizer, plan)
            if statistics is not None:
                statistics.used(request.params)
            return
        plan.hold(request)
        plan.launch(request)
        if statistics is not None:
            statistics.used(request.params)
        # Autograd then notices a parameter that changed between forward and backward.
        torch.autograd.graph.increment_version(request.params)

    def _join(self, optimizer: Any, span: Span, found_inf: Tensor | None) -> None:
        """Take part in the norm of the others' step."""
        device = _device(optimizer, span)
        name = backends.choose(device, optimizer.backend)[0]
        executor = backends.prepare(name, optimizer.rule, device, (), True)
        join_norm(optimizer.step_norm, span, device, found_inf, executor, optimizer.guard)

    def find_span(self, optimizer: Any, anew: bool = False) -> Span | None:
        """Return the processes to clip with; they are found anew where groups have changed."""
        clip = optimizer.step_norm
        if clip is None or not in_several_processes():
            return None
        groups = optimizer.param_groups
        found = (clip.group, optimizer.wrapper_group, [len(group["params"]) for group in groups])
        if anew or found != self._span_of:
            params = [p for group in groups for p in group["params"]]
            recognised = optimizer.wrapper_group or flat_group(params)
            self._span, self._span_of = span_of(params, clip.group, recognised), found
        return self._span

    def _undo(self, optimizer: Any, plan: Plan) -> None:
        """Leave nothing of a step that did not come about."""
        self._forget(optimizer, plan.created)
        self.drop()

    def _explain(self, optimizer: Any, error: Exception) -> None:
        """Raise what names the cause, where groups or step counts are one."""
        samples = 1 if self.plan is None else self.plan.samples
        better = explained(optimizer.whole, error, samples)
        if better is not None:
            raise better from error

    def _make_plan(self, optimizer: Any, request: Request) -> Plan:
        """Check everything, create missing states, and prepare the launches."""
        params, inputs, group_of = request.params, request.inputs, request.group_of
        if any(map(is_capturing, {p.device for p in params})):
            raise RuntimeError(
                "a CUDA graph is being captured, and this step is not prepared: run one step with"
                " the same parameters, hyper-parameters and layouts of gradients before the capture"
            )
        optimizer.whole.check_ready()
        for group in optimizer.param_groups:
            complete(optimizer, group)
        check_numbers(optimizer, optimizer.param_groups)
        for group in optimizer.param_groups:
            optimizer.check_group(group)
            check_parameters(group)
        check_in_backward(optimizer)
        local_params, local_inputs = request.local_params, request.local_inputs
        per_sample = request.per_sample
        check_gradients(optimizer, params, local_params, inputs, local_inputs, per_sample)
        fit_states(optimizer, params, group_of, describe)
        check_states(optimizer, params, group_of)
        check_present(optimizer, params, group_of, self._present)
        apart = check_memory(
            optimizer, params, local_params, inputs, local_inputs, group_of, per_sample
        )
        states, created = create_states(optimizer, params, local_params, group_of)
        if self.plan is not None:
            self.drop()
            # Nobody told of what has changed: it may be the meshes.
            request.span = self.find_span(optimizer, anew=True)
        try:
            self.plan = Plan(request, states, created, apart)
        except Exception:
            self._forget(optimizer, zip(params, created, strict=True))
            raise
        rule = optimizer.rule
        names_of = [format_of(rule, group).names for group in request.groups]
        counts = [keeps_steps(rule, group) for group in request.groups]
        names_of = [(*n, "step") if own else n for n, own in zip(names_of, counts, strict=True)]
        self._present.note(params, names_of, group_of)
        return self.plan

    def look_at_states(self, optimizer: Any) -> None:
        """Note which entries each state has: what is missing later was taken away."""
        self._present.look(optimizer)

    def known_of(self, p: Tensor) -> frozenset[str]:
        """Return the entries that the state of a parameter had when it was last looked at."""
        return self._present.names(p)

    def _forget(self, optimizer: Any, created: Iterable[tuple[Tensor, Sequence[str]]]) -> None:
        """Remove states that were created for a step which did not come about."""
        for p, names in created:
            if names:
                remove_states(optimizer, p, names)
            self._present.forget(p, names)

    def drop(self) -> None:
        """Let go of the plan; a captured one is kept aside."""
        if self.plan is not None and self.plan.captured:
            # A graph goes on reading this plan's tables for as long as it is replayed.
            self.captured.append(self.plan)
        self.plan = None

    def reset(self) -> None:
        """Forget what was known of the states: others are loaded."""
        self.drop()
        self._present = Present()

    def push(self, optimizer: Any) -> None:
        """Make hyper-parameters that are Python numbers current for captured CUDA graphs."""
        for plan in [*self.captured, *([] if self.plan is None else [self.plan])]:
            for group in plan.device_groups:
                if group.on_device:
                    self._push(optimizer, group, plan.samples)
            if optimizer.step_norm is not None:
                plan.device_groups[0].scale.set_max_norm(optimizer.step_norm.max_norm)

    def _push(self, optimizer: Any, group: DeviceGroup, samples: int) -> None:
        try:
            group.prepare(with_factors(optimizer.param_groups, optimizer.statistics, samples))
        except Exception as error:
            self._explain(optimizer, error)
            raise

    def release(self) -> None:
        """Free what captured CUDA graphs read."""
        self.captured.clear()
        if self.plan is not None:
            self.plan.release()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Leave out garbage collections, each of which looks at all that a plan is made of."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _device(optimizer: Any, span: Span) -> torch.device:
    """Return where a process without gradients takes part in a norm."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            return torch.device(p.device)
    on_host = "gloo" in torch.distributed.get_backend(span.group)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if on_host or accelerator is None else accelerator
