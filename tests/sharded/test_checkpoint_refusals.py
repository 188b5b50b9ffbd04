"""Checkpoints that are cut or another optimizer's: refused on every rank, and nothing has changed.

One group of processes tries all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract import assert_same_bits
from ranks import in_ranks
from saving import load, save, write
from sharded import build, everything, like, train
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as sd

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
}


def _made(name: str, seed: int = 0, steps: int = 3) -> tuple[nn.Module, Any]:
    model = build("fsdp", seed)
    # Kernels would run in Triton's interpreter, for minutes.
    optimizer = getattr(fusedopt, name)(
        model.named_parameters(), lr=0.01, backend="reference", **OPTIONS[name]
    )
    train(model, optimizer, range(steps), "fsdp")
    return model, optimizer


def _refused(
    name: str, loading: Callable[[nn.Module, Any], None], words: str, fresh: bool = False
) -> None:
    """Both processes get an error with these words; later steps are as if nothing had been."""
    model, optimizer = _made(name, seed=3, steps=0 if fresh else 2)
    before = everything(model, optimizer)
    error = ""
    try:
        loading(model, optimizer)
    except (Exception, CheckpointException) as raised:  # the latter is no Exception
        error = f"{type(raised).__name__}: {raised}"
    assert words in error, f"{words!r} is not in {error!r}"
    after = everything(model, optimizer)
    if fresh:
        # torch has the states created, at zero, before anything is loaded.
        states = after.pop("states").values()
        assert not before.pop("states")
        assert not any(x.any() for state in states for x in state.values())
    assert_same_bits(after, before)
    other, twin = _made(name, seed=3, steps=0 if fresh else 2)
    for m, o in ((model, optimizer), (other, twin)):
        train(m, o, range(20, 22), "fsdp")
    assert_same_bits(everything(model, optimizer), everything(other, twin))


# Full states


def _lacking(entry: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"]["up.weight"].pop(entry)


def _reshaped(saved: dict[str, Any]) -> None:
    saved["state"]["up.weight"]["exp_avg"] = torch.ones(9, 5)


class Cut(NamedTuple):
    change: Callable[[dict[str, Any]], Any]
    words: str


CUTS = (
    Cut(_lacking("exp_avg_sq"), "'up.weight' = param_groups[0]['params'][3]"),
    Cut(_lacking("step"), "has no 'step'"),
    Cut(lambda saved: saved["param_groups"][0].pop("lr"), "has no 'lr'"),
)
# torch refuses these on the rank that reads the file; where it is one alone, the others wait.
CUTS_READ_BY_EACH = (
    Cut(_reshaped, "'exp_avg' in the checkpoint has shape (9, 5)"),
    Cut(lambda saved: saved["state"].pop("up.weight"), "'up.weight'"),
)
FOREIGN = (
    ("SGD", "AdamW"),
    ("RMSprop", "AdamW"),
    ("AdamW", "RMSprop"),
    ("AdamW", "SGD"),
    ("Adam", "AdamW"),
)


def _full(rank: int, folder: Path) -> None:
    for name in OPTIONS:
        model, optimizer = _made(name)
        save(model, optimizer, folder / name, "full")

    def cut(form: str, change: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
        def loading(model: nn.Module, optimizer: Any) -> None:
            state = torch.load(folder / "AdamW" / "whole.pt", weights_only=True)
            change(state["optimizer"])
            write(model, optimizer, state if form != "full" or rank == 0 else {}, form)

        return loading

    for form in ("full", "each full"):
        for change, words in CUTS + (CUTS_READ_BY_EACH if form == "each full" else ()):
            _refused("AdamW", cut(form, change), words)
        _refused("AdamW", cut(form, CUTS[0].change), CUTS[0].words, fresh=True)
        for saved, name in FOREIGN:

            def foreign(model: nn.Module, optimizer: Any, at=folder / saved, form=form) -> None:
                load(model, optimizer, at, form)

            _refused(name, foreign, "max_exp_avg_sq" if saved == "Adam" else "")


def _whole_tensors_on_shards() -> None:
    """Its shape is that of the parameter, and each process would read the first rows."""
    model, optimizer = _made("AdamW")
    saved = optimizer.state_dict()
    saved["state"] = {
        key: {n: x.full_tensor() if n != "step" else x for n, x in state.items()}
        for key, state in saved["state"].items()
    }
    _refused("AdamW", lambda _, o: o.load_state_dict(saved), "no DTensor, the parameter is")
    p = model.up.weight
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].full_tensor()
    p.grad = like(p, torch.ones_like(p.to_local()))
    with pytest.raises(RuntimeError, match="up.weight.*no DTensor"):
        optimizer.step()


# Files of shards


def _trimmed(at: Path) -> None:
    for file in at.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES: tuple[tuple[Callable[[Path], Any], str], ...] = (
    (_trimmed, "corrupted"),
    (lambda at: (at / "__1_0.distcp").unlink(), "__1_0.distcp"),
    (lambda at: (at / ".metadata").unlink(), ".metadata"),
)


def _shards(rank: int, folder: Path) -> None:
    forms = ("sharded", "flat", "titan")
    for form in forms:
        for name in OPTIONS:
            model, optimizer = _made(name)
            save(model, optimizer, folder / form / name, form)
    for number, (damage, words) in enumerate(FILES):
        for form in forms:
            at = folder / "damaged" / form / str(number)
            if rank == 0:
                shutil.copytree(folder / form / "AdamW", at)
                damage(at)
            dist.barrier()
            _refused("AdamW", lambda m, o, a=at, f=form: load(m, o, a, f, staged=True), words)
    for form in forms:
        for saved, name in FOREIGN:
            at = folder / form / saved
            # What the file lacks is noticed before it is read; not so what this optimizer lacks.
            for staged in (True, False) if saved != "Adam" else (True,):
                _refused(
                    name,
                    lambda m, o, a=at, f=form, s=staged: load(m, o, a, f, s),
                    "max_exp_avg_sq" if saved == "Adam" else "Missing key",
                )
    _entries(folder / "entries")


def _entries(folder: Path) -> None:
    """A file without one entry, and one with a moment of another shape."""
    model, optimizer = _made("AdamW")
    for number, words in enumerate(("optimizer.state.up.weight.step", "Size mismatch")):
        state = {"optimizer": dict(sd.get_optimizer_state_dict(model, optimizer))}
        entries = state["optimizer"]["state"]["up.weight"]
        if number:
            entries["exp_avg"] = torch.ones(9, 5)
        else:
            del entries["step"]
        dcp.save(state, checkpoint_id=folder / str(number))

        def loading(m: nn.Module, o: Any, at: Path = folder / str(number)) -> None:
            wanted = {"optimizer": sd.get_optimizer_state_dict(m, o)}
            dcp.load(wanted, checkpoint_id=at)

        _refused("AdamW", loading, words)


def _all(rank: int, folder: str) -> None:
    _full(rank, Path(folder, "full"))
    _whole_tensors_on_shards()
    _shards(rank, Path(folder, "shards"))


def test_what_is_cut_or_foreign_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    # Catches full states that torch completes by the loading optimizer's own in silence, values
    # that it writes into the live tensors before it is refused, what reaches one rank alone, and
    # the step by which it creates states.
    in_ranks(2, tmp_path, _all, str(tmp_path))
