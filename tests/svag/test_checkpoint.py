"""Checkpoints of SVAG and of its optimizer, and copies of the optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contract import (
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    groups_of,
    new_params,
    snapshot,
)
from svag_by_hand import (
    OPTIONS,
    draw,
    each_name,
    give,
    hold,
    made,
    on_backends,
    rescaled,
    svag_step,
)

import fusedopt
from fusedopt import SVAG

# Checkpoints


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back: plain values and tensors alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _other(optimizer: Any, name: str, ell: float) -> SVAG:
    """SVAG of copies of the parameters, with the class's own hyper-parameters."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in groups_of(optimizer)]
    return SVAG(getattr(fusedopt, name)(params, backend="reference"), ell)


def _run(svag: SVAG, seeds: Sequence[int]) -> None:
    params = groups_of(svag.optimizer)
    for seed in seeds:
        svag_step(svag, draw(params, seed), draw(params, seed + 1))


@each_name
@pytest.mark.parametrize("whole", [True, False], ids=["svag", "optimizer alone"])
def test_checkpoint(name: str, whole: bool) -> None:
    # Catches hyper-parameters rescaled once more on loading, or saved as they were before.
    _, svag = made(name, 3.5)
    _run(svag, (1, 3))
    saved = _through_a_file((svag if whole else svag.optimizer).state_dict())
    other = _other(svag.optimizer, name, 3.5)
    (other if whole else other.optimizer).load_state_dict(saved)
    assert_same_bits(snapshot(other.optimizer), snapshot(svag.optimizer))
    for one in (svag, other):
        _run(one, (5, 7))
    assert_same_bits(snapshot(other.optimizer)[:2], snapshot(svag.optimizer)[:2])


@each_name
def test_checkpoint_holds_no_gradients(name: str) -> None:
    # Catches a held gradient in a file, which would be a batch's of another run.
    _, svag = made(name, 2)
    _run(svag, (1,))
    before = svag.state_dict()
    hold(svag)
    assert_same_bits(svag.state_dict(), before)
    assert svag.optimizer.state_dict().keys() == {"state", "param_groups"}


@each_name
def test_checkpoint_of_the_optimizer_is_torchs(name: str) -> None:
    # Catches anything of SVAG in the optimizer's file but the hyper-parameters.
    _, svag = made(name, 2)
    _run(svag, (1,))
    params = [torch.nn.Parameter(p.detach().clone()) for p in groups_of(svag.optimizer)]
    theirs = getattr(torch.optim, name)(params, lr=1.0, foreach=False)
    theirs.load_state_dict(_through_a_file(svag.optimizer.state_dict()))
    for key, value in rescaled(name, 2, OPTIONS[name]).items():
        assert theirs.param_groups[0][key] == pytest.approx(value, rel=1e-14)
    assert_same_state(svag.optimizer, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("ell", [1, 3.4999, 7])
def test_checkpoint_of_another_ell(ell: float) -> None:
    # Catches steps of one size with a mix for another.
    _, svag = made("Adam", 3.5)
    _run(svag, (1,))
    other = _other(svag.optimizer, "Adam", ell)
    before = snapshot(other.optimizer)
    with pytest.raises(ValueError, match="ell"):
        other.load_state_dict(_through_a_file(svag.state_dict()))
    assert_unchanged(other.optimizer, before)
    _run(other, (3,))


def test_checkpoint_of_an_equal_ell() -> None:
    # Catches 2 and 2.0 taken for different.
    _, svag = made("Adam", 2)
    other = _other(svag.optimizer, "Adam", 2.0)
    other.load_state_dict(_through_a_file(svag.state_dict()))
    assert_same_bits(snapshot(other.optimizer), snapshot(svag.optimizer))


# Copies


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@on_backends
def test_copies_of_the_optimizer_are_plain(name: str, how: str, held: bool, backend: str) -> None:
    # Catches a copy that waits for a second gradient which nobody can hold for it, one that uses
    # the original's, and an original that has lost its own.
    params, svag = made(name, 2, backend=backend)
    _run(svag, (1,))
    first, second = draw(params, 3), draw(params, 4)
    if held:
        give(params, first)
        svag.hold()
    optimizer = svag.optimizer
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(other) is type(optimizer)
    assert_same_bits(snapshot(other)[:3], snapshot(optimizer)[:3])

    params_of_other = groups_of(other)
    theirs_params = [torch.nn.Parameter(p.detach().clone()) for p in params_of_other]
    options = rescaled(name, 2, OPTIONS[name])
    theirs = getattr(torch.optim, name)(theirs_params, **options, foreach=False)
    theirs.load_state_dict(copy.deepcopy(other.state_dict()))
    for one in (params_of_other, theirs_params):
        give(one, draw(one, 9))
    other.step()
    theirs.step()
    assert_same_state(other, theirs, rtol=1e-12, atol=1e-13)

    control, control_svag = made(name, 2, backend=backend)
    _run(control_svag, (1,))
    svag_step(control_svag, first, second)
    if not held:
        give(params, first)
        svag.hold()
    give(params, second)
    svag.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in control])


def test_new_params_are_the_same_each_time() -> None:
    # Otherwise the comparisons above would be of different starts.
    assert_same_bits([p.detach() for p in new_params()], [p.detach() for p in new_params()])
