"""Checkpoints and copies: what is saved mid-run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    BACKENDS,
    CASES,
    DEVICE,
    OWN,
    PLAIN,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    groups_of,
    ids,
    new_params,
    on_backends,
    set_gradients,
    snapshot,
)
from torch.optim import Optimizer

import fusedopt
from fusedopt.formats import OPTIONS as PRECISION

STATEFUL = [c for c in CASES if c.name != "SGD-stateless"]
WITH_STEP = [c for c in PLAIN if c.name != "SGD"]


def _clip() -> fusedopt.GlobalNorm:
    return fusedopt.GlobalNorm(0.5)


def _run(optimizer: Optimizer, first: int, steps: int) -> None:
    for seed in range(first, first + steps):
        set_gradients(groups_of(optimizer), seed)
        optimizer.step()


def _copy_params(source: Optimizer) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in groups_of(source)]


def _saved(optimizer: Optimizer) -> dict[str, Any]:
    """A state dict as it comes back from a file: plain values and tensors alone."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# To and from torch


@on_backends(CASES)
def test_torchs_checkpoint_goes_on_in_ours(case: Case, backend: str) -> None:
    """Default arguments on our side: every number must come out of the checkpoint."""
    pair = Pair(case)
    pair.step(5)
    ours = case.ours(_copy_params(pair.theirs), backend=backend)
    ours.load_state_dict(_saved(pair.theirs))
    for optimizer in (ours, pair.theirs):
        _run(optimizer, 6, 10)
    assert_same_state(ours, pair.theirs)


@on_backends(CASES)
def test_our_checkpoint_goes_on_in_torch(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    pair.step(5)
    theirs = case.theirs(_copy_params(pair.ours))
    theirs.load_state_dict(_saved(pair.ours))
    for optimizer in (theirs, pair.theirs):
        _run(optimizer, 6, 10)
    assert_same_state(theirs, pair.theirs)


@on_backends(WITH_STEP)
def test_capturable_checkpoints_go_both_ways(case: Case, backend: str) -> None:
    """Step counts then live on the parameters' device; torch itself has that on GPUs alone."""
    pair = Pair(case)
    ours = case.ours(new_params(seed=0), **case.options, capturable=True, backend=backend)
    pair.step(5)
    _run(ours, 1, 5)
    theirs = case.theirs(_copy_params(ours))
    theirs.load_state_dict(_saved(ours))
    assert theirs.param_groups[0]["capturable"] is True
    theirs.param_groups[0]["capturable"] = DEVICE.type == "cuda"
    back = case.ours(_copy_params(pair.theirs), backend=backend)
    back.load_state_dict(_saved(pair.theirs))
    back.param_groups[0]["capturable"] = True
    for optimizer in (pair.theirs, theirs, back):
        _run(optimizer, 6, 10)
    assert_same_state(theirs, pair.theirs)
    assert_same_state(back, pair.theirs)


def test_a_checkpoint_holds_plain_values_alone() -> None:
    """``weights_only=True`` refuses objects; the clipping bound is one number among others."""
    for case in CASES:
        optimizer = case.ours(new_params(), **case.options, clip=_clip(), backend="reference")
        _run(optimizer, 1, 2)
        loaded = _saved(optimizer)
        assert_same_bits(loaded["state"], optimizer.state_dict()["state"])
        assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_state_dict_has_torchs_structure(case: Case) -> None:
    pair = Pair(case, groups=({}, {"lr": 0.01}))
    pair.step(2)
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert set(ours) == set(theirs)
    assert set(ours["state"]) == set(theirs["state"])
    for mine, torchs in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert mine["params"] == torchs["params"]
        for key in set(torchs) - {"foreach"}:
            assert mine[key] == torchs[key], key


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_loading_leaves_the_checkpoint_alone(case: Case) -> None:
    """Catches a load that takes entries out of the caller's dictionary."""
    first = case.ours(new_params(), **case.options, clip=_clip(), backend="reference")
    _run(first, 1, 3)
    saved = _saved(first)
    before = copy.deepcopy(saved)
    second = case.ours(_copy_params(first), backend="reference")
    second.load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"]
    assert_same_bits(saved["state"], before["state"])


@pytest.mark.parametrize("case", STATEFUL, ids=ids)
def test_states_take_the_parameters_type_and_steps_keep_theirs(case: Case) -> None:
    """As in torch: a float32 run goes on with bfloat16 parameters."""
    pair = Pair(case)
    pair.step(3)
    saved = _saved(pair.ours)
    halves = [[p.detach().bfloat16() for p in groups_of(pair.ours)] for _ in range(2)]
    ours = case.ours(halves[0], backend="reference")
    theirs = case.theirs(halves[1])
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved)
    assert_same_state(ours, theirs, 0, 0)


