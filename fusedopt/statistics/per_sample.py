"""PerSampleSquares: the per-sample squared gradients of a model, made in its backward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from .. import backends
from ..codecs import compute_dtype
from .attention import attention
from .base import MissingSquares, Statistics
from .fallback import functional, trained_parameters, warning
from .instrument import (
    Observer,
    is_observed,
    observe_module,
    original_class,
    restore_module,
)
from .layers import KNOWN, Forward, Site, coupled_message
from .ownership import computes_weights, is_container, own_parameters, set_by_hooks
from .passes import Pass
from .records import Foreign, Record, follow, measure, settle_deviations
from .unknown import check_arguments, check_context

SAMPLES = ("sequence", "token")


class PerSampleSquares(Statistics):
    """The mean over samples of squared gradients, for every parameter of a model.

    From construction on, backward also makes, for each parameter, the sum over samples of the
    square of the sample's gradient: inside the weight-gradient kernel where there is a GPU, with
    one more accumulator, and with no tensor of batch x parameter elements anywhere::

        statistics = fusedopt.PerSampleSquares(model)
        optimizer = fusedopt.BatchDecoupledAdam(
            model.parameters(), lr=3e-4, statistics=statistics, virtual_batch_size=32
        )
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    A sample is one element of the batch dimension of the first tensor that the model is called
    with; every layer's input must keep that dimension. Sample i's gradient is N times its part of
    ``p.grad`` where the loss is a mean, so that padding, ignored tokens and any weights within the
    loss are as they are in ``p.grad``. Several backward passes before a step add up, as gradients
    do. One factor on all gradients between backward and step, as ``clip_grad_norm_`` multiplies in,
    is followed; to see it, backward ends with two more reads of the gradients.

    Linear, Embedding, Conv1d, Conv2d, LayerNorm, RMSNorm, GroupNorm, BatchNorm in evaluation mode
    and MultiheadAttention are known; shared weights, tied embeddings and modules used several times
    are exact. The parameters of any other module go through ``torch.func``, with a warning.

    An observed module is of a subclass of its class, under the same name: ``isinstance`` holds,
    ``type(module) is nn.Linear`` does not. Initialise, wrap and group by type before.

    Args:
        model: the module that is called in training.
        loss_reduction: ``"mean"`` where the loss is a mean over samples (or over their tokens),
            ``"sum"`` where it is a sum.
        sample: ``"sequence"``, or ``"token"`` to take every position for a sample of its own,
            which is cheaper for short sequences and another statistic.
        batch_first: whether the batch is the first dimension of sequences, or the second.
        backend: as for the optimizers.

    Raises:
        RuntimeError: for a module whose samples are coupled (BatchNorm in training mode), a model
            that is observed already, or sharded parameters.
        ValueError: for an unknown option.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_reduction: str = "mean",
        sample: str = "sequence",
        *,
        batch_first: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(loss_reduction)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if sample not in SAMPLES:
            raise ValueError(f"sample must be one of {', '.join(SAMPLES)}, got {sample!r}")
        backends.check_name(backend)
        self.model = model
        self.sample = sample
        self.batch_first = batch_first
        self.backend = backend
        # Samples of all backward passes there have been.
        self._total = 0
        self._called = False
        # What has arrived, by backward pass: one that failed never comes to its end, and one within
        # another (reentrant checkpoints) has an end of its own.
        self._arrived: dict[int, list[Record]] = {}
        self._lock = threading.RLock()
        self._active: Pass | None = None
        self._thread = 0
        # Those with observed layers whose graphs are alive.
        self._calls: weakref.WeakSet[Pass] = weakref.WeakSet()
        # The latest, for as long as its graph is.
        self._last: weakref.ref[Pass] | None = None
        self._offsets: Tensor | None = None
        self._paused = 0
        self._ranks = 1
        self._removed = False
        self._backends: dict[torch.device, str] = {}
        self._modules = list(_observable(model))
        self._computed = {id(module): computes_weights(module) for _, module in self._modules}
        self._check_model()
        self._records = {
            id(p): Record(p, name, self._commit) for name, p in model.named_parameters()
        }
        self._observe()

    def _check_model(self) -> None:
        for name, module in self.model.named_modules():
            if is_observed(module):
                raise RuntimeError(
                    f"{name or 'the model'} is observed by another PerSampleSquares: call its"
                    " remove() first"
                )
            if _is_coupled(module) and module.training:
                raise RuntimeError(coupled_message(name, module))
            if "forward" in module.__dict__ and trained_parameters(module):
                raise RuntimeError(
                    f"{name or 'the model'} ({type(module).__name__}) has a forward of its own,"
                    " which was put on the module and not on its class, so that its calls are not"
                    " seen: make PerSampleSquares before the module is wrapped"
                )
            problem = _unsupported(module)
            if problem:
                raise RuntimeError(f"{name} ({type(module).__name__}): {problem}")
        for name, p in self.model.named_parameters():
            if p.is_complex():
                raise RuntimeError(
                    f"parameter {name!r} is complex: its per-sample squares are not known. Use"
                    " MicroBatchSquares or GradSampleSquares, which take it for pairs of reals"
                )
            if hasattr(p, "placements"):
                raise RuntimeError(
                    f"parameter {name!r} is sharded (a DTensor), and its gradient is never whole"
                    " where squares could be made: use MicroBatchSquares, which squares the"
                    " gradients of micro-batches as they are"
                )

    def _observe(self) -> None:
        for name, module in self._modules:
            own = own_parameters(module).values()
            if _forward_of(module) is functional and any(p.requires_grad for p in own):
                warn(warning(name or "the model", module), UserWarning, stacklevel=4)
            call = self._call if module is self.model else None
            observe_module(module, Observer(_Forward(self, name, module), call))
        if not is_observed(self.model):
            observe_module(self.model, Observer(call=self._call))

    def remove(self) -> None:
        """Stop observing: the model is as it was."""
        for module in (self.model, *(module for _, module in self._modules)):
            restore_module(module)
        for record in self._records.values():
            record.remove()
        self._removed = True
        self._release()

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a model, an optimizer or a module of theirs come without statistics."""

    # The model's calls.

    def _call(self, plain: Any, arguments: Any, keywords: Any) -> Any:
        """Run the model; this is one batch of samples."""
        if self._active is not None and self._thread != _thread():
            raise RuntimeError(
                "the model that PerSampleSquares observes was called while a call of another thread"
                " was under way: call it by one thread at a time, or observe a copy for each"
            )
        if self._active is not None or self._paused or not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        check_context("the model")
        check_arguments("the model", (arguments, keywords))
        self._release()
        self._called = True
        self._active = Pass(self, (arguments, keywords), self._offsets)
        self._thread = _thread()
        try:
            return plain(*arguments, **keywords)
        finally:
            call, self._active = self._active, None
            call.release()
            self._last = weakref.ref(call)

    def _release(self) -> None:
        # Activation checkpoints may have called layers again since.
        for call in self._calls:
            call.release()

    @contextmanager
    def segments(self, cu_seqlens: Tensor) -> Iterator[None]:
        """Take the model's inputs within this context for packed samples.

        Args:
            cu_seqlens: integers ``[samples + 1]`` on the model's device, rising from 0 to the
                number of tokens: sample i is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of
                inputs ``[tokens, ...]`` or ``[1, tokens, ...]``.

        Raises:
            ValueError: for a tensor of another kind.
        """
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be a vector of at least two integers, got"
                f" {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
            )
        if cu_seqlens.device.type == "cpu" and (
            cu_seqlens[0] != 0 or bool((cu_seqlens.diff() < 0).any())
        ):
            # On a GPU this would wait for the device.
            raise ValueError(f"cu_seqlens must rise from 0, got {cu_seqlens.tolist()}")
        if self.sample == "token":
            raise ValueError("with sample='token' every token is a sample: there are no segments")
        # Read again in backward, when the vector may be the next batch's.
        before, self._offsets = self._offsets, cu_seqlens.clone()
        try:
            yield
        finally:
            self._offsets = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Call modules without observing them.

        Where the model has activation checkpoints, which call parts of it again in backward, run
        the backward pass of such a call within this, too, and that of others outside of it.
        """
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def is_replaying(self) -> bool:
        """Whether an activation checkpoint runs a part of the model again, of whatever call."""
        return self._active is None

    def is_unplaced(self) -> bool:
        """Whether a part of the model is run again, and there is more than one call to be it of."""
        if not self.is_replaying():
            return False
        backward = torch._C._current_graph_task_id()
        own = self._replayed(backward)
        others = (c for c in self._calls if c is not own)
        return any(c.base is None or backward in c.backwards for c in others)

    def _replayed(self, backward: int) -> Pass | None:
        """Return the call that an activation checkpoint runs a part of again."""
        met = [c for c in self._calls if backward in c.backwards]
        if len(met) == 1:
            return met[0]
        return None if self._last is None else self._last()

    def see(self, call: Pass) -> None:
        """Note a call that a backward pass may reach."""
        self._calls.add(call)

    def current(self, name: str) -> Pass:
        """Return the call of the model that a layer's call belongs to."""
        if self._active is not None:
            return self._active
        backward = torch._C._current_graph_task_id()
        call = None if backward == -1 else self._replayed(backward)
        if call is not None:
            return call
        raise RuntimeError(
            f"{name} was called outside of the model that PerSampleSquares observes, so that its"
            " samples are not known: call model(x), not model.forward(x) or a part of it, make"
            " PerSampleSquares with the module that you call, or call it under torch.no_grad()"
        )

    def is_watching(self) -> bool:
        """Whether calls now are to be seen."""
        return not self._paused and torch.is_grad_enabled()

    def backend_of(self, tensor: Tensor) -> str:
        """Choose where squares of layers on a device are made."""
        device = tensor.device
        if device not in self._backends:
            self._backends[device] = backends.choose(device, self.backend)[0]
        return self._backends[device]

    def record_of(self, parameter: Tensor) -> Record:
        """Return where a parameter's squares are gathered."""
        record = self._records.get(id(parameter))
        if record is None:
            raise RuntimeError(self._unknown(parameter))
        return record

    def _unknown(self, parameter: Tensor) -> str:
        """Say why a layer has been called with a parameter that is not known."""
        for name, module in self._modules:
            if computes_weights(module) and not self._computed[id(module)]:
                return (
                    f"the weights of {name or 'the model'} are computed since PerSampleSquares was"
                    " made (by a parametrization, weight_norm, pruning): call remove() and make it"
                    " anew"
                )
        for name, candidate in self.model.named_parameters():
            # torch.func.functional_call puts other tensors in their place, for one call.
            if candidate is parameter and isinstance(parameter, nn.Parameter):
                return (
                    f"parameter {name!r} was added to the model, or put in the place of another,"
                    " after PerSampleSquares was made: call remove(), make it anew, and give the"
                    " optimizer the new parameter, too"
                )
        return (
            f"a layer of the observed model was called with a parameter of shape"
            f" {tuple(parameter.shape)} that the model does not have, as by"
            " torch.func.functional_call: its samples belong to no parameter. Call it within"
            " statistics.paused(), or with the model's own parameters"
        )

    def _commit(self, record: Record, calls: list[Pass]) -> None:
        """Count the samples of calls whose first gradients arrive, and see what was cleared."""
        # Backward runs on a thread for each device.
        with self._lock:
            for call in calls:
                if call.base is None:
                    call.base = self._total
                    self._total += call.samples.count
                    self._restart(record, call.base)
            base = calls[0].base
            if record.restarts and base is not None:
                record.reset(base)
            backward = torch._C._current_graph_task_id()
            if backward not in self._arrived:
                self._arrived[backward] = []
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(partial(self._measure, backward))  # type: ignore[attr-defined]
            self._arrived[backward].append(record)

    def _measure(self, backward: int) -> None:
        """Run at the end of a backward pass: see ``factors``."""
        with self._lock:
            arrived = self._arrived.pop(backward)
        measure(arrived)

    def _restart(self, arriving: Record, start: int) -> None:
        """Forget what belongs to gradients that were set to None or zero."""
        others = [r for r in self._records.values() if r is not arriving]
        cleared = [r for r in others if r.is_cleared()]
        if any(r.reduced_count and r not in cleared for r in others):
            raise RuntimeError("backward after all_reduce(): call optimizer.step() and zero_grad()")
        if cleared or arriving.restarts:
            # What has nothing yet belongs to the batch that now begins.
            for r in (*cleared, *(r for r in others if r.squares is None)):
                r.reset(start)

    # What an optimizer asks for.

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples were gathered for a parameter."""
        record = self._settled(parameter)
        if record is None or record.squares is None:
            return 0
        return record.reduced_count or self._total - record.start

    def weight(self, count: int) -> float:
        """Return the weight s that makes rows gradients of samples."""
        return super().weight(count) if self.loss_reduction == "mean" else float(self._ranks)

    def name_of(self, parameter: Tensor) -> str:
        """Name a parameter in messages."""
        record = self._records.get(id(parameter))
        return super().name_of(parameter) if record is None else f"parameter {record.name!r}"

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return S of a parameter, or None where nothing was gathered for it."""
        record = self._settled(parameter)
        return None if record is None else record.squares

    def _settled(self, parameter: Tensor) -> Record | None:
        """Return a parameter's record; a gradient that has just arrived is counted."""
        record = self._records.get(id(parameter))
        if record is not None:
            record.settle()
        return record

    def parameters(self) -> Sequence[Tensor]:
        """List the parameters that something was gathered for."""
        return [r.parameter for r in self._records.values() if r.squares is not None]

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where the samples of these parameters cannot be used."""
        self._check_ranks()
        records = [self._settled(p) for p in parameters]
        # One factor on all gradients of the step; of some alone is more likely to be a mistake.
        known = _known(records)
        settle_deviations(known)
        if known and all(r.is_changed() for r in known):
            follow(known)
        for p, record in zip(parameters, records, strict=True):
            problem = self._problem(p, record)
            if problem is not None:
                raise MissingSquares(p, problem)

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Follow one factor on all gradients, whether or not autograd knows of it."""
        # GradScaler.unscale_ divides behind the version counters.
        return follow(_known(self._settled(p) for p in parameters))

    def _problem(self, parameter: Tensor, record: Record | None) -> str | None:
        if record is None:
            if any(candidate is parameter for candidate in self.model.parameters()):
                return self._unknown(parameter)
            return (
                "it is not part of the model that PerSampleSquares observes: give it an optimizer"
                " of its own"
            )
        if record.squares is None or self._removed:
            return f"{record.name!r} has a gradient but no per-sample squares: {self._why(record)}"
        if record.foreign is not None:
            return f"{record.name!r} {_FOREIGN[record.foreign]}"
        if record.altered or record.is_changed():
            return (
                f"the gradient of {record.name!r} was changed between backward and step(), and not"
                " by one factor other than zero, in place and with all others, which squares would"
                " have followed. To clip, pass"
                " clip=fusedopt.GlobalNorm(max_norm) to the optimizer; if all gradients were"
                " multiplied by a factor, tell it by statistics.rescale(factor); if processes have"
                " averaged them, call statistics.all_reduce()"
            )
        return None

    def _why(self, record: Record) -> str:
        """Say why a gradient came without squares, and what to do."""
        again = "Call zero_grad(), then run forward and backward again"
        if self._removed:
            return (
                "remove() was called, and nothing observes the model any more: make"
                " PerSampleSquares anew, and set optimizer.statistics to it"
            )
        if not self._called:
            return (
                "the model has not been called since PerSampleSquares was made, so that the"
                f" gradient is older, or of a call within paused(). {again}"
            )
        if not record.gated:
            return (
                "no observed layer has used it, so that a function, or a module other than the one"
                " that owns it, reads it directly. Call the module that owns it, or move it into a"
                " module of its own and call that"
            )
        return (
            "the gradient is not of a call that was observed: that was within paused(), or before"
            f" zero_grad(). {again}"
        )

    def _check_ranks(self) -> None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        reduced = all(r.reduced_count for r in self._records.values() if r.squares is not None)
        if distributed.get_world_size() > 1 and not reduced:
            raise RuntimeError(
                "there are several processes, and each has seen its own samples alone: call"
                " statistics.all_reduce() between backward and step()"
            )

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        for p in parameters:
            self._records[id(p)].stepped()

    @torch.no_grad()
    def rescale(self, factor: float | Tensor) -> None:
        """Follow a change of all gradients, made by hand between backward and ``step()``.

        Call it after the change: one that comes later is followed by itself where it can be.

        Args:
            factor: what every gradient was multiplied by; 1 for a change that squares are not to
                follow.
        """
        records = list(self._records.values())
        for record in records:
            record.accept()
            record.altered = False
            if record.squares is not None:
                record.squares.mul_(factor**2)
        measure(records)

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        if parameters is None:
            records = list(self._records.values())
        else:
            records = [self._records[id(p)] for p in parameters if id(p) in self._records]
        for record in records:
            record.settle()
            record.reset(self._total)

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Forget what was gathered for parameters whose gradients are None or zero now."""
        self.reset(parameters)
        for p in parameters:
            if id(p) in self._records:
                self._records[id(p)].cleared()

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Add up the samples of all processes, between backward and ``step()``.

        For gradients that are averaged over processes, as ``DistributedDataParallel`` does: a
        sample's contribution then is its local one over the number of processes. Costs an
        all-reduce of 4 bytes a parameter, tensor by tensor. A second call before the gradients are
        cleared changes nothing.

        Args:
            group: the process group; the default one.
        """
        distributed = torch.distributed
        ranks = self._ranks = distributed.get_world_size(group)
        # The same parameters in the same order everywhere, whichever of them were used here.
        records = [r for r in self._records.values() if r.parameter.requires_grad]
        # Done already, or nothing is trained.
        if all(r.reduced_count for r in records):
            return
        counts = torch.tensor([self._total - r.start for r in records], dtype=torch.int64)
        counts = counts.to(records[0].parameter.device)
        distributed.all_reduce(counts, group=group)
        for record, count in zip(records, counts.tolist(), strict=True):
            if record.squares is None:
                dtype = compute_dtype([record.parameter.dtype])
                record.squares = torch.zeros_like(record.parameter, dtype=dtype)
            distributed.all_reduce(record.squares, group=group)
            record.squares.div_(ranks**2)
            record.reduced_count = count
            # The processes' gradients have been averaged in place.
            record.accept()
        measure(records)


