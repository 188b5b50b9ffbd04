"""Checkpoints that lack one entry of what a format keeps: named, before anything changes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import saving
import torch
from contract import assert_unchanged, snapshot
from format_cases import assert_same_bits_of, bits_of, params_of
from torch import Tensor

import fusedopt
from fusedopt.checkpoint.complete import IncompleteState

SHAPES = ((2, 150), (5,))
FORMATS: dict[str, dict[str, Any]] = {
    "remainder": {"master": "remainder"},
    "remainder8": {"master": "remainder8"},
    "remainder8 by chance": {"master": "remainder8", "rounding": "stochastic"},
    "float32": {"master": "float32"},
    "kahan": {"rounding": "kahan"},
    "stochastic": {"rounding": "stochastic"},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "int8, remainder": {"state_dtype": "int8", "master": "remainder"},
    "int8, kahan": {"state_dtype": "int8", "rounding": "kahan"},
}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fusedopt.AdamW, {"lr": 0.05, "betas": (0.75, 0.9)}),
    "RMSprop": (fusedopt.RMSprop, {"lr": 0.05, "momentum": 0.5}),
    "momentum": (fusedopt.SGD, {"lr": 0.05, "momentum": 0.5}),
    "SGD": (fusedopt.SGD, {"lr": 0.05}),
}
TORCHS = {"AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop, "momentum": torch.optim.SGD}


def draw(seed: int, shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def give(optimizer: Any, seed: int, few: bool = False) -> None:
    for i, p in enumerate(params_of(optimizer)):
        p.grad = None if few and i else draw(100 * seed + i, p.shape)


def step(optimizer: Any, seed: int, few: bool = False) -> None:
    give(optimizer, seed, few)
    optimizer.step()


def new(rule: str, format: str | None, steps: int = 2) -> Any:
    cls, options = RULES[rule]
    formats = {} if format is None else FORMATS[format]
    params = [torch.nn.Parameter(draw(i, shape)) for i, shape in enumerate(SHAPES)]
    optimizer = cls(params, **options, **formats, backend="reference")
    for seed in range(1, steps + 1):
        step(optimizer, seed)
    return optimizer


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_refused(optimizer: Any, saved: Any, words: str, kind: Any = IncompleteState) -> None:
    before, bits = snapshot(optimizer), bits_of(optimizer)
    with pytest.raises(kind, match=words):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert_same_bits_of(bits, optimizer)


def entries(rule: str, format: str) -> list[str]:
    return list(new(rule, format, 1).state_dict()["state"].get(1, {}))


# Who has one entry alone has nothing when that is missing: a parameter that was never stepped. And
# SGD's buffer begins with the first step that has momentum, as torch's.
PARTS = [
    (rule, format, key)
    for rule in RULES
    for format in FORMATS
    for key in entries(rule, format)
    if len(entries(rule, format)) > 1 and (rule, key) != ("momentum", "momentum_buffer")
]


@pytest.mark.parametrize(("rule", "format", "key"), PARTS)
def test_an_entry_that_is_missing_is_named(rule: str, format: str, key: str) -> None:
    # Catches masters, compensations and counts that begin anew beside the others, in silence.
    saved = through_file(new(rule, format).state_dict())
    del saved["state"][1][key]
    kind = ValueError if key.endswith("_scale") else IncompleteState
    words = rf"\['params'\]\[1\].*no '{key}'"
    assert_refused(new(rule, format), saved, words, kind)
    # Also where the file's options come first.
    assert_refused(new(rule, None), saved, words, kind)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_codes_that_were_converted_are_refused(format: str) -> None:
    # Catches codes that a cast of all states has made numbers of: 127 instead of 1e-4.
    saved = through_file(new("AdamW", format).state_dict())
    state = saved["state"][1]
    state["exp_avg"] = state["exp_avg"].float()
    words = r"\['params'\]\[1\].*'exp_avg' .*float32.*must not be converted"
    for own in (format, None):
        assert_refused(new("AdamW", own), saved, words, ValueError)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_counts_that_all_states_lack_are_missed(format: str) -> None:
    # Catches thresholds of codes that begin anew: codes tell that there was a count.
    saved = through_file(new("momentum", format).state_dict())
    for state in saved["state"].values():
        del state["step"]
    assert_refused(new("momentum", format), saved, r"\['params'\]\[0\].*no 'step'")


@pytest.mark.parametrize("format", ["remainder", "float32", "kahan", "int8, remainder"])
def test_a_master_without_the_rest_is_refused(format: str) -> None:
    # Catches moments that begin at zero beside a master that goes on.
    saved = through_file(new("AdamW", format).state_dict())
    (key,) = {"master", "compensation"} & set(saved["state"][1])
    saved["state"][1] = {key: saved["state"][1][key]}
    assert_refused(new("AdamW", format), saved, r"\['params'\]\[1\].*no 'step'")


MASTERS = ("remainder", "remainder8", "float32")


@pytest.mark.parametrize("named", MASTERS)
@pytest.mark.parametrize("found", MASTERS)
def test_a_master_is_of_the_type_that_its_format_names(named: str, found: str) -> None:
    # Catches patterns that are read by another code than they were written in.
    saved, other = (through_file(new("AdamW", x).state_dict()) for x in (named, found))
    saved["state"][1]["master"] = other["state"][1]["master"]
    if named == found:
        new("AdamW", named).load_state_dict(saved)
    else:
        words = r"\['params'\]\[1\].*'master' of the checkpoint has type"
        assert_refused(new("AdamW", named), saved, words, ValueError)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", TORCHS)
def test_a_file_that_never_had_it_loads(rule: str, format: str) -> None:
    # Catches the errors above where nothing was lost: torch's files, and those of other formats.
    cls, options = TORCHS[rule], RULES[rule][1]
    theirs = cls([torch.nn.Parameter(draw(i, s)) for i, s in enumerate(SHAPES)], **options)
    step(theirs, 1)
    files = [theirs.state_dict(), *(new(rule, f).state_dict() for f in (None, "kahan", "int8"))]
    for saved in files:
        ours = new(rule, format)
        ours.load_state_dict(through_file(saved))
        step(ours, 5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("few", [True, False], ids=["some stepped", "none stepped"])
def test_what_has_not_begun_yet_is_saved_as_it_would_begin(
    rule: str, format: str, few: bool
) -> None:
    # Catches a file that its own optimizer refuses, or a float32 master that is saved as zeros,
    # where torch's states were loaded, or the option was set, since a parameter's last step.
    ours = new(rule, None)
    ours.param_groups[0].update(FORMATS[format])
    if few:
        step(ours, 5, few=True)
    keys = [list(state) for state in ours.state.values()]
    back = new(rule, format)
    for p, q in zip(params_of(back), params_of(ours), strict=True):
        p.data.copy_(q)
    saved = through_file(ours.state_dict())
    back.load_state_dict(saved)
    if format == "float32" and rule != "SGD":
        master, p = saved["state"][1]["master"], params_of(ours)[1]
        assert torch.equal(master, p.float())
    assert [list(state) for state in ours.state.values()] == keys
    for state in back.state.values():
        # Of what SGD keeps without momentum, nothing tells that it was ever stepped.
        assert set(state) == set(entries(rule, format)) or (rule == "SGD" and not state)
    for seed in (6, 7):
        step(ours, seed)
        step(back, seed)
    assert_same_bits_of(ours, back)


LOST = [(r, f, k) for r, f, k in PARTS if k in ("master", "compensation") or r == "momentum"]


@pytest.mark.parametrize(("rule", "format", "key"), LOST)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_what_was_taken_away_is_missed(rule: str, format: str, key: str, copied: bool) -> None:
    # Catches random bits that begin anew, and a file that hides the loss of a master.
    optimizer = new(rule, format)
    if copied:
        optimizer = copy.deepcopy(optimizer)
    del optimizer.state[params_of(optimizer)[1]][key]
    words = rf"\['params'\]\[1\].*no '{key}'"
    give(optimizer, 5)
    before = snapshot(optimizer)
    with pytest.raises((KeyError, ValueError), match=words):
        optimizer.step()
    with pytest.raises((KeyError, ValueError), match=words):
        optimizer.state_dict()
    assert_unchanged(optimizer, before)


FLAT = [("remainder", "master"), ("kahan", "compensation"), ("int8", "exp_avg_scale")]


@pytest.mark.parametrize(("format", "key"), FLAT)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_gap_in_a_flattened_state_is_named(format: str, key: str) -> None:
    # Catches torch's empty dictionary in the place of a tensor, which is passed over, and the one
    # that is left behind where the file's options do not ask for it.
    from torch.distributed.checkpoint import state_dict as sd

    form = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(3, 2).bfloat16()
    formats = (FORMATS[format], {})
    made = [fusedopt.AdamW(model.parameters(), backend="reference", **own) for own in formats]
    for optimizer in made:
        step(optimizer, 1)
    ours, plain = made
    saved = sd.get_optimizer_state_dict(model, ours, options=form)
    gone = {name: value for name, value in saved.items() if name != f"state.bias.{key}"}
    before = snapshot(ours)
    with pytest.raises(ValueError, match=rf"\['params'\]\[1\].*no '{key}'"):
        sd.set_optimizer_state_dict(model, ours, gone, options=form)
    assert_unchanged(ours, before)
    sd.set_optimizer_state_dict(model, ours, saved, options=form)
    assert_unchanged(ours, before)
    saved = sd.get_optimizer_state_dict(model, plain, options=form)
    sd.set_optimizer_state_dict(model, ours, saved, options=form)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in ours.state.values())


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("format", [*FORMATS, "int8, remainder8"])
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_flattened_state_is_whole_for_an_optimizer_without_its_entries(
    rule: str, format: str, steps: int
) -> None:
    # Catches torch taking out what the loading optimizer has by now: masters, compensations and
    # step counts are left out in silence and begin anew, codes come without their scales.
    from torch.distributed.checkpoint import state_dict as sd

    form = sd.StateDictOptions(flatten_optimizer_state_dict=True)
    own = FORMATS.get(format, {"state_dtype": "int8", "master": "remainder8"})
    cls, options = RULES[rule]
    models = [torch.nn.Linear(150, 2).bfloat16() for _ in range(2)]
    first = cls(models[0].parameters(), **options, **own, backend="reference")
    second = cls(models[1].parameters(), **options, backend="reference")
    for optimizer, count in ((first, 3), (second, steps)):
        for seed in range(1, count + 1):
            step(optimizer, seed)
        optimizer.zero_grad()
    saved = through_file(sd.get_optimizer_state_dict(models[0], first, options=form))
    models[1].load_state_dict(models[0].state_dict())
    sd.set_optimizer_state_dict(models[1], second, saved, options=form)
    for seed in (4, 5):
        step(first, seed)
        step(second, seed)
    assert_same_bits_of(bits_of(first), second)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_master_that_another_loader_leaves_out_is_missed(tmp_path: Path) -> None:
    # Catches torchtitan's container, which hands over the entries that live states have, and so no
    # master where torch's states were loaded since the last step: it would begin anew in silence.
    models = [torch.nn.Linear(3, 2).bfloat16() for _ in range(2)]
    first, second = (
        fusedopt.AdamW(list(model.named_parameters()), master="remainder", backend="reference")
        for model in models
    )
    theirs = torch.optim.AdamW(models[1].parameters())
    for optimizer in (first, theirs):
        step(optimizer, 1)
        optimizer.zero_grad()
    second.load_state_dict(theirs.state_dict())
    saving.save(models[0], first, tmp_path / "saved", "titan")
    with pytest.raises(ValueError, match=r"'weight'.*its state has no 'master'"):
        saving.load(models[1], second, tmp_path / "saved", "titan", staged=True)
