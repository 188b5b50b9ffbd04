"""Masters of a checkpoint that is loaded before the parameters that they belong to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusedopt


def _optimizer(p: torch.nn.Parameter, master: str | None) -> Any:
    return fusedopt.SGD([p], lr=0.01, momentum=0.9, master=master, backend="reference")


@pytest.mark.parametrize("wanted", ["float32", "remainder8", "remainder"])
def test_a_master_waits_for_its_parameter(wanted: str) -> None:
    # Catches a master that is brought to another form beside the parameter of before.
    source = torch.nn.Parameter(torch.randn(300).to(torch.bfloat16))
    saving = _optimizer(source, "remainder")
    for _ in range(3):
        source.grad = torch.randn(300).to(torch.bfloat16)
        saving.step()
    saved = copy.deepcopy(saving.state_dict())
    for group in saved["param_groups"]:
        group["master"] = wanted
    gradient = torch.randn(300).to(torch.bfloat16)
    ends = []
    for late in (False, True):
        p = torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
        optimizer = _optimizer(p, wanted)
        if not late:
            p.data.copy_(source.data)
        optimizer.load_state_dict(copy.deepcopy(saved))
        if late:
            p.data.copy_(source.data)
        p.grad = gradient
        optimizer.step()
        ends.append((p.detach(), optimizer.state[p]["master"]))
    for x, y in zip(*ends, strict=True):
        assert torch.equal(x, y)
    # And it is that of the optimizer that saved it.
    source.grad = gradient
    saving.step()
    assert (ends[1][0] != source).sum() <= (0 if wanted == "remainder" else 1)
