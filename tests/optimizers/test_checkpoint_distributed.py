"""Distributed checkpoints: torch's into ours, and clipping that is the same on all ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import in_ranks
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def make(cls: Any, stepped: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    if cls is fusedopt.BatchDecoupledAdam:
        options["statistics"] = fusedopt.PerSampleSquares(model)
    optimizer = cls(model.parameters(), lr=0.01, **options)
    if stepped:
        model(torch.ones(4, 3)).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


OURS = [
    ("SGD", {"momentum": 0.9}, "SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9}, "SGD", {"momentum": 0.9, "clip": fusedopt.GlobalNorm(1.0)}),
    ("RMSprop", {}, "RMSprop", {"bias_correction": True}),
    ("Adam", {}, "Adam", {"bias_correction": "running_mean"}),
    ("AdamW", {}, "AdamW", {"clip": fusedopt.GlobalNorm(1.0)}),
    ("AdamW", {}, "BatchDecoupledAdam", {"virtual_batch_size": 2}),
]


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize(("theirs", "options", "ours", "own"), OURS)
def test_torchs_checkpoint_loads(theirs, options, ours, own, stepped, tmp_path: Path) -> None:
    model, source = make(getattr(torch.optim, theirs), **options)
    dcp.save({"o": get_optimizer_state_dict(model, source)}, checkpoint_id=tmp_path)
    twin, target = make(getattr(fusedopt, ours), stepped, **own)
    options_before = {name: target.param_groups[0].get(name) for name in target.own_options}
    before = [p.detach().clone() for p in twin.parameters()]
    state = {"o": get_optimizer_state_dict(twin, target)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, target, state["o"])
    assert all(map(torch.equal, before, twin.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in source.state[p].items():
            torch.testing.assert_close(target.state[q][name], value, check_dtype=False)
    assert options_before == {name: target.param_groups[0].get(name) for name in target.own_options}
    assert target.clip is own.get("clip")
    assert target.param_groups[0]["lr"] == 0.01


def _clips(rank: int, folder: str) -> None:
    for number, (saved, loaded) in enumerate(((None, 1.0), (1.0, None), (1.0, 2.0))):
        clips = [None if bound is None else fusedopt.GlobalNorm(bound) for bound in (saved, loaded)]
        model, source = make(fusedopt.AdamW, clip=clips[0])
        place = f"{folder}/{number}"
        dcp.save({"o": get_optimizer_state_dict(model, source)}, checkpoint_id=place)
        twin, target = make(fusedopt.AdamW, clip=clips[1])
        state = {"o": get_optimizer_state_dict(twin, target)}
        dcp.load(state, checkpoint_id=place)
        set_optimizer_state_dict(twin, target, state["o"])
        assert (None if target.clip is None else target.clip.max_norm) == loaded


def test_every_rank_clips_as_it_was_told(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _clips, str(tmp_path))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_warm_up_from_zero_is_a_step(lr: Any) -> None:
    """Gradients are there, and so are their squares: moments and counts are made of them."""
    model, optimizer = make(fusedopt.BatchDecoupledAdam, stepped=False)
    optimizer.param_groups[0]["lr"] = copy.deepcopy(lr)
    model(torch.ones(4, 3)).square().sum(1).mean().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert torch.equal(before, model.weight) and state["step"] == 1 and state["exp_avg"].any()


def test_an_initialising_step_counts_nothing() -> None:
    model, optimizer = make(fusedopt.BatchDecoupledAdam, stepped=False)
    found = get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.statistics.samples == 0
    assert all(state["step"] == 0 for state in found["state"].values())
    other, plain = make(fusedopt.BatchDecoupledAdam, stepped=False)
    for m, o in ((model, optimizer), (other, plain)):
        m(torch.ones(4, 3)).square().sum(1).mean().backward()
        o.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


INITIALISED = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"weight_decay": 0.1, "momentum": 0.5, "bias_correction": True}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "clip": fusedopt.GlobalNorm(0.1)}),
    ("AdamW", {}),
]


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize(("name", "options"), INITIALISED)
def test_a_state_that_is_asked_for_before_the_first_step_is_none(
    name: str, options: dict[str, Any], lr: Any
) -> None:
    # Catches a step that is counted, and weight decay that goes into the moments, as in torch's.
    made = []
    for _ in range(2):
        model, optimizer = make(getattr(fusedopt, name), stepped=False, **options)
        optimizer.param_groups[0]["lr"] = copy.deepcopy(lr)
        made.append((model, optimizer))
    states = get_optimizer_state_dict(*made[0])["state"].values()
    assert len(states) == 2
    assert all(state and not any(x.any() for x in state.values()) for state in states)
    for _ in range(3):
        for model, optimizer in made:
            model(torch.ones(4, 3)).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, made[0][0].parameters(), made[1][0].parameters()))


def test_a_step_at_lr_0_with_gradients_is_a_step() -> None:
    model, optimizer = make(fusedopt.AdamW, stepped=False)
    optimizer.param_groups[0]["lr"] = 0.0
    model(torch.ones(4, 3)).square().sum(1).mean().backward()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_first_step_at_lr_0_without_squares_is_an_error() -> None:
    """Gradients are there: it is no step that is only to create states."""
    model, optimizer = make(fusedopt.BatchDecoupledAdam, stepped=False)
    optimizer.param_groups[0]["lr"] = 0.0
    with optimizer.statistics.paused():
        model(torch.ones(4, 3)).square().sum(1).mean().backward()
    with pytest.raises(RuntimeError, match="no per-sample squares"):
        optimizer.step()
    assert not optimizer.state
