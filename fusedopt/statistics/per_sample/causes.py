"""Why squares cannot be used, each cause in a sentence of its own, with the way out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .expected import Foreign
from .ownership import computes_weights
from .record import Record

NOT_PART = (
    "it is not part of the model that PerSampleSquares observes: give it an optimizer of its own"
)
NOT_ADDED_UP = (
    "there are several processes, and each has seen its own samples alone. Where"
    " DistributedDataParallel averages gradients, squares are added up by themselves, after a"
    " backward pass outside of no_sync(); where you average them, call statistics.all_reduce()"
    " between backward and step()"
)
NOT_ALIKE = (
    "parameters have seen different numbers of samples since their gradients were cleared: clear"
    " the gradients of all parameters of an optimizer at the same time"
)
SUM_EVERYWHERE = (
    "PerSampleSquares(every=k, loss_reduction='sum') in several processes: what gradients are"
    " divided by is known of steps with squares alone. Average the loss, or use every=1"
)
FOREIGN = {
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


def not_reduced(name: str) -> str:
    """Say that FSDP2 has whole gradients, beside shards."""
    return (
        f"the last gradient of {name!r} has not been reduced into that of the shard. Where"
        " set_requires_gradient_sync(False) was called, turn it on for the last micro-batch of a"
        " step; otherwise a module that fully_shard was not called with uses the parameter: call"
        " it with all modules that do, in one list"
    )


def changed(name: str) -> str:
    """Say what may be done to a gradient between backward and the step."""
    return (
        f"the gradient of {name!r} was changed between backward and step(), and not"
        " by one factor other than zero, in place and with all others, which squares would"
        " have followed. To clip, pass clip=fusedopt.GlobalNorm(max_norm) to the optimizer; if all"
        " gradients were multiplied by a factor, tell it by statistics.rescale(factor); if"
        " processes have averaged them, call statistics.all_reduce()"
    )


def not_finite(name: str) -> str:
    """Say that no factor can be told from numbers that are none."""
    return (
        f"the gradient of {name!r} was changed between backward and step(), and is not finite, so"
        " that no factor can be found which squares are to follow: skip the step, as a gradient"
        " scaler does, or find what made it so"
    )


def unknown(
    model: nn.Module, observed: Iterable[tuple[str, nn.Module, bool]], parameter: Tensor
) -> str:
    """Say why a layer has been called with a parameter that is not known.

    Args:
        model: that is observed.
        observed: its modules, with names and whether their weights were computed when observation
            began.
        parameter: the parameter.
    """
    for name, module, computed in observed:
        if computes_weights(module) and not computed:
            return (
                f"the weights of {name or 'the model'} are computed since PerSampleSquares was"
                " made (by a parametrization, weight_norm, pruning): call remove() and make it"
                " anew"
            )
    for name, candidate in model.named_parameters():
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


def missing(record: Record, removed: bool, called: bool) -> str:
    """Say why a gradient came without squares, and what to do.

    Args:
        record: of the parameter.
        removed: whether the model is observed no more.
        called: whether it has been called since it is.
    """
    again = "Call zero_grad(), then run forward and backward again"
    if removed:
        return (
            "remove() was called, and nothing observes the model any more: make"
            " PerSampleSquares anew, and set optimizer.statistics to it"
        )
    if not called:
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


def left_out(every: int) -> str:
    """Say that a step needs squares that its call of the model did not make."""
    return (
        f"with every={every} the call of the model has made none, and this step needs them: it is"
        " the first of this parameter, or its count of steps was changed since. Call zero_grad()"
        " and statistics.measure(), then run forward and backward again"
    )
