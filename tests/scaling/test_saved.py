"""States of schedules and warm-ups that no run has saved, and numbers of which no step ends."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs

from fusedopt import scaling
from fusedopt.scaling import BatchSizeWarmup

MILESTONES = {0: 8, 24: 16, 100: 64}


def make():
    return torch.optim.AdamW([Parameter(torch.zeros(3))], lr=0.1)


def ending(optimizer):
    """A scheduler that breaks off what would not end."""

    def factor(t: int) -> float:
        assert t < 1000, "the schedule does not end"
        return 0.9**t

    return lrs.LambdaLR(optimizer, factor)


def schedule_after(steps: int, factory=ending):
    schedule = scaling.samples_schedule(factory, make(), 8)
    for _ in range(steps):
        schedule.step()
    return schedule


def warmup_after(steps: int, rule: str = "linear", **options) -> BatchSizeWarmup:
    warmup = BatchSizeWarmup(make(), MILESTONES, rule, **options)
    for _ in range(steps):
        warmup.step()
    return warmup


def refuses(thing, state, message: str) -> None:
    """Check that a state is refused, and that what it was loaded into goes on as if it was not."""
    group = thing.optimizer.param_groups[0]
    before = copy.deepcopy((thing.state_dict(), group["lr"]))
    with pytest.raises(ValueError, match=message):
        thing.load_state_dict(state)
    assert (thing.state_dict(), group["lr"]) == before
    thing.step()


WRONG = [
    ("samples", math.nan, "must be at least 0 and finite, got nan"),
    ("samples", math.inf, "must be at least 0 and finite, got inf"),
    ("samples", -5, "must be at least 0 and finite, got -5"),
    ("samples", "a", "must be a number, got 'a'"),
    ("batch_size", 0, "must be positive and finite, got 0"),
    ("batch_size", -8, "must be positive and finite, got -8"),
    ("batch_size", math.nan, "must be positive and finite, got nan"),
    ("batch_size", None, "must be a number, got None"),
    ("from_batch", 0, "must be positive and finite, got 0"),
    ("from_batch", -1, "must be positive and finite, got -1"),
    ("from_batch", math.nan, "must be positive and finite, got nan"),
    ("base_lrs", 0.1, "must be a list of numbers, got 0.1"),
    ("base_lrs", [math.nan], "must be finite, got nan"),
    ("means", ["a"], "must be a number, got 'a'"),
    ("means", [math.inf], "must be finite, got inf"),
    ("curve", None, "must be a dictionary of state_dict"),
    ("curve", {}, "the state has no 'index'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_schedule_refuses_numbers_that_cannot_be(key, value, message) -> None:
    # Catches a next step() that does not end, and a part of the state taken over before the error.
    state = schedule_after(3).state_dict() | {key: value}
    name = "" if key == "curve" else rf"state_dict\['{key}'\].* "
    refuses(schedule_after(1), state, name + message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("index", -1, "must be an integer, at least 0, got -1"),
        ("index", 1.5, "must be an integer, at least 0, got 1.5"),
        ("scheduler", 3, "must be a dictionary, got 3"),
        ("groups", [], "must be a list of 1 groups"),
        ("groups", [3], r"\[0\] must be a dictionary, got 3"),
        ("groups", [{"lr": math.nan}], r"\[0\]\['lr'\] must be finite, got nan"),
    ],
)
def test_schedule_refuses_a_curve_that_cannot_be(key, value, message) -> None:
    # Catches the same one level below.
    state = schedule_after(3).state_dict()
    state["curve"] = state["curve"] | {key: value}
    refuses(schedule_after(1), state, rf"state_dict\['{key}'\].*{message}")


def sequence(o):
    return lrs.SequentialLR(o, [lrs.ConstantLR(o), ending(o)], milestones=[2])


def test_schedule_refuses_the_state_of_another_scheduler() -> None:
    # Catches a KeyError of the scheduler's, and what it has taken over before.
    state = schedule_after(3).state_dict()
    refuses(schedule_after(1, sequence), state, "is no state of SequentialLR, which says KeyError")
    state = schedule_after(3, sequence).state_dict()
    state["curve"]["scheduler"]["_schedulers"] = [3, 3]
    refuses(schedule_after(1, sequence), state, "is no state of SequentialLR, which says ")


@pytest.mark.parametrize("key", ["samples", "batch_size", "from_batch", "base_lrs", "means"])
def test_schedule_names_what_is_missing(key) -> None:
    # Catches a bare KeyError.
    state = schedule_after(3).state_dict()
    del state[key]
    refuses(schedule_after(1), state, f"the state has no '{key}', but ")


@pytest.mark.parametrize("make_thing", [schedule_after, warmup_after])
def test_what_is_no_state_at_all(make_thing) -> None:
    # Catches the state of something else, as a run saves several side by side.
    other = warmup_after(1) if make_thing is schedule_after else schedule_after(1)
    for state in (None, [], {}, other.state_dict(), ending(make()).state_dict()):
        refuses(make_thing(1), state, "the state (has no|must be a dictionary)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("from_batch", math.nan),
        ("from_batch", 0),
        ("samples", math.nan),
        ("samples", math.inf),
        ("samples", -5),
        ("samples", 1e30),
        ("batch_size", math.nan),
        ("batch_size", -8),
    ],
)
def test_schedule_refuses_attributes_that_cannot_be(name, value) -> None:
    # Catches a step that does not end.
    schedule = schedule_after(1)
    before = schedule.optimizer.param_groups[0]["lr"]
    setattr(schedule, name, value)
    for size in (None, 8):
        with pytest.raises(ValueError, match=name if value != 1e30 else "after 1e[+]30 samples"):
            schedule.step(size)
    assert schedule.optimizer.param_groups[0]["lr"] == before


@pytest.mark.parametrize("sizes", [(1e-9, 8), (1e-320, 8), (8, 1e300)])
def test_batch_of_too_many_steps_of_the_scheduler(sizes) -> None:
    # Catches a constructor, and a step, that take hours.
    optimizer = make()
    message = "is more than 1000000 steps of the scheduler, which are of from_batch = "
    with pytest.raises(ValueError, match=message):
        scaling.samples_schedule(ending, optimizer, *sizes)
    assert "initial_lr" not in optimizer.param_groups[0]
    schedule = scaling.samples_schedule(ending, optimizer, sizes[0])
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=message):
        schedule.step(sizes[1])
    assert schedule.state_dict() == before


# Warm-ups


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("samples", math.nan, r"\['samples'\] must be at least 0 and finite, got nan"),
        ("samples", -1, r"\['samples'\] must be at least 0 and finite, got -1"),
        ("samples", "a", r"\['samples'\] must be a number, got 'a'"),
        ("batch_size", 32, r"\['batch_size'\] is 32, and after 40 samples it is 16"),
        ("batch_size", 8, r"\['batch_size'\] is 8, and after 40 samples it is 16"),
        ("batch_size", "a", r"\['batch_size'\] must be a number, got 'a'"),
        ("milestones", None, r"\['milestones'\]: milestones must be a dictionary, got None"),
        ("milestones", {"0": 8}, r"\['milestones'\]: milestones must start at 0"),
        ("milestones", {0: 8, "24": 16}, r"\['milestones'\]: a key of milestones must be a number"),
        ("rule", "sqrt", r"\['rule'\] is 'sqrt', and here it is 'linear'"),
        ("beta_form", "power", r"\['beta_form'\] is 'power', and here it is None"),
    ],
)
def test_warm_up_refuses_what_cannot_be(key, value, message) -> None:
    # Catches a batch size that no milestone has, from which the next one is rescaled.
    refuses(warmup_after(1), warmup_after(4).state_dict() | {key: value}, message)


@pytest.mark.parametrize("key", ["samples", "batch_size", "milestones"])
def test_warm_up_names_what_is_missing(key) -> None:
    # Catches a bare KeyError.
    state = warmup_after(4).state_dict()
    del state[key]
    refuses(warmup_after(1), state, f"the state has no '{key}', but ")


def test_warm_up_under_another_rule() -> None:
    # Catches a second half of a run that is rescaled otherwise than the first.
    state = warmup_after(4, "sqrt", beta_form="power").state_dict()
    refuses(warmup_after(1), state, r"\['rule'\] is 'sqrt'")
    refuses(warmup_after(1, "sqrt", beta_form="linear"), state, r"\['beta_form'\] is 'power'")
    again = warmup_after(1, "sqrt", beta_form="power")
    again.load_state_dict(state)
    assert (again.samples, again.batch_size) == (40, 16)


def test_states_that_were_saved_before_the_rule_was() -> None:
    # Catches a key that is asked for and that older states do not have.
    warmup = warmup_after(1)
    warmup.load_state_dict({"samples": 40, "batch_size": 16, "milestones": dict(MILESTONES)})
    assert (warmup.samples, warmup.batch_size) == (40, 16)


@pytest.mark.parametrize("milestones", [None, [(0, 8)], {0: 8, "a": 16}])
def test_milestones_that_are_none(milestones) -> None:
    # Catches a comparison of str and int that names no argument.
    with pytest.raises(TypeError, match="milestones must be a"):
        BatchSizeWarmup(make(), milestones, "linear")


def test_samples_that_cannot_be() -> None:
    # Catches a search for nan among the milestones, which finds the last batch size.
    warmup = warmup_after(1)
    warmup.samples = math.nan
    with pytest.raises(ValueError, match="samples must be at least 0"):
        warmup.step()
    assert warmup.batch_size == 8