@pytest.mark.parametrize("case", WITH_STEP, ids=ids)
@pytest.mark.parametrize("number", [int, float])
def test_old_checkpoints_with_a_number_for_the_step(case: Case, number: type) -> None:
    pair = Pair(case)
    pair.step(5)
    saved = _saved(pair.theirs)
    for state in saved["state"].values():
        state["step"] = number(state["step"].item())
    ours = case.ours(_copy_params(pair.theirs), backend="reference")
    theirs = case.theirs(_copy_params(pair.theirs))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
        _run(optimizer, 6, 5)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_old_checkpoints_without_later_options(case: Case) -> None:
    """Options younger than the checkpoint had their neutral value when it was written."""
    late = {"foreach", "maximize", "capturable", "differentiable", "fused"}
    late |= {"decoupled_weight_decay"}
    pair = Pair(case, maximize=False)
    pair.step(5)
    saved = _saved(pair.theirs)
    for group in saved["param_groups"]:
        for key in late & set(group):
            del group[key]
    ours = case.ours(_copy_params(pair.theirs), backend="reference")
    theirs = case.theirs(_copy_params(pair.theirs))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
        _run(optimizer, 6, 5)
    assert_same_state(ours, theirs)
    own = {*OWN[case.theirs.__name__], *PRECISION}
    assert set(ours.param_groups[0]) == {*theirs.param_groups[0], *own}


def test_sgd_buffers_that_are_none() -> None:
    """torch once saved ``momentum_buffer: None`` for parameters that had not been stepped."""
    case = PLAIN[0]
    pair = Pair(case)
    pair.step(2)
    saved = _saved(pair.theirs)
    saved["state"][0]["momentum_buffer"] = None
    ours = case.ours(_copy_params(pair.theirs), backend="reference")
    theirs = case.theirs(_copy_params(pair.theirs))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
        _run(optimizer, 6, 3)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_load_each_other_as_in_torch(names: tuple[str, str], backend: str) -> None:
    source, target = (next(c for c in PLAIN if c.name == name) for name in names)
    pair = Pair(source)
    pair.step(3)
    ours = target.ours(_copy_params(pair.theirs), backend=backend)
    theirs = target.theirs(_copy_params(pair.theirs))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(_saved(pair.theirs))
        _run(optimizer, 4, 4)
    assert_same_state(ours, theirs)
    flag = "decoupled_weight_decay"
    assert ours.param_groups[0][flag] is theirs.param_groups[0][flag]


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: Case) -> None:
    optimizer = case.ours(new_params(), **case.options, clip=_clip(), backend="reference")
    other = case.ours(new_params([(2,)]), **case.options, clip=fusedopt.GlobalNorm(9.0))
    _run(optimizer, 1, 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(other.state_dict())
    assert_unchanged(optimizer, before)
    assert optimizer.clip.max_norm == 0.5


# Rebuilding, copies, pickle ------------------------------------------------------------------


@on_backends(CASES)
@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
def test_rebuilt_with_defaults_and_loaded_gives_the_same_bits(
    case: Case, backend: str, clipped: bool
) -> None:
    """Catches any number that lives on ``self`` alone."""
    clip = _clip() if clipped else None
    first = case.ours(new_params(), **case.options, clip=clip, backend=backend)
    _run(first, 1, 3)
    second = case.ours(_copy_params(first), backend=backend)
    second.load_state_dict(_saved(first))
    for optimizer in (first, second):
        _run(optimizer, 4, 4)
    assert_same_bits(groups_of(second), groups_of(first))
    assert_same_bits(second.state_dict()["state"], first.state_dict()["state"])
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]


