"""Momentum buffers of different units, which no file carries from one form into another."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract import assert_same_bits, assert_unchanged, snapshot
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as sd

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# None is torch's class.
FORMS = (None, "torch", "velocity", "ema")
PAIRS = [(saved, loaded) for saved in FORMS for loaded in FORMS]
each_pair = pytest.mark.parametrize(("saved", "loaded"), PAIRS)


def _made(form: str | None, seed: int = 0) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    cls = torch.optim.SGD if form is None else fusedopt.SGD
    options = {} if form is None else {"momentum_form": form}
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = cls(groups, lr=0.1, momentum=0.9, **options)
    for p in model.parameters():
        p.grad = torch.full_like(p, seed + 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _of_one_unit(saved: str | None, loaded: str | None) -> bool:
    """Whether a file is for the other: its form comes with it, where it is not torch's."""
    return (saved in (None, "torch")) == (loaded in (None, "torch"))


def _check_loaded(source: Any, target: Any, form: str | None) -> None:
    assert_same_bits(
        [s["momentum_buffer"] for s in target.state.values()],
        [s["momentum_buffer"] for s in source.state.values()],
    )
    if isinstance(target, fusedopt.SGD):
        for group in target.param_groups:
            assert group["momentum_form"] == (form or "torch")
            assert group["differentiable"] is False


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@each_pair
def test_files(saved: str | None, loaded: str | None, flat: bool, tmp_path: Path) -> None:
    # Catches buffers in another unit: they are 1 / lr or 1 / (1 - momentum) too large or small.
    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, source = _made(saved)
    state = {"o": sd.get_optimizer_state_dict(model, source, options=options)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    twin, target = _made(loaded, 1)
    before = snapshot(target)
    state = {"o": sd.get_optimizer_state_dict(twin, target, options=options)}
    if not _of_one_unit(saved, loaded):
        missing = "differentiable" if loaded in (None, "torch") else "momentum_form"
        with pytest.raises(CheckpointException, match=rf"Missing key .*{missing}"):
            dcp.load(copy.deepcopy(state), checkpoint_id=tmp_path, no_dist=True)
        assert_unchanged(target, before)
        return
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    sd.set_optimizer_state_dict(twin, target, state["o"], options=options)
    _check_loaded(source, target, saved)


def _through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["plain", "file", "get", "offloaded", "full"])
@each_pair
def test_in_memory(saved: str | None, loaded: str | None, way: str) -> None:
    # Catches a form that is lost where torch builds containers anew: what it does not know of has
    # to be refused, or come along.
    model, source = _made(saved)
    twin, target = _made(loaded, 1)
    before = snapshot(target)
    full, offload = way == "full", way in ("full", "offloaded")
    options = sd.StateDictOptions(full_state_dict=full, cpu_offload=offload)

    def load() -> None:
        if way in ("plain", "file"):
            state = source.state_dict()
            target.load_state_dict(_through_torch(state) if way == "file" else state)
            return
        state = sd.get_optimizer_state_dict(model, source, options=options)
        sd.set_optimizer_state_dict(twin, target, state, options=options)

    # torch's class takes what it is given; full states are completed by the loading optimizer's.
    if loaded is None and not full:
        load()
        return
    knows = saved is not None and not offload
    if _of_one_unit(saved, loaded) or knows or (saved in ("velocity", "ema") and not full):
        load()
        _check_loaded(source, target, saved)
        return
    with pytest.raises((KeyError, ValueError), match=r"momentum_form|differentiable"):
        load()
    assert_unchanged(target, before)


def test_a_state_put_together_of_two_is_refused() -> None:
    # Catches a claim by the loading optimizer that passes for one of the saved buffers.
    _, theirs = _made(None)
    _, ours = _made("velocity", 1)
    saved = copy.deepcopy(theirs.state_dict())
    for group, own in zip(saved["param_groups"], ours.state_dict()["param_groups"], strict=True):
        group["momentum_form"] = own["momentum_form"]
    before = snapshot(ours)
    with pytest.raises(ValueError, match="momentum_form"):
        ours.load_state_dict(saved)
    assert_unchanged(ours, before)


@pytest.mark.parametrize("form", ["velocity", "ema"])
def test_states_saved_before_the_form_was_claimed(form: str) -> None:
    # Catches a refusal of states that carry the form aside, beside torch's entries.
    _, source = _made(form)
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        fusedopt.checkpoint.put_aside(group, ["momentum_form"])
        group["momentum_form"].value = form
        group["differentiable"] = False
    _, target = _made("torch", 1)
    target.load_state_dict(saved)
    _check_loaded(source, target, form)


def test_buffers_converted_by_hand_load() -> None:
    # Catches a refusal of what the error advises.
    _, theirs = _made(None)
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"] *= 0.1
    for group in saved["param_groups"]:
        group["momentum_form"] = "velocity"
    _, target = _made("velocity", 1)
    target.load_state_dict(saved)
    assert_same_bits(
        [s["momentum_buffer"] for s in target.state.values()],
        [s["momentum_buffer"] for s in saved["state"].values()],
    )


def test_a_form_and_a_format_put_the_same_entry_aside() -> None:
    # Both claims take torch's entry out. Catches the value put aside twice, and so lost.
    model, ours = _made("ema")
    ours.param_groups[0]["state_dtype"] = "int8"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ours.step()
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert [group["differentiable"] for group in ours.param_groups] == [False, False]