_FOREIGN = {
    Foreign.OUTSIDE: (
        "is used outside of its module as well (by a function, or a penalty in the loss), or a hook"
        " on it changes its gradient, for which there are no per-sample squares. Call the module"
        " for every use, put penalties into the optimizer (weight_decay), and mask the layer's"
        " output"
    ),
    Foreign.UNOBSERVED: (
        "got a gradient from a backward pass in which no observed layer used it (of a call within"
        " paused(), of a penalty or another function of it alone), for which there are no"
        " per-sample squares. Call the module for every use, and put penalties into the optimizer"
        " (weight_decay)"
    ),
    Foreign.BEFORE: (
        "had a gradient already when the first that was observed was added to it (written by hand,"
        " or of a call within paused()), for which there are no per-sample squares. Call"
        " zero_grad() before"
    ),
}


def _thread() -> int:
    # Graphs that are traced are called by one thread.
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()


def _known(records: Iterable[Record | None]) -> list[Record]:
    return [r for r in records if r is not None and r.squares is not None]


class _Forward:
    """What an observed module runs: its layer's own way if it is to be seen, or plain."""

    def __init__(self, statistics: PerSampleSquares, name: str, module: nn.Module) -> None:
        self.statistics = statistics
        self.name = name or "the model"
        self.forward = _forward_of(module)
        self.own = list(own_parameters(module).values())
        # Whether or not it has parameters to train: attention those of its output, a coupled layer
        # to say that it is one.
        self.always = _is_coupled(module) or self.forward is attention

    def __call__(self, module: nn.Module, plain: Any, arguments: Any, keywords: Any) -> Any:
        statistics = self.statistics
        trained = self.always or any(p.requires_grad for p in self.own)
        if not (trained and statistics.is_watching()):
            return plain(*arguments, **keywords)
        check_context(self.name)
        site = Site(statistics, statistics.current(self.name), self.name)
        if self.forward is functional:
            return functional(site, module, plain, arguments, keywords)
        if self.forward is attention:
            return attention(site, module, *arguments, **keywords)  # type: ignore[arg-type]
        # The input is the one argument, whatever the layer calls it.
        return self.forward(site, module, *arguments, *keywords.values())


