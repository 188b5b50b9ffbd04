"""Files of another format: refused on every rank, and nothing has changed; and the way that works.

One group of processes tries all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from kept_shards import FORMATS, Parameters, build, train
from ranks import in_ranks
from saving import load, save
from sharded import everything, whole
from torch.distributed.checkpoint import CheckpointException

import fusedopt
from fusedopt.examples.signum import Signum

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

MORE = {
    "torch's": {},
    "float32": {"state_dtype": torch.float32},
    "remainder": {"master": "remainder"},
    "remainder8": {"master": "remainder8"},
    "float32 master": {"master": "float32"},
}
# File, and optimizer that is to load it: of the first ones a file has all that is asked for, as
# numbers of another meaning.
PAIRS = (
    ("int8", "torch's"),
    ("fp8", "float32"),
    ("remainder8", "torch's"),
    ("int8", "fp8"),
    ("fp8", "int8"),
    ("int8", "one of each"),
    ("remainder", "remainder8"),
    ("remainder8", "remainder"),
    ("float32 master", "remainder"),
    ("kahan", "float32"),
    ("torch's", "int8"),
    ("torch's", "remainder"),
    ("float32", "kahan"),
)
FORMS = ("sharded", "flat", "titan", "full", "each full")


def _made(format: str, seed: int, steps: int = 2) -> tuple[Parameters, Any]:
    model = build("rows", seed)
    options = {**FORMATS, **MORE}[format.rstrip()]
    kind = torch.optim.AdamW if format == "torch's" else fusedopt.AdamW
    own = {} if kind is torch.optim.AdamW else {"backend": "reference", **options}
    optimizer = kind(model.named_parameters(), lr=0.01, **own)
    train(model, optimizer, range(steps))
    return model, optimizer


def _refused(format: str, loading: Callable[[Parameters, Any], Any], words: str = "") -> None:
    """All processes get an error; later steps are as if nothing had been."""
    model, optimizer = _made(format, seed=3)
    before = everything(model, optimizer)
    error = ""
    try:
        loading(model, optimizer)
    except (Exception, CheckpointException) as raised:  # the latter is no Exception
        error = f"{type(raised).__name__}: {raised}"
    assert error and words in error, f"{words!r} is not in {error!r}"
    assert_same_bits(everything(model, optimizer), before)
    other, twin = _made(format, seed=3)
    for m, o in ((model, optimizer), (other, twin)):
        train(m, o, range(20, 22))
    assert_same_bits(everything(model, optimizer), everything(other, twin))


def _files(folder: Path) -> None:
    for form in FORMS:
        for saved in dict.fromkeys(saved for saved, _ in PAIRS):
            save(*_made(saved, seed=0), folder / form / saved, form)
        for saved, loading in PAIRS:
            if form.endswith("full") and loading == "torch's":
                # torch's class completes what it has, whatever the file says: nothing of ours runs.
                continue
            at = folder / form / saved
            # What the file lacks is noticed before anything is read.
            for staged in (False, True) if form == "sharded" else (False,):
                try:
                    _refused(loading, lambda m, o, a=at, f=form, s=staged: load(m, o, a, f, s))
                except BaseException as error:
                    error.add_note(f"{form}: {saved} into {loading}, {staged=}")
                    raise


def _forms_of_momentum(folder: Path) -> None:
    """The same of momentum: whole, from one rank, the others have nothing but what is missing."""

    def made(form: str, seed: int) -> tuple[Parameters, Any]:
        model = build("rows", seed)
        optimizer = fusedopt.SGD(
            model.named_parameters(), lr=0.01, momentum=0.9, momentum_form=form, backend="reference"
        )
        train(model, optimizer, range(2))
        return model, optimizer

    for saved, loading in (("ema", "torch"), ("torch", "ema")):
        save(*made(saved, 0), folder / saved, "full")
        model, optimizer = made(loading, 1)
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match="another momentum_form"):
            load(model, optimizer, folder / saved, "full")
        assert_same_bits(everything(model, optimizer), before, f"{saved} into {loading}")


def _own_rule(folder: Path) -> None:
    """A rule of a user's own, whose groups have nothing of torch's to look for."""

    def made(dtype: str | None, seed: int) -> tuple[Parameters, Any]:
        model = build("rows", seed)
        optimizer = Signum(
            model.named_parameters(), lr=0.01, state_dtype=dtype, backend="reference"
        )
        train(model, optimizer, range(2))
        return model, optimizer

    for form in ("sharded", "full"):
        for saved in (None, "int8"):
            at = folder / form / str(saved)
            source = made(saved, 0)
            save(*source, at, form)
            for loading in (None, "int8"):
                model, optimizer = made(loading, 1)
                before = everything(model, optimizer)
                if saved == loading:
                    load(model, optimizer, at, form)
                    before = everything(*source)
                else:
                    with pytest.raises((CheckpointException, ValueError), match="Missing|keeps"):
                        load(model, optimizer, at, form)
                assert_same_bits(everything(model, optimizer), before, f"{form}: {saved}")


def _misplaced() -> None:
    """Whole tensors where a parameter is a shard, codes without scales, scales of another shape."""
    model, optimizer = _made("remainder, int8", seed=0)
    for name, change, words in (
        ("exp_avg_scale", whole, "'exp_avg_scale' is no DTensor"),
        ("master", whole, "'master' is no DTensor"),
        ("exp_avg_scale", None, "there is no 'exp_avg_scale'"),
        ("exp_avg_sq_scale", lambda x: x[:, :1], "has shape (9, 1) where (9, 2) is wanted"),
        ("master", lambda x: x.double(), "has type torch.float64"),
    ):
        saved = optimizer.state_dict()
        if change is None:
            del saved["state"][0][name]
        else:
            saved["state"][0][name] = change(saved["state"][0][name])
        _refused("remainder, int8", lambda _, o, s=saved: o.load_state_dict(s), words)
    # With the options of one that keeps what torch does.
    saved = optimizer.state_dict()
    del saved["state"][0]["exp_avg_scale"], saved["state"][0]["exp_avg_sq_scale"]
    for group in saved["param_groups"]:
        group["state_dtype"] = group["master"] = None
    _refused("torch's ", lambda _, o: o.load_state_dict(saved), "there is no 'exp_avg_scale'")


def _through_a_plain_one(folder: Path) -> None:
    """From torch's file to any format and back, by a second optimizer of the same parameters."""
    save(*_made("torch's", seed=0), folder, "sharded")
    reference, theirs = _made("torch's", seed=0)
    for format in ("int8", "remainder8, fp8", "kahan"):
        model, optimizer = _made(format, seed=3)
        names = list(model.named_parameters())
        plain = fusedopt.AdamW(names, state_dtype=torch.float32, backend="reference")
        load(model, plain, folder, "sharded")
        optimizer.load_state_dict(fusedopt.export_state_dict(plain))
        for key, value in FORMATS[format].items():
            assert optimizer.param_groups[0][key] == value
        _near(model, optimizer, reference, theirs, format)
        plain = fusedopt.AdamW(names, state_dtype=torch.float32, backend="reference")
        plain.load_state_dict(fusedopt.export_state_dict(optimizer))
        save(model, plain, folder / format, "sharded")
        other, back = _made("torch's", seed=4)
        load(other, back, folder / format, "sharded")
        _near(other, back, reference, theirs, format)


def _near(model: Parameters, optimizer: Any, other: Parameters, theirs: Any, format: str) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
    if isinstance(optimizer, fusedopt.AdamW):
        states = fusedopt.export_state_dict(optimizer)["state"].values()
    else:
        states = optimizer.state.values()
    bound = 7e-3 if "fp8" in format else 8e-4
    for mine, expected in zip(states, theirs.state.values(), strict=True):
        assert mine["step"] == expected["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            found, value = (whole(x[name]).float() for x in (mine, expected))
            assert (found - value).square().sum() <= bound * value.square().sum(), name


def _all(rank: int, folder: str) -> None:
    _forms_of_momentum(Path(folder, "momentum"))
    _own_rule(Path(folder, "own"))
    _misplaced()
    _through_a_plain_one(Path(folder, "plain"))
    _files(Path(folder, "files"))


def test_a_file_of_another_format_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    # Catches codes and masters that are read into tensors of another type as numbers, the reverse,
    # what one rank alone is told of, and codes that torch casts where scales are missing.
    in_ranks(2, tmp_path, _all, str(tmp_path))
