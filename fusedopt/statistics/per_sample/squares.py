"""PerSampleSquares: the per-sample squared gradients of a model, made in its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from ... import backends
from ...memory.storage import local_tensors
from ...source import RuleInputs
from ...tracing import untraced
from ..base import MissingSquares, NoiseScale, Statistics
from . import causes
from .cycle import Cycle, in_several_processes
from .fallback import functional, warning
from .instrument import Observer, is_observed, observe_module, restore_module
from .model_calls import ModelCalls
from .observed import LayerForward, check_model, observable
from .ownership import computes_weights, own_parameters
from .record import Record
from .records import Records

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

    Over several processes, under ``DistributedDataParallel`` and ``fully_shard``, squares and
    samples are those of the whole batch, as gradients are, and squares are sharded as parameters
    are. Every process then has to ask whatever one asks.

    With ``every=k`` squares are made for one step in k, the first of each parameter among them: the
    others run torch's own backward pass, and take the mean of the last ones beside the square of
    their own gradient. It is kept in the optimizer's state, as ``mean_square``.

    An observed module is of a subclass of its class, under the same name: ``isinstance`` holds,
    ``type(module) is nn.Linear`` does not. Initialise, wrap and group by type before.

    Args:
        model: the module that is called in training.
        loss_reduction: ``"mean"`` where the loss is a mean over samples (or over their tokens),
            ``"sum"`` where it is a sum.
        sample: ``"sequence"``, or ``"token"`` to take every position for a sample of its own,
            which is cheaper for short sequences and another statistic.
        batch_first: whether the batch is the first dimension of sequences, or the second.
        every: how many steps there are from one with squares to the next.
        backend: as for the optimizers.

    Raises:
        RuntimeError: for a module whose samples are coupled (BatchNorm in training mode), a model
            that is observed already, or parameters that are sharded other than by ``fully_shard``.
        ValueError: for an unknown option.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_reduction: str = "mean",
        sample: str = "sequence",
        *,
        batch_first: bool = True,
        every: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(loss_reduction)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if sample not in SAMPLES:
            raise ValueError(f"sample must be one of {', '.join(SAMPLES)}, got {sample!r}")
        _check_every(every, sample)
        backends.check_name(backend)
        self.every = every
        self.model = model
        self._sample = sample
        self._batch_first = batch_first
        self.backend = backend
        self._removed = False
        self._backends: dict[torch.device, str] = {}
        self._modules = [
            (name, module, computes_weights(module)) for name, module in observable(model)
        ]
        check_model(model)
        self._records = Records(model, self._unknown)
        self._cycle: Cycle | None = None
        if every > 1:
            self._cycle = Cycle(every, self._records, self._fed)
        self._calls = ModelCalls(
            sample,
            batch_first,
            self._records.of,
            self._backend_of,
            self._records.called,
            self._cycle,
        )
        self._observe()

    @property
    def sample(self) -> str:
        """What one sample is, as given."""
        return self._sample

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first dimension of sequences, as given."""
        return self._batch_first

    @property
    def measured(self) -> bool:
        """Whether squares of all parameters are those of the latest call of the model."""
        return self._cycle is None or self._cycle.measures

    def measure(self) -> None:
        """Make squares of all parameters in the calls up to the next step, whatever ``every``."""
        if self._cycle is not None:
            self._cycle.ask()

    def _observe(self) -> None:
        for name, module, _ in self._modules:
            own = own_parameters(module).values()
            forward = LayerForward(self._calls, name, module)
            if forward.runs is functional and any(p.requires_grad for p in own):
                warn(warning(name or "the model", module), UserWarning, stacklevel=4)
            call = self._calls.run if module is self.model else None
            observe_module(module, Observer(forward, call))
        if not is_observed(self.model):
            observe_module(self.model, Observer(call=self._calls.run))

    def remove(self) -> None:
        """Stop observing: the model is as it was."""
        for module in (self.model, *(module for _, module, _ in self._modules)):
            restore_module(module)
        self._records.remove()
        self._removed = True
        self._calls.release()

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a model, an optimizer or a module of theirs come without statistics."""

    def segments(self, cu_seqlens: Tensor) -> AbstractContextManager[None]:
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
        return self._calls.packed(cu_seqlens)

    def paused(self) -> AbstractContextManager[None]:
        """Call modules without observing them.

        Where the model has activation checkpoints, which call parts of it again in backward, run
        the backward pass of such a call within this, too, and that of others outside of it.
        """
        return self._calls.paused()

    def _backend_of(self, tensor: Tensor) -> str:
        """Choose where squares of layers on a device are made."""
        device = tensor.device
        if device not in self._backends:
            self._backends[device] = backends.choose(device, self.backend)[0]
        return self._backends[device]

    def _unknown(self, parameter: Tensor) -> str:
        return causes.unknown(self.model, self._modules, parameter)

    # What an optimizer asks for.

    @property
    def samples(self) -> int:
        """Number of samples gathered since the last ``zero_grad``."""
        if self.measured:
            return super().samples
        trained = [r.parameter for r in self._records if r.parameter.grad is not None]
        return self.count(trained) if trained else 0

    def count_of(self, parameter: Tensor) -> int:
        """Return how many samples were gathered for a parameter."""
        return self._records.count_of(parameter)

    def count(self, parameters: Sequence[Tensor]) -> int:
        """Return how many samples were gathered for each of some parameters."""
        if not self.measured and in_several_processes():
            return self._records.count_everywhere(parameters)
        return super().count(parameters)

    def factors(self, virtual_batch_size: float, count: int) -> dict[str, float]:
        """Return what turns gradients and squares into the moments of this step."""
        own = super().factors(virtual_batch_size, count)
        # What is held are means, and not sums.
        if self._cycle is None:
            return own
        return {**own, "square_weight": own["square_weight"] / count}

    def inputs(self, parameters: list[Tensor], gradients: list[Tensor], plain: bool) -> RuleInputs:
        """Return what a rule takes: gradients, and sums or held means of squares."""
        cycle = self._cycle
        if cycle is None:
            return super().inputs(parameters, gradients, plain)
        reads = cycle.found(parameters)
        pairs = zip(parameters, reads, strict=True)
        sums = [self._squares(p) if fresh else None for p, fresh in pairs]
        squares = cycle.means(parameters, sums, self.count(parameters))
        measured = [k for k, fresh in enumerate(reads) if fresh]
        return RuleInputs([gradients, squares], measured=measured)

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Keep what was measured at this step for those that follow."""
        if self._cycle is not None:
            self._cycle.keep(parameters)

    def weight(self, count: int) -> float:
        """Return the weight s that makes rows gradients of samples."""
        return super().weight(count) if self.loss_reduction == "mean" else self._records.divisor()

    def name_of(self, parameter: Tensor) -> str:
        """Name a parameter in messages."""
        record = self._records.find(parameter)
        return super().name_of(parameter) if record is None else f"parameter {record.name!r}"

    def sum_of_squares(self, parameter: Tensor) -> Tensor | None:
        """Return S of a parameter, or None where nothing was gathered for it."""
        record = self._records.find(parameter)
        return None if record is None else record.squares

    def parameters(self) -> Sequence[Tensor]:
        """List the parameters that something was gathered for."""
        return [r.parameter for r in self._records.gathered() if r.has_arrived]

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise where the samples of these parameters cannot be used."""
        self._records.check_ranks()
        parameters = self._read(parameters)
        self._records.follow_changes(parameters)
        for p in parameters:
            problem = self._problem(p, self._records.find(p))
            if problem is not None:
                raise MissingSquares(p, problem)

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Follow one factor on all gradients, whether or not autograd knows of it."""
        # GradScaler.unscale_ divides behind the version counters.
        parameters = self._read(parameters)
        return not parameters or self._records.follow(parameters)

    def _read(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """List those whose squares the next step reads."""
        if self._cycle is None or self._removed:
            return parameters
        if self.loss_reduction == "sum" and in_several_processes():
            raise RuntimeError(causes.SUM_EVERYWHERE)
        pairs = zip(parameters, self._cycle.reads(parameters), strict=True)
        return [p for p, fresh in pairs if fresh]

    def _problem(self, parameter: Tensor, record: Record | None) -> str | None:
        if record is None:
            part = any(candidate is parameter for candidate in self.model.parameters())
            return self._unknown(parameter) if part else causes.NOT_PART
        if record.squares is None or self._removed:
            why = causes.missing(record, self._removed, self._calls.seen)
            if not (record.due or self._removed):
                why = causes.left_out(self.every)
            return f"{record.name!r} has a gradient but no per-sample squares: {why}"
        if record.foreign is not None:
            return f"{record.name!r} {causes.FOREIGN[record.foreign]}"
        if not (record.altered or record.is_changed()):
            return None
        gradient = parameter.grad
        finite = gradient is None or bool(local_tensors([gradient])[0].isfinite().all())
        return causes.changed(record.name) if finite else causes.not_finite(record.name)

    def used(self, parameters: Sequence[Tensor]) -> None:
        """Note that a step has used what was gathered for some parameters."""
        self._records.used(parameters)
        if self._cycle is not None:
            self._cycle.stepped()

    @untraced
    def mean_square(self, parameter: Tensor) -> Tensor:
        """Return the mean over samples of the squared gradient of a parameter."""
        self._check_measured("mean_square() and signal_to_noise()")
        return super().mean_square(parameter)

    @untraced
    def noise_scale(self, decay: float | None = None) -> NoiseScale:
        """Return the gradient noise scale, from the same buffers that the optimizer reads."""
        self._check_measured("noise_scale()")
        return super().noise_scale(decay)

    def _check_measured(self, what: str) -> None:
        if not self.measured:
            raise RuntimeError(
                f"{what}: the latest call of the model made no squares of all parameters, as"
                f" every={self.every} has it. Ask where statistics.measured, or call"
                " statistics.measure() before the model"
            )

    @untraced
    @torch.no_grad()
    def rescale(self, factor: float | Tensor) -> None:
        """Follow a change of all gradients, made by hand between backward and ``step()``.

        Call it after the change: one that comes later is followed by itself where it can be.

        Args:
            factor: what every gradient was multiplied by; 1 for a change that squares are not to
                follow.
        """
        self._records.rescale(factor)

    def reset(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Forget what was gathered; ``optimizer.zero_grad()`` calls this."""
        self._records.reset(parameters)

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Forget what was gathered for parameters whose gradients are None or zero now."""
        self._records.reset(parameters, zero=True)

    @untraced
    def all_reduce(self, group: Any = None) -> None:
        """Add up the samples of all processes, between backward and ``step()``.

        For gradients that you average over processes: a sample's contribution then is its local one
        over the number of processes. ``DistributedDataParallel`` needs no call. Costs an all-reduce
        of 4 bytes a parameter, tensor by tensor. A second call without a backward pass between
        changes nothing.

        Args:
            group: the process group; the default one.
        """
        self._records.all_reduce(group)


def _check_every(every: Any, sample: str) -> None:
    """Raise ValueError for anything but a whole number of steps, at least 1."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a whole number of steps, at least 1, got {every!r}")
    if every > 1 and sample == "token":
        raise ValueError(
            "every > 1 with sample='token': layers tell how many tokens there are, and at most"
            " steps none is observed. Take sequences for samples, or every=1"
        )
