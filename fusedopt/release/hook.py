"""What autograd calls when a gradient has accumulated."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..tracing import untraced
from .single import Single


class Hook:
    """A hook of one parameter, which keeps nothing alive that has the parameter.

    The collector does not follow a parameter's hooks, so that a circle through one stays for good.

    Args:
        release: that takes the gradient.
        single: the parameter, as the release has it.
        handles: of all hooks of the release.
    """

    def __init__(self, release: Any, single: Single, handles: list[RemovableHandle]) -> None:
        self.release = weakref.ref(release)
        self._single = weakref.ref(single)
        self._handles = handles
        self._shape = tuple(single.parameter.shape)

    @untraced
    def __call__(self, _: Tensor) -> None:
        """Hand the gradient over to the release.

        Raises:
            RuntimeError: where the optimizer is not there any more; once, for all parameters.
        """
        release, single = self.release(), self._single()
        if release is None or single is None or release.optimizer() is None:
            for handle in list(self._handles):
                handle.remove()
            raise RuntimeError(
                f"the optimizer that releases the gradient of a parameter of shape {self._shape}"
                " was deleted: keep it. Gradients stay from now on, for another one"
            )
        release.arrived(single)

    def register(self, p: Tensor) -> RemovableHandle:
        """Have autograd call this for a parameter, which may be frozen and thawed later."""
        if p.requires_grad:
            return p.register_post_accumulate_grad_hook(self)
        p.requires_grad_(True)
        try:
            return p.register_post_accumulate_grad_hook(self)
        finally:
            p.requires_grad_(False)


def release_of(p: Tensor) -> Any:
    """Return the ``GradientRelease`` of a parameter's gradient, or None."""
    hooks = p._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]
    found = [hook.release() for hook in hooks.values() if isinstance(hook, Hook)]
    return next((x for x in found if x is not None and x.optimizer() is not None), None)
