"""What a user changes between steps: formats, groups, weights and states."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from contract import assert_unchanged, snapshot
from dyadic import Dyadic
from format_cases import assert_same_bits_of, bits_of, raw
from formats_by_hand import HALF_UNIT, assert_encoded, is_code, joined, read
from lockstep import TINY
from marks import both_backends
from torch import Tensor

import fusedopt

SHAPE = (2, 150)
STATES = {"None": None, "float32": torch.float32, "float16": torch.float16, "int8": "int8",
          "fp8": "fp8"}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "nearest": {}, "stochastic": {"rounding": "stochastic"}, "kahan": {"rounding": "kahan"},
    "remainder": {"master": "remainder"}, "remainder8": {"master": "remainder8"},
    "float32": {"master": "float32"},
}  # fmt: skip


def draw(seed: int, dtype: torch.dtype = torch.bfloat16, shape: Any = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def started(backend: str, cls: Any = Dyadic, steps: int = 2, **options: Any) -> Any:
    """An optimizer of one bfloat16 parameter after some steps."""
    p = torch.nn.Parameter(draw(0))
    optimizer = cls([p], lr=0.125, backend=backend, **options)
    for seed in range(steps):
        p.grad = draw(seed + 1)
        optimizer.step()
    return optimizer, p


def change(optimizer: Any, **options: Any) -> None:
    optimizer.param_groups[0].update({"rounding": None, "master": None, **options})


@pytest.mark.parametrize("old, new", [*itertools.permutations(STATES, 2)])
def test_states_take_the_new_format_and_keep_their_values(old: str, new: str) -> None:
    # Catches states that begin anew, codes read as numbers, and scales left over. The next step
    # halves both averages: a half of what was converted is stored without loss.
    optimizer, p = started("reference", state_dtype=STATES[old])
    before = {name: read(optimizer.state[p], name) for name in ("mean", "size")}
    optimizer.param_groups[0]["state_dtype"] = STATES[new]
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    for name, value in before.items():
        assert is_code(state[name]) == isinstance(STATES[new], str) == (f"{name}_scale" in state)
        # Neither the groups that it was encoded in nor those that it was decoded from.
        assert state[name].is_contiguous()
        assert state[name].untyped_storage().nbytes() == state[name].nbytes
        if is_code(state[name]):
            assert_encoded(state, name, value / 2)
            continue
        # None says nothing of floating types: a state that has one keeps it.
        had = STATES[old] if isinstance(STATES[old], torch.dtype) else torch.bfloat16
        dtype = STATES[new] or had
        assert state[name].dtype == dtype
        off = (read(state, name) - value / 2).abs()
        assert (off <= (HALF_UNIT[dtype] + 2.0**-23) * value.abs() / 2 + TINY[dtype]).all()


@both_backends
def test_there_and_back_loses_nothing_more(backend: str) -> None:
    # Catches codes that are not the nearest when they come back: what 8 bits hold, float32 does.
    optimizer, p = started(backend, state_dtype="int8")
    p.grad = torch.zeros_like(p)
    before = read(optimizer.state[p], "mean")
    for option in (torch.float32, "int8", torch.float32):
        optimizer.param_groups[0]["state_dtype"] = option
        optimizer.step()
        before = before / 2
        assert ((read(optimizer.state[p], "mean") - before).abs() <= 1e-6 * before.abs()).all()


@pytest.mark.parametrize("old, new", [*itertools.permutations(BESIDE, 2)])
def test_a_master_is_handed_on(old: str, new: str) -> None:
    # Catches a master that begins at the rounded parameter though more was known, and a parameter
    # that changes by the change. A step of no gradient, decay or momentum moves nothing.
    optimizer, p = started("reference", fusedopt.SGD, steps=3, **BESIDE[old])
    before, full = raw(p).clone(), joined(p, optimizer.state[p])
    change(optimizer, **BESIDE[new])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert torch.equal(raw(p), before)
    keys = {"kahan": {"compensation"}, "nearest": set(), "stochastic": set()}
    assert {"master", "compensation"} & set(state) == keys.get(new, {"master"})
    known = {"nearest": 0, "stochastic": 0, "kahan": 2.0**-16, "remainder8": 2.0**-15}
    # A tie moves to the next value, which the parameter is the rounded of.
    bound = known.get(new, 2.0**-23) * full.abs()
    if new in ("nearest", "stochastic"):
        return
    assert ((joined(p, state) - full).abs() <= bound).all()
    if old in ("kahan", "remainder", "remainder8", "float32"):
        assert (joined(p, state) != p.double()).any()


WIDE = [name for name in BESIDE if name not in ("nearest", "stochastic")]


@pytest.mark.parametrize("beside", WIDE)
@pytest.mark.parametrize("how", ["copy_", "data", "few"])
@both_backends
def test_weights_that_somebody_wrote_count(how: str, beside: str, backend: str) -> None:
    # Catches a master that puts the old weights back, and one that is lost where they stayed.
    optimizer, p = started(backend, fusedopt.SGD, steps=3, **BESIDE[beside])
    full = joined(p, optimizer.state[p])
    written = torch.ones(SHAPE, dtype=torch.bool)
    new = draw(9)
    if how == "few":
        written = torch.arange(150).expand(SHAPE) % 7 == 0
        new = torch.where(written, 0, p.detach())
    with torch.no_grad():
        if how == "data":
            p.data = new.clone()
        else:
            p.copy_(new)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(raw(p), raw(new))
    value = joined(p, optimizer.state[p])
    # A remainder of other weights is below a unit of the new ones, of subnormal ones where these
    # are 0.
    assert ((value - new.double()).abs() <= 2.0**-8 * new.double().abs() + 1e-40).all()
    near = 2.0**-16 if beside == "kahan" else 0
    assert ((value - full).abs()[~written] <= near * full.abs()[~written]).all()
    p.grad = torch.ones_like(p)
    optimizer.step()
    moved = joined(p, optimizer.state[p])
    assert ((moved - (value - 0.125)).abs() <= 2.0**-15 * value.abs() + 2.0**-18).all()


@pytest.mark.parametrize("beside", BESIDE)
@both_backends
def test_another_group_leaves_the_first_alone(beside: str, backend: str) -> None:
    # Catches random bits and thresholds that depend on who else is there: a parameter's number is
    # its place, and what comes later does not move it.
    with_it, p = started(backend, state_dtype="int8", **BESIDE[beside])
    without, q = started(backend, state_dtype="int8", **BESIDE[beside])
    late = torch.nn.Parameter(draw(5, torch.float32, (3,)))
    with_it.add_param_group({"params": [late], "rounding": None, "master": None, "lr": 0.5})
    late.grad = torch.ones_like(late)
    for seed in (7, 8):
        p.grad, q.grad = draw(seed), draw(seed)
        with_it.step()
        without.step()
    assert_same_bits_of(bits_of(with_it)[:1], bits_of(without))
    assert is_code(with_it.state[late]["mean"])


@both_backends
def test_clones_in_the_place_of_what_is_kept(backend: str) -> None:
    # Catches addresses that a plan remembers.
    options = {"state_dtype": "int8", "master": "remainder"}
    optimizer, p = started(backend, fusedopt.AdamW, **options)
    other, q = started(backend, fusedopt.AdamW, **options)
    for seed in (7, 8):
        old = optimizer.state[p]
        optimizer.state[p] = {name: value.clone() for name, value in old.items()}
        p.data = p.data.clone()
        p.grad, q.grad = draw(seed), draw(seed)
        optimizer.step()
        other.step()
        for value in old.values():
            if value.numel() == 1:
                continue
            value.fill_(1)
    assert_same_bits_of(optimizer, other)


def _scale(state: dict[str, Tensor]) -> str:
    del state["exp_avg_scale"]
    return "exp_avg_scale|scale"


def _short_scale(state: dict[str, Tensor]) -> str:
    state["exp_avg_sq_scale"] = state["exp_avg_sq_scale"][:1]
    return "exp_avg_sq_scale"


def _state(state: dict[str, Tensor]) -> str:
    del state["exp_avg_sq"]
    return "exp_avg_sq"


def _shape(state: dict[str, Tensor]) -> str:
    state["exp_avg"] = state["exp_avg"][:1]
    return "exp_avg"


def _step(state: dict[str, Tensor]) -> str:
    del state["step"]
    return "step"


def _master_shape(state: dict[str, Tensor]) -> str:
    state["master"] = state["master"][:1]
    return "master"


def _master(state: dict[str, Tensor]) -> str:
    del state["master"]
    return "master"


BROKEN = [_scale, _short_scale, _state, _shape, _step, _master_shape, _master]


@pytest.mark.parametrize("break_", BROKEN)
@both_backends
def test_what_is_partly_there_is_refused(break_: Any, backend: str) -> None:
    # Catches scales of nothing, and of another shape, that are read beyond their end.
    optimizer, p = started(backend, fusedopt.AdamW, state_dtype="int8", master="remainder8")
    whole = dict(optimizer.state[p])
    message = break_(optimizer.state[p])
    p.grad = draw(3)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises((ValueError, KeyError, RuntimeError), match=message):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.state[p] = whole
    optimizer.step()
    assert not torch.equal(p, before[0][0])


@pytest.mark.parametrize("beside", WIDE)
@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD])
def test_a_companion_that_was_taken_away_is_missed(cls: Any, beside: str) -> None:
    # Catches weights that silently go back to what was rounded; also after a copy.
    options = {} if cls is fusedopt.AdamW else {"momentum": 0.5}
    optimizer, p = started("reference", cls, **BESIDE[beside], **options)
    (key,) = {"master", "compensation"} & set(optimizer.state[p])
    for each in (optimizer, copy.deepcopy(optimizer)):
        (state,) = each.state.values()
        (q,) = each.state
        q.grad = torch.ones_like(q)
        kept = state.pop(key)
        before = snapshot(each)
        with pytest.raises(KeyError, match=key):
            each.step()
        assert_unchanged(each, before)
        state[key] = kept
        each.step()


@pytest.mark.parametrize("beside", WIDE)
def test_a_companion_begins_where_there_was_none(beside: str) -> None:
    # Catches the check above where the option was just switched on, or what is loaded is torch's.
    optimizer, p = started("reference", fusedopt.AdamW)
    plain = copy.deepcopy(fusedopt.export_state_dict(optimizer))
    optimizer.param_groups[0].update(BESIDE[beside])
    optimizer.step()
    (key,) = {"master", "compensation"} & set(optimizer.state[p])
    optimizer.load_state_dict(plain)
    assert key not in optimizer.state[p]
    optimizer.step()
    assert key in optimizer.state[p]
    optimizer.param_groups[0].update({"rounding": None, "master": None})
    optimizer.step()
    assert key not in optimizer.state[p]
    optimizer.param_groups[0].update(BESIDE[beside])
    optimizer.step()
    assert key in optimizer.state[p]