def _is_coupled(module: nn.Module) -> bool:
    """Whether a module may mix the samples of a batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _forward_of(module: nn.Module) -> Forward:
    """Return what is run for a module: the known layer with its forward, or the fallback."""
    own: Any = original_class(module).forward
    if computes_weights(module):
        return functional
    if own is nn.MultiheadAttention.forward:
        return attention
    return KNOWN.get(own, functional)


def _observable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that has parameters of its own or mixes samples, with its name."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inner or (is_container(module) and module is not model):
            continue
        if nn.utils.parametrize.is_parametrized(module):
            inner |= {id(child) for child in module.parametrizations.modules()}  # type: ignore[union-attr]
        if (
            own_parameters(module)
            or _is_coupled(module)
            or isinstance(module, nn.MultiheadAttention)
        ):
            yield name, module


def _unsupported(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        names = list(set_by_hooks(module.out_proj))
        if names:
            return (
                f"out_proj.{names[0]} is set by a hook (pruning, weight_norm), which attention,"
                " reading it by itself, never runs: it would not be trained. Use a parametrization"
                " (torch.nn.utils.parametrizations), or make it permanent (prune.remove)"
            )
    if isinstance(module, nn.Embedding):
        for option in ("sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"{option}=True is not supported: set it to False, or use MicroBatchSquares"
        if module.max_norm is not None:
            return "max_norm is not supported: it rewrites the weight in the forward pass"
    return None
