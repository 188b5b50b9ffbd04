"""Files of another format: refused on every rank, and nothing has changed; and the way that works.

One group of processes tries all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract import assert_same_bits
from kept_shards import FORMATS, Parameters, build, train
from ranks import in_ranks
from saving import load, save
from sharded import everything, like, whole
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as sd

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

MORE = {
    "torch's": {},
    "float32": {"state_dtype": torch.float32},
    "remainder": {"master": "remainder"},
    "remainder8": {"master": "remainder8"},
    "float32 master": {"master": "float32"},
}
# File, and optimizer that is to load it. The first three of a file have all that is asked for, as
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
# TMP
FORMS = ("full", "each full")


def _made(format: str, seed: int, steps: int = 2) -> tuple[Parameters, Any]:
    model = build("rows", seed)
    options = {**FORMATS, **MORE}[format]
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


def _all(rank: int, folder: str) -> None:
    for form in FORMS:
        for saved in dict.fromkeys(saved for saved, _ in PAIRS):
            save(*_made(saved, seed=0), Path(folder, form, saved), form)
        for saved, loading in PAIRS:
            if form.endswith("full") and loading == "torch's":
                # torch's class completes what it has, whatever the file says: nothing of ours runs.
                continue
            at = Path(folder, form, saved)
            for staged in (False, True):
                try:
                    _refused(
                        loading, lambda m, o, a=at, f=form, s=staged: load(m, o, a, f, s)
                    )
                except BaseException as error:
                    error.add_note(f"{form}: {saved} into {loading}, {staged=}")
                    raise


def test_a_file_of_another_format_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    # Catches codes and masters that are read into tensors of another type as numbers, the reverse,
    # and what one rank alone is told of.
    in_ranks(2, tmp_path, _all, str(tmp_path))