@on_backends(PLAIN)
def test_torchs_checkpoint_keeps_clip_and_backend(case: Case, backend: str) -> None:
    """It knows nothing of them, so the constructor's word stands."""
    clip = _clip()
    ours = case.ours(new_params(), clip=clip, backend=backend)
    theirs = case.theirs(new_params(), **case.options)
    _run(theirs, 1, 2)
    ours.load_state_dict(_saved(theirs))
    assert ours.clip is clip and clip.max_norm == 0.5
    assert ours.backend == backend
    _run(ours, 3, 1)
    assert clip.last is not None and clip.last > 0.5
    again = case.ours(new_params(), backend=backend)
    again.load_state_dict(_saved(ours))
    assert again.clip.max_norm == 0.5


def test_a_checkpoint_brings_every_option_of_the_clip() -> None:
    """Into the object that the user holds, where there is one."""
    case = PLAIN[2]
    saved = case.ours(
        new_params(),
        clip=fusedopt.GlobalNorm(0.25, norm_type=float("inf"), error_if_nonfinite=True),
    ).state_dict()
    clip = fusedopt.GlobalNorm(3.0)
    holder, bare = case.ours(new_params(), clip=clip), case.ours(new_params())
    for optimizer in (holder, bare):
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert optimizer.clip.max_norm == 0.25
        assert optimizer.clip.norm_type == float("inf")
        assert optimizer.clip.error_if_nonfinite is True
    assert holder.clip is clip
    unclipped = case.ours(new_params()).state_dict()
    holder.load_state_dict(unclipped)
    assert holder.clip is None


Copier = Callable[[Any], Any]
COPIERS: dict[str, Copier] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS["torch.save"] = _through_a_file


@pytest.mark.parametrize("how", COPIERS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_copies_go_on_alone(case: Case, how: str) -> None:
    """The copy has its own parameters and states, the original keeps its own."""
    original = case.ours(new_params(), **case.options, clip=_clip(), backend="reference")
    _run(original, 1, 3)
    duplicate = COPIERS[how](original)
    assert type(duplicate) is type(original)
    assert duplicate.backend == "reference"
    assert duplicate.clip.max_norm == 0.5 and duplicate.clip is not original.clip
    before = snapshot(original)
    _run(duplicate, 4, 3)
    assert_unchanged(original, before)
    assert duplicate.clip.last != original.clip.last
    _run(original, 4, 3)
    assert_same_bits(groups_of(duplicate), groups_of(original))
    assert_same_bits(duplicate.state_dict()["state"], original.state_dict()["state"])


def test_deepcopy_alone_copies_no_gradients_as_in_torch() -> None:
    pair = Pair(PLAIN[2])
    pair.step(2)
    for optimizer in pair.both:
        duplicate = copy.deepcopy(optimizer)
        before = snapshot(duplicate)
        duplicate.step()
        assert_unchanged(duplicate, before)


@on_backends(PLAIN)
def test_deepcopy_together_with_the_model_stays_tied(case: Case, backend: str) -> None:
    """Catches a plan that still points at the original's memory."""
    model = torch.nn.Linear(3, 4).to(DEVICE)
    optimizer = case.ours(model.parameters(), **case.options, backend=backend)
    _run(optimizer, 1, 2)
    twin, duplicate = copy.deepcopy((model, optimizer))
    before = snapshot(optimizer)
    assert all(p is q for p, q in zip(twin.parameters(), groups_of(duplicate), strict=True))
    _run(duplicate, 3, 2)
    assert_unchanged(optimizer, before)
    _run(optimizer, 3, 2)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))


