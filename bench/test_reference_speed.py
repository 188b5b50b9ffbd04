"""The reference backend on a CPU against torch's for-loop: 25 million parameters."""

from __future__ import annotations

import torch

import fusedopt
from bench.harness.pairs import make_params, ratio

# A few large matrices, as most of a model's parameters are.
SHAPES = [(5000, 1000)] * 5


def test_not_slower_than_the_for_loop():
    ours = fusedopt.AdamW(make_params(SHAPES), backend="reference")
    theirs = torch.optim.AdamW(make_params(SHAPES), foreach=False)
    # The fastest of many: other processes take memory bandwidth, now from one, now from the other.
    measured = ratio(ours.step, theirs.step, rounds=15, of=min)
    print(f"\nCPU step(), fusedopt reference over torch for-loop, 25 M: {measured:.3f}")
    # Same work, or the ratio means nothing.
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    assert measured <= 1.0
