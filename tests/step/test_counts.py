"""Step counts under the user's hands: given other memory, shared, freed, or no count at all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import DEVICE, PLAIN, Case, Pair, assert_same_state, groups_of, ids
from marks import both_backends

import fusedopt

COUNTING = [case for case in PLAIN if case.name != "SGD"]
each_counting = pytest.mark.parametrize("case", COUNTING, ids=ids)


def _data(step: torch.Tensor) -> None:
    step.data = torch.tensor(9.0)


def _double(step: torch.Tensor) -> None:
    step.data = torch.tensor(9.0, dtype=torch.float64)


def _set(step: torch.Tensor) -> None:
    step.set_(torch.tensor(9.0))


def _swap(step: torch.Tensor) -> None:
    torch.utils.swap_tensors(step, torch.tensor(9.0))


MOVES: dict[str, Callable[[torch.Tensor], None]] = {
    "data": _data, "double": _double, "set_": _set, "swap_tensors": _swap,
}  # fmt: skip


@pytest.mark.skipif(DEVICE.type != "cpu", reason="new counts are made on the host")
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "live"])
@pytest.mark.parametrize("how", MOVES)
@each_counting
@both_backends
def test_a_count_in_other_memory_is_taken_and_advanced(
    case: Case, backend: str, how: str, capturable: bool
) -> None:
    # Catches a count that is still the same tensor, but no longer what the step advances: it stood
    # still at 9, and the bias correction went on from 3.
    pair = Pair(case, shapes=[(3,), (2,)], backend=backend)
    if capturable:
        pair.ours.param_groups[0]["capturable"] = True
    pair.step(3)
    for optimizer in pair.both:
        MOVES[how](optimizer.state[groups_of(optimizer)[0]]["step"])
    for expected in (10, 11):
        pair.step()
        counts = [pair.ours.state[p]["step"].item() for p in groups_of(pair.ours)]
        assert counts == [expected, expected - 6]
    for optimizer in pair.both:
        for state in optimizer.state.values():
            state["step"] = state["step"].float()
    assert_same_state(pair.ours, pair.theirs)
    saved = pair.ours.state_dict()["state"]
    assert [state["step"].item() for state in saved.values()] == [11, 5]


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "live"])
@both_backends
def test_a_shared_count_is_separated(backend: str, capturable: bool) -> None:
    # Catches one count that advances by as many as share it: the documented difference.
    pair = Pair(COUNTING[1], shapes=[(3,), (2,)], backend=backend)
    if capturable:
        pair.ours.param_groups[0]["capturable"] = True
    pair.step(2)
    first, second = groups_of(pair.ours)
    pair.ours.state[second]["step"] = pair.ours.state[first]["step"]
    pair.step(2)
    assert [pair.ours.state[p]["step"].item() for p in (first, second)] == [4, 4]
    assert_same_state(pair.ours, pair.theirs)


def _freed(step: torch.Tensor) -> torch.Tensor:
    step.untyped_storage().resize_(0)
    return step


def _on_meta(step: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device="meta")


@pytest.mark.parametrize("spoil", [_freed, _on_meta], ids=["freed", "meta"])
@each_counting
@both_backends
def test_a_count_without_memory_is_refused(
    case: Case, backend: str, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # Catches a read of freed memory, which ended the process.
    pair = Pair(case, shapes=[(3,), (2,)], backend=backend)
    pair.step(2)
    first, second = groups_of(pair.ours)
    before = copy.deepcopy([first.data, second.data])
    pair.ours.state[second]["step"] = spoil(pair.ours.state[second]["step"])
    for _ in range(2):
        pair.backward()
        with pytest.raises(RuntimeError, match=r"\['params'\]\[\d\].*'step'.*no values in memory"):
            pair.ours.step()
        assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    # Freed memory is that of all counts made together.
    for p in (first, second):
        pair.ours.state[p]["step"] = torch.tensor(2.0)
    pair.ours.step()
    assert [pair.ours.state[p]["step"].item() for p in (first, second)] == [3, 3]


@both_backends
def test_a_count_of_one_parameter_that_is_freed(backend: str) -> None:
    # Catches a look at addresses alone: that of a lone count is where new memory may come to lie.
    (p,) = params = [torch.nn.Parameter(torch.ones(3, device=DEVICE))]
    optimizer = fusedopt.Adam(params, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="'step'"):
        optimizer.step()
    optimizer.state[p]["step"] = torch.tensor(5.0)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 6


@pytest.mark.parametrize(
    "step", ["x", [1], None, {}, 10**400], ids=["str", "list", "None", "dict", "huge"]
)
@pytest.mark.parametrize("case", PLAIN, ids=ids)
def test_a_checkpoint_whose_count_is_no_number_changes_nothing(case: Case, step: Any) -> None:
    # Catches an error after everything was replaced: SGD has no count, and looked at none.
    pair = Pair(case, shapes=[(3,)])
    pair.step(2)
    saved = copy.deepcopy(pair.ours.state_dict())
    saved["state"][0]["step"] = step
    saved["param_groups"][0]["lr"] = 0.7
    before = copy.deepcopy(pair.ours.state_dict())
    if step == {} and not pair.ours.rule.counts_steps:
        # As torch fills in for what a flattened file lacks: nothing that SGD keeps.
        pair.ours.load_state_dict(saved)
        assert "step" not in pair.ours.state[pair.ours.param_groups[0]["params"][0]]
        return
    with pytest.raises((ValueError, KeyError), match=r"\['params'\]\[0\].*'step'"):
        pair.ours.load_state_dict(saved)
    assert pair.ours.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    pair.step(1)
    assert_same_state(pair.ours, pair.theirs)


def test_a_count_that_float32_cannot_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches coefficients of a count beyond the one that checkpoints have."""
    seen: list[float] = []
    plain = fusedopt.AdamW.rule

    def watched(group: dict[str, Any], step: float) -> tuple[float, ...]:
        seen.append(step)
        return plain.coefficients(group, step)

    monkeypatch.setattr(fusedopt.AdamW, "rule", dataclasses.replace(plain, coefficients=watched))
    p = torch.nn.Parameter(torch.ones(3))
    ours = fusedopt.AdamW([p])
    p.grad = torch.ones(3)
    ours.step()
    ours.state[p]["step"].fill_(2.0**24 - 2)
    seen.clear()
    for _ in range(4):
        ours.step()
    assert seen == [2.0**24 - 1, 2.0**24, 2.0**24, 2.0**24]
    assert ours.state[p]["step"].item() == 2.0**24
