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


@pytest.mark.parametrize("clipped", [False, True])
def test_unscaled_by_hand_is_folded_in_by_squares_that_follow(clipped: bool) -> None:
    """As trainers do: unscale_, clip_grad_norm_, step; with an overflow on the way."""
    ends = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        statistics = fusedopt.PerSampleSquares(model, backend="reference")
        clip = fusedopt.GlobalNorm(0.05) if clipped and not by_hand else None
        optimizer = fusedopt.BatchDecoupledAdam(
            model.parameters(), statistics=statistics, clip=clip, virtual_batch_size=2,
            backend="reference",
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(5):
            loss = model(torch.randn(3, 4)).square().mean()
            scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
            if by_hand:
                scaler.unscale_(optimizer)
                if clipped:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(before, model[0].weight) == (step == 2)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 128.0
        ends.append([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()])
    for ours, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-12)


def test_what_cannot_follow_unscaling_says_so() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    statistics = fusedopt.GradSampleSquares()
    optimizer = fusedopt.BatchDecoupledAdam([p], statistics=statistics)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    p.grad_sample = torch.ones(2, 3)
    p.grad = p.grad_sample.mean(0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)
    assert not optimizer.state and not p.detach().any()
