"""What outlives a step: states, and nothing of the gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fusedopt


@pytest.mark.parametrize("clip", [None, fusedopt.GlobalNorm(1.0)], ids=["plain", "clipped"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_are_freed_by_zero_grad(backend, clip, device):
    """A kept gradient would add a model's size to the memory of the next forward pass."""
    params = [torch.nn.Parameter(torch.randn(4, 6, device=device)) for _ in range(3)]
    optimizer = fusedopt.AdamW(params, backend=backend, clip=clip)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        # One that is staged, too.
        params[1].grad = torch.randn(6, 4, device=device).t()
        optimizer.step()
        gradients = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        gc.collect()
        assert [gradient() for gradient in gradients] == [None] * 3


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_states_take_what_torch_takes(backend, device):
    p = torch.nn.Parameter(torch.randn(100, device=device, dtype=torch.bfloat16))
    p.grad = torch.randn_like(p)
    optimizer = fusedopt.AdamW([p], backend=backend)
    optimizer.step()
    sizes = {name: value.nbytes for name, value in optimizer.state[p].items()}
    assert sizes == {"step": 4, "exp_avg": 200, "exp_avg_sq": 200}
