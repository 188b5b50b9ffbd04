"""An error inside a scaled step leaves no scale behind for the next plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedopt


@pytest.mark.parametrize("where", ["pre-hook", "post-hook", "clip", "gradient"])
def test_an_error_leaves_no_scale_behind(where: str) -> None:
    # Catches gradients of a later plain step that are divided by the scale.
    p = torch.nn.Parameter(torch.zeros(3))
    clip = fusedopt.GlobalNorm(1e9, error_if_nonfinite=True) if where == "clip" else None
    optimizer = fusedopt.SGD([p], lr=1.0, clip=clip, backend="reference", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook's error")

    p.grad = torch.full((3,), 3e38) if where == "clip" else torch.ones(3)
    if where == "gradient":
        p.grad = torch.sparse_coo_tensor(
            torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True
        )
    handle = None
    if where == "pre-hook":
        handle = optimizer.register_step_pre_hook(fail)
    if where == "post-hook":
        handle = optimizer.register_step_post_hook(fail)
    if where == "clip":
        scaler._scale.fill_(1e-30)  # the norm overflows once unscaled
    with pytest.raises(RuntimeError):
        scaler.step(optimizer)
    if handle is not None:
        handle.remove()
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    before = p.detach().clone()
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(before - p.detach(), torch.ones(3))
