"""What a guard remembers: in checkpoints, copies, pickles, and what torch makes of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from marks import both_backends, numpy_may_warn
from spikes import spiky
from torch.distributed.checkpoint import state_dict as sd

import fusedopt
from fusedopt import GlobalNorm, SpikeGuard
from fusedopt import guard as guard_module

SHAPES = [(5,), (3, 2)]
SETTING = (2.5, 8, 3)
quiet = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(1)
        self.a, self.b = (torch.nn.Parameter(torch.randn(s, generator=drawn)) for s in SHAPES)


def make(cls: Any = fusedopt.AdamW, guard: Any = SETTING, **options: Any) -> tuple[Model, Any]:
    model = Model()
    if guard is not None:
        options["guard"] = SpikeGuard(*guard)
    return model, cls([{"params": [p]} for p in model.parameters()], lr=0.1, **options)


def train(model: Model, optimizer: Any, steps: slice) -> None:
    for gradients in list(spiky(SHAPES, 26))[steps]:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()


def same_guard(a: SpikeGuard, b: SpikeGuard) -> bool:
    one, other = a.state(), b.state()
    pairs = [(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one]
    return one.keys() == other.keys() and all(
        torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs
    )


def check_same(one: tuple[Model, Any], other: tuple[Model, Any]) -> None:
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in one[1].state[p].items():
            assert torch.equal(value, other[1].state[q][name])
    assert same_guard(one[1].guard, other[1].guard)


@numpy_may_warn
@pytest.mark.parametrize("at", [6, 17])
@both_backends
def test_a_run_goes_on_with_the_same_bits(backend: str, at: int, tmp_path: Path) -> None:
    """Through a file, before and after the ring is full; the new optimizer has another guard.

    Catches a norm, a count or a place in the ring that is not saved, and arguments that are not.
    """
    whole = make(backend=backend)
    train(*whole, slice(at))
    torch.save([x.state_dict() for x in whole], tmp_path / "run.pt")
    others = (SETTING, (9.0, 5, 2), None)
    for other in others if backend == "reference" else others[2:]:
        resumed = make(guard=other, backend=backend)
        train(*resumed, slice(3, 5))
        for x, state in zip(resumed, torch.load(tmp_path / "run.pt"), strict=True):
            x.load_state_dict(state)
        assert (resumed[1].guard.zscore, resumed[1].guard.min_steps) == (2.5, 3)
        check_same(resumed, whole)
        reference = copy.deepcopy(whole)
        train(*resumed, slice(at, None))
        train(*reference, slice(at, None))
        check_same(resumed, reference)
    assert resumed[1].guard.skipped > 5


def test_a_state_is_a_copy_and_is_loaded_in_place() -> None:
    """A captured graph goes on with the memory that it has; a saved state does not change."""
    model, ours = make()
    train(model, ours, slice(9, 16))
    saved, memory = ours.state_dict(), ours.guard.record_on(torch.device("cpu"))
    before = copy.deepcopy(ours.guard)
    train(model, ours, slice(16, 19))
    assert not same_guard(ours.guard, before)
    ours.load_state_dict(saved)
    assert same_guard(ours.guard, before)
    assert ours.guard.record_on(torch.device("cpu")) is memory


def test_a_checkpoint_without_one_leaves_it() -> None:
    model, ours = make()
    train(model, ours, slice(9, 16))
    before = copy.deepcopy(ours.guard)
    for cls in (torch.optim.AdamW, fusedopt.AdamW):
        ours.load_state_dict(make(cls, None)[1].state_dict())
        assert same_guard(ours.guard, before)
    assert "guard" not in make(guard=None)[1].state_dict()["param_groups"][0]


def test_torchs_optimizer_loads_a_checkpoint_with_one() -> None:
    model, ours = make()
    train(model, ours, slice(9, 16))
    theirs = make(torch.optim.AdamW, None)
    theirs[1].load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs[0].load_state_dict(model.state_dict())
    gradients = [torch.ones(shape) for shape in SHAPES]
    for params, optimizer in (
        (list(model.parameters()), ours),
        (list(theirs[0].parameters()), theirs[1]),
    ):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    torch.testing.assert_close(list(theirs[0].parameters()), list(model.parameters()))
    exported = fusedopt.export_state_dict(ours)
    assert all("guard" not in group for group in exported["param_groups"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_one_of_their_own(copied: Any) -> None:
    model, ours = make(clip=GlobalNorm(1.0))
    train(model, ours, slice(9, 16))
    other = copied(ours)
    assert same_guard(ours.guard, other.guard) and repr(other.guard) == repr(ours.guard)
    train(model, ours, slice(16, 18))
    assert not same_guard(ours.guard, other.guard)


def test_a_pickle_of_before_there_were_guards() -> None:
    state = make(guard=None)[1].__getstate__()
    del state["guard"]
    ours = object.__new__(fusedopt.AdamW)
    ours.__setstate__(state)
    assert ours.guard is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norms", torch.zeros(7), r"'norms' of the guard .* shape \(8,\)"),
        ("skipped", 3, "'skipped' of the guard of the checkpoint must be a tensor"),
        ("min_steps", 1, "min_steps must be from 2"),
        ("accepted", None, "has no 'accepted'"),
    ],
)
def test_a_state_that_is_none(name: str, value: Any, message: str) -> None:
    model, ours = make()
    train(model, ours, slice(9, 16))
    saved = copy.deepcopy(ours.state_dict())
    for group in saved["param_groups"]:
        group["guard"].value[name] = value
        if value is None:
            group["guard"].value.pop(name)
    before = copy.deepcopy((model, ours))
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(saved)
    check_same((model, ours), before)


# Distributed checkpoint


@quiet
@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD])
def test_the_step_of_distributed_checkpoint_is_not_counted(cls: Any, tmp_path: Path) -> None:
    """It steps with gradients of zeros at lr 0; SGD, of which nothing is created, in earnest."""
    model, ours = make(cls)
    fresh = copy.deepcopy(ours.guard)
    sd.get_optimizer_state_dict(model, ours)
    assert same_guard(ours.guard, fresh)
    train(model, ours, slice(9, 16))
    before = copy.deepcopy(ours.guard)
    state = {"o": sd.get_optimizer_state_dict(model, ours)}
    dcp.save(state, checkpoint_id=tmp_path)
    assert same_guard(ours.guard, before)
    # The file has no guard: what the constructor was given stays.
    twin, other = make(cls, (9.0, 5, 2))
    state = {"o": sd.get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    sd.set_optimizer_state_dict(twin, other, state["o"])
    assert repr(other.guard) == "SpikeGuard(9.0, window=5, min_steps=2)"
    assert other.guard.skipped == 0


@quiet
@pytest.mark.parametrize("cls", [fusedopt.AdamW, torch.optim.AdamW])
def test_a_full_state_lacks_it(cls: Any) -> None:
    """Torch completes it by what the loading optimizer has: that stays."""
    source = make(cls, SETTING if cls is fusedopt.AdamW else None)
    train(*source, slice(9, 16))
    options = sd.StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(sd.get_optimizer_state_dict(*source, options=options))
    twin, other = make()
    train(twin, other, slice(10, 13))
    own = copy.deepcopy(other.guard)
    sd.set_optimizer_state_dict(twin, other, state, options=options)
    assert same_guard(other.guard, own)


def test_a_guard_that_a_capture_would_have_to_bring_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "is_capturing", lambda device: True)
    guard = SpikeGuard()
    assert guard.record_on(torch.device("cpu")) is guard.record_on(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="take one step with it before the capture"):
        guard.record_on(torch.device("meta"))


def test_a_captured_plan_holds_on_to_its_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph goes on writing there when the optimizer has another."""
    from fusedopt.step import plan

    model, ours = make(backend="reference", capturable=True)
    train(model, ours, slice(9, 12))
    monkeypatch.setattr(plan, "is_capturing", lambda device: True)
    train(model, ours, slice(12, 13))
    monkeypatch.undo()
    first = ours.guard
    ours.guard = SpikeGuard(*SETTING)
    train(model, ours, slice(13, 14))
    assert first in ours._engine.plan._held and first.unclipped in ours._engine.plan._held
    ours.release_graphs()
    assert not ours._engine.plan._held
