"""How a module is run: as a known layer, as one that is recognised, or as one of unknown kind.

Classes of other packages are found by their full names, so that nothing is imported; what stands
for them is compared with their own forward, as any registered function is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import experts
from .agreement import Registered
from .attention import attention
from .fallback import functional
from .instrument import original_class
from .known import Known, LayerOperations, known
from .layer_call import LayerCall
from .norms import own_norm
from .ownership import computes_weights

Runs = Callable[[LayerCall, nn.Module, Any, Any, Any], Any]


def runs_of(module: nn.Module) -> Runs:
    """Return what is run in the place of a module's forward."""
    forward: Any = original_class(module).forward
    if computes_weights(module):
        return functional
    if forward is nn.MultiheadAttention.forward:
        return run_attention
    found = known(forward) or _NAMED.get(_owner(module))
    if found is None and experts.is_experts(module):
        found = Known(experts.run, built_in=False)
    if found is not None:
        return Registered(found)
    return own_norm(module) or functional


def run_attention(
    layer: LayerCall, module: nn.Module, plain: Any, arguments: Any, keywords: Any
) -> Any:
    """Run torch's attention."""
    return attention(layer, module, *arguments, **keywords)  # type: ignore[arg-type]


def _owner(module: nn.Module) -> str:
    """Name the class whose forward a module runs."""
    for kind in original_class(module).__mro__:
        if "forward" in vars(kind):
            return f"{kind.__module__}.{kind.__qualname__}"
    return ""


def _transposed(call: LayerOperations, module: Any, x: Tensor) -> Tensor:
    """A linear layer that keeps its weight as [inputs, outputs]: GPT's."""
    return call.linear(x, module.weight, module.bias, transposed=True)


_NAMED = {
    "transformers.pytorch_utils.Conv1D": Known(_transposed, built_in=False),
    # Where it was until version 4.
    "transformers.modeling_utils.Conv1D": Known(_transposed, built_in=False),
}