@pytest.mark.parametrize("case", WITH_STEP, ids=ids)
def test_saved_step_counts_are_tensors_of_their_own(case: Case) -> None:
    """Editing or keeping one saved count must not touch another's, nor a later step a copy's."""
    optimizer = case.ours(new_params(), **case.options, backend="reference")
    _run(optimizer, 1, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    kept["state"][0]["step"].fill_(40)
    assert [kept["state"][i]["step"].item() for i in range(3)] == [40, 2, 2]
    _run(optimizer, 3, 1)
    assert kept["state"][1]["step"].item() == 2
    assert [s["step"].item() for s in optimizer.state_dict()["state"].values()] == [3] * 4
    one = _through_a_file(optimizer.state_dict()["state"][0]["step"])
    assert one.shape == () and one.item() == 3


# Loading into an optimizer that has stepped already


@on_backends(CASES)
def test_loading_replaces_what_an_earlier_run_prepared(case: Case, backend: str) -> None:
    """Catches plans, step counts and coefficient tables kept over ``load_state_dict``."""
    pair = Pair(case)
    pair.step(5)
    params = _copy_params(pair.theirs)
    ours = case.ours(params, backend=backend)
    _run(ours, 50, 3)
    with torch.no_grad():
        for p, q in zip(params, groups_of(pair.theirs), strict=True):
            p.copy_(q)
    ours.load_state_dict(_saved(pair.theirs))
    for optimizer in (ours, pair.theirs):
        _run(optimizer, 6, 4)
    assert_same_state(ours, pair.theirs)


@on_backends(PLAIN)
def test_rolling_back_repeats_the_same_bits(case: Case, backend: str) -> None:
    optimizer = case.ours(new_params(), **case.options, backend=backend)
    _run(optimizer, 1, 3)
    params = groups_of(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    _run(optimizer, 4, 3)
    first = snapshot(optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    _run(optimizer, 4, 3)
    assert_unchanged(optimizer, first)


@pytest.mark.parametrize("case", WITH_STEP, ids=ids)
def test_options_of_the_checkpoint_replace_those_of_the_run(case: Case) -> None:
    """lr, decay, averages and flags: also those that choose which states there are."""
    richer = {"amsgrad": True} if "Adam" in case.name else {"centered": True, "momentum": 0.5}
    pair = Pair(case, **richer)
    pair.step(3)
    ours = case.ours(_copy_params(pair.theirs), lr=9.0, weight_decay=0.7, backend="reference")
    _run(ours, 50, 2)
    for p, q in zip(groups_of(ours), groups_of(pair.theirs), strict=True):
        p.data.copy_(q.data)
    ours.load_state_dict(_saved(pair.theirs))
    for optimizer in (ours, pair.theirs):
        _run(optimizer, 4, 3)
    assert_same_state(ours, pair.theirs)


# Distributed checkpoints


@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_distributed_checkpoint_functions(case: Case) -> None:
    """They step an unstepped optimizer at lr 0 to make its states: nothing may move by that."""
    from torch.distributed.checkpoint import state_dict as dcp

    model = torch.nn.Linear(3, 4).to(DEVICE)
    first = case.ours(model.parameters(), **case.options, clip=_clip(), backend="reference")
    before = copy.deepcopy(list(model.parameters()))
    dcp.get_optimizer_state_dict(model, first)
    assert_same_bits(list(model.parameters()), before)
    assert first.param_groups[0]["lr"] == case.options["lr"]
    _run(first, 1, 3)
    # Its tensors are the live ones, and loading does not copy them.
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, first))
    twin = copy.deepcopy(model)
    second = case.ours(twin.parameters(), backend="reference")
    dcp.set_optimizer_state_dict(twin, second, saved)
    for optimizer in (first, second):
        _run(optimizer, 4, 3)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    assert second.clip.max_norm == 0.5


def test_distributed_checkpoint_functions_flattened() -> None:
    """Flattened, every entry of a group becomes an entry of its own per parameter."""
    from torch.distributed.checkpoint import state_dict as dcp

    case = PLAIN[3]
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(3, 4).to(DEVICE)
    first = case.ours(model.parameters(), **case.options, clip=_clip(), backend="reference")
    _run(first, 1, 3)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, first, options=options))
    twin = copy.deepcopy(model)
    second = case.ours(twin.parameters(), clip=_clip(), backend="reference")
    dcp.set_optimizer_state_dict(twin, second, saved, options=options)
    for optimizer in (first, second):
        _run(optimizer, 4, 3)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
