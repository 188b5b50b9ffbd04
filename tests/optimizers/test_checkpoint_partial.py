"""Checkpoints that lack a part, belong to another optimizer, or come from elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same_bits, assert_unchanged, snapshot

import fusedopt


def _stepped(cls: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = cls(
        [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))], **options
    )
    for _ in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    return optimizer


RICH: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
]
PARTS = [
    (name, options, key)
    for name, options in RICH
    for key in _stepped(getattr(torch.optim, name), **options).state_dict()["state"][0]
]


@pytest.mark.parametrize(("name", "options", "key"), PARTS)
def test_a_part_that_is_missing_is_named_before_anything_changes(
    name: str, options: dict[str, Any], key: str
) -> None:
    # Catches a step count or a moment that begins at zero beside the others.
    saved = copy.deepcopy(_stepped(getattr(torch.optim, name), **options).state_dict())
    del saved["state"][1][key]
    ours = _stepped(getattr(fusedopt, name))
    before = snapshot(ours)
    for kind in (KeyError, ValueError):
        with pytest.raises(kind, match=rf"\['params'\]\[1\].*no '{key}'"):
            ours.load_state_dict(saved)
        assert_unchanged(ours, before)


# What an option asks for may have been switched on since, and then begins at zero.
BY_OPTION = ("max_exp_avg_sq", "momentum_buffer", "grad_avg")


@pytest.mark.parametrize(
    ("name", "options", "key"), [part for part in PARTS if part[2] not in BY_OPTION]
)
def test_a_part_that_was_removed_is_an_error_at_the_step(
    name: str, options: dict[str, Any], key: str
) -> None:
    ours = _stepped(getattr(fusedopt, name), **options)
    p = ours.param_groups[0]["params"][1]
    del ours.state[p][key]
    before = snapshot(ours)
    with pytest.raises(KeyError, match=rf"\['params'\]\[1\].*no '{key}'"):
        ours.step()
    assert_unchanged(ours, before)
    del ours.state[p]
    ours.step()
    assert ours.state[p]["step"] == 1


@pytest.mark.parametrize("source", ["SGD", "RMSprop", "Adam"])
@pytest.mark.parametrize("target", ["SGD", "RMSprop", "Adam"])
def test_the_state_of_another_algorithm_is_refused(source: str, target: str) -> None:
    options = {} if source == "Adam" else {"momentum": 0.9}
    saved = _stepped(getattr(torch.optim, source), **options).state_dict()
    ours = _stepped(getattr(fusedopt, target))
    before = snapshot(ours)
    if source == target:
        ours.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match="checkpoint has no"):
        ours.load_state_dict(saved)
    assert_unchanged(ours, before)


@pytest.mark.parametrize("step", ["3", torch.ones(2), [3]])
def test_a_step_that_is_no_number_is_refused(step: Any) -> None:
    saved = copy.deepcopy(_stepped(torch.optim.Adam).state_dict())
    saved["state"][0]["step"] = step
    with pytest.raises(ValueError, match="'step' is no number"):
        _stepped(fusedopt.Adam).load_state_dict(saved)


def test_a_moment_of_another_shape_is_refused() -> None:
    saved = copy.deepcopy(_stepped(torch.optim.Adam).state_dict())
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    with pytest.raises(ValueError, match="shape"):
        _stepped(fusedopt.Adam).load_state_dict(saved)


FLAT = [("Adam", {}, "step"), ("RMSprop", {}, "square_avg"), ("SGD", {"momentum": 0.9}, None)]


@pytest.mark.parametrize("whole", [False, True], ids=["entry", "parameter"])
@pytest.mark.parametrize(("name", "options", "key"), FLAT)
def test_a_gap_in_a_flattened_state_is_named(
    name: str, options: dict[str, Any], key: str | None, whole: bool
) -> None:
    # Catches torch's empty dictionary for what is missing taken for a value, or for a fresh start.
    from torch.distributed.checkpoint import state_dict as sd

    key = key or "momentum_buffer"
    form = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(3, 2)
    ours = getattr(fusedopt, name)(model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ours.step()
    saved = sd.get_optimizer_state_dict(model, ours, options=form)
    prefix = f"state.bias.{'' if whole else key}"
    gone = {name: value for name, value in saved.items() if not name.startswith(prefix)}
    before = snapshot(ours)
    first = "step" if whole and name != "SGD" else key
    with pytest.raises(ValueError, match=rf"has no '{first}'"):
        sd.set_optimizer_state_dict(model, ours, gone, options=form)
    assert_unchanged(ours, before)
    sd.set_optimizer_state_dict(model, ours, saved, options=form)


def test_a_flattened_state_need_not_have_what_its_options_do_not_ask_for() -> None:
    # Catches a refusal of it, and the empty dictionary that stays where a buffer belongs.
    from torch.distributed.checkpoint import state_dict as sd

    form = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(3, 2)
    made = [fusedopt.SGD(model.parameters(), momentum=momentum) for momentum in (0.0, 0.9)]
    for optimizer in made:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    saved = sd.get_optimizer_state_dict(model, made[0], options=form)
    sd.set_optimizer_state_dict(model, made[1], saved, options=form)
    assert made[1].param_groups[0]["momentum"] == 0
    assert not any(made[1].state.values())
    made[1].step()


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_step_in_the_group_counts_for_all_of_its_parameters(kind: Any) -> None:
    saved = copy.deepcopy(_stepped(torch.optim.Adam).state_dict())
    for state in saved["state"].values():
        del state["step"]
    saved["param_groups"][0] |= {"step": kind(3), "bias_correction": True}
    ours, theirs = _stepped(fusedopt.Adam), _stepped(torch.optim.Adam)
    ours.load_state_dict(saved)
    assert "step" not in ours.param_groups[0]
    assert ours.param_groups[0]["bias_correction"] == "adam"
    assert [s["step"].item() for s in ours.state.values()] == [3, 3]
    for optimizer in (ours, theirs):
        optimizer.step()
    mine, others = (o.param_groups[0]["params"] for o in (ours, theirs))
    torch.testing.assert_close(mine, others)


def test_a_parameter_group_is_a_dictionary() -> None:
    with pytest.raises(TypeError, match="dict"):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(2))]).add_param_group([])  # type: ignore


@pytest.mark.parametrize("cls", [fusedopt.BatchDecoupledAdam, fusedopt.BatchDecoupledRMSprop])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_states_are_made_without_statistics(cls: Any, lr: Any) -> None:
    # Catches an initialising step that asks for squares and leaves lr at 0.
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    before = copy.deepcopy(list(model.parameters()))
    clip = fusedopt.GlobalNorm(1.0)
    ours = cls(model.parameters(), lr=lr, statistics=fusedopt.PerSampleSquares(model), clip=clip)
    saved = get_optimizer_state_dict(model, ours)
    assert ours.param_groups[0]["lr"] == lr
    assert_same_bits(list(model.parameters()), before)
    assert clip.last is None
    assert all(s["step"] == 0 for s in saved["state"].values())
    model(torch.randn(4, 3)).square().mean().backward()
    ours.step()
    assert all(s["step"] == 1 for s in ours.state.values())


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("way", ["from torch", "to torch", "to ours"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.5, "momentum_form": "torch"}),
        ("RMSprop", {"denominator": "variance"}),
        ("Adam", {"bias_correction": "running_mean"}),
        ("AdamW", {}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_hold_torchs_entries(
    tmp_path: Path, name: str, options: dict[str, Any], way: str, clipped: bool, flat: bool
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    form = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = {key: value for key, value in options.items() if key == "momentum"}
    clip = {"clip": fusedopt.GlobalNorm(1.0)} if clipped else {}
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    made = []
    for model, is_torchs in zip(models, (way == "from torch", way == "to torch"), strict=True):
        cls = getattr(torch.optim if is_torchs else fusedopt, name)
        own = plain if is_torchs else {**options, **(clip if way != "to ours" or not made else {})}
        made.append(cls(model.parameters(), lr=0.5 if not made else 0.1, **own))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        made[-1].step()
    first = sd.get_optimizer_state_dict(models[0], made[0], options=form)
    dcp.save({"o": first}, checkpoint_id=tmp_path, no_dist=True)
    state = {"o": sd.get_optimizer_state_dict(models[1], made[1], options=form)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    sd.set_optimizer_state_dict(models[1], made[1], state["o"], options=form)
    assert made[1].param_groups[0]["lr"] == 0.5
    if way != "to torch":
        assert all(made[1].param_groups[0][key] == value for key, value in options.items())
        assert (made[1].clip is not None) == (clipped and way == "from torch")


# What a class of ours has beside torch's, with what may go on from its file.
RICHER = [
    ("BatchDecoupledAdam", "AdamW"),
    ("BatchDecoupledAdam", "Adam"),
    ("BatchDecoupledAdam", "AdamC"),
    ("BatchDecoupledRMSprop", "RMSprop"),
    ("AdamC", "AdamW"),
]


@pytest.mark.parametrize(("richer", "name"), RICHER)
def test_options_of_another_class_do_not_keep_its_file_out(richer: str, name: str) -> None:
    # Catches a refusal of what torch's class of the same states takes, and containers that stay in
    # the groups, where scaling would take the optimizer for one with a virtual batch.
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    own: dict[str, Any] = {}
    if richer.startswith("Batch"):
        own = {"statistics": fusedopt.GradSampleSquares(), "virtual_batch_size": 2}
        for p in params:
            p.grad_sample = torch.arange(24.0).reshape(4, 3, 2)
    first = getattr(fusedopt, richer)(params, lr=0.25, **own)
    for p in params:
        p.grad = torch.full((3, 2), 0.5)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    second = getattr(fusedopt, name)(params)
    second.load_state_dict(saved)
    group = second.param_groups[0]
    assert group["lr"] == 0.25
    assert group.keys() == getattr(fusedopt, name)(params).param_groups[0].keys() | (
        {"decoupled_weight_decay"} & group.keys()
    )
    for p in params:
        for key, value in first.state[p].items():
            assert torch.equal(second.state[p][key], value)
    second.step()
