"""Which modules of a model are observed, and what they run when they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import distributed, nn

from .fallback import functional, trained_parameters
from .instrument import is_observed
from .layer_call import LayerCall
from .layers import coupled_message
from .managed import is_managing, refusal
from .model_calls import ModelCalls
from .ownership import is_container, own_parameters, set_by_hooks
from .recognised import run_attention, runs_of
from .unknown import check_context


class LayerForward:
    """What an observed module runs: its layer's own way if it is to be seen, or plain."""

    def __init__(self, calls: ModelCalls, name: str, module: nn.Module) -> None:
        self.calls = calls
        self.name = name or "the model"
        self.runs = runs_of(module)
        self.own = list(own_parameters(module).values())
        # Attention reads those of its output, too.
        self.read = list(module.parameters()) if self.runs is run_attention else self.own
        # Whether or not it has parameters to train: attention those of its output, a coupled layer
        # to say that it is one.
        self.always = _is_coupled(module) or self.runs is run_attention

    def __call__(self, module: nn.Module, plain: Any, arguments: Any, keywords: Any) -> Any:
        """Run the module, whose own forward is ``plain``."""
        calls = self.calls
        trained = self.always or any(p.requires_grad for p in self.own)
        if not (trained and calls.is_watching() and self._is_due()):
            return plain(*arguments, **keywords)
        check_context(self.name)
        call = calls.current(self.name)
        layer = LayerCall(call, self.name, calls.is_replaying(), calls.is_unplaced())
        return self.runs(layer, module, plain, arguments, keywords)

    def _is_due(self) -> bool:
        """Whether squares of any of its parameters are made in this call of the model."""
        cycle = self.calls.cycle
        if cycle is None or cycle.measures:
            return True
        return cycle.takes(self.read)


def check_model(model: nn.Module) -> None:
    """Raise RuntimeError for a model that cannot be observed, naming what is in the way."""
    for name, module in model.named_modules():
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
        problem = _unsupported(module) or _unsharded_again(module)
        if problem:
            raise RuntimeError(f"{name} ({type(module).__name__}): {problem}")
    for name, p in model.named_parameters():
        if p.is_complex():
            raise RuntimeError(
                f"parameter {name!r} is complex: its per-sample squares are not known. Use"
                " MicroBatchSquares or GradSampleSquares, which take it for pairs of reals"
            )
        problem = refusal(model, p) if hasattr(p, "placements") else None
        if problem is not None:
            raise RuntimeError(f"parameter {name!r} {problem}")


def _is_coupled(module: nn.Module) -> bool:
    """Whether a module may mix the samples of a batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def observable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def _unsharded_again(module: nn.Module) -> str | None:
    """Say why a module that FSDP takes part in cannot be observed."""
    if distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if isinstance(module, FullyShardedDataParallel):
            return (
                "its parameters are flattened into one, of which no layer has squares: use"
                " torch.distributed.fsdp.fully_shard, or MicroBatchSquares"
            )
    within = (child for child in module.modules() if child is not module and is_managing(child))
    if runs_of(module) is functional and trained_parameters(module) and any(True for _ in within):
        own = ", ".join(trained_parameters(module))
        return (
            f"it is not a layer whose per-sample squares are known, so that it would be run again"
            f" for each sample, which modules in it that fully_shard was called with cannot be."
            f" Move its own parameters ({own}) into a module of their own and call that, or use"
            " MicroBatchSquares"
        )
    return None


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
