"""Processes that are killed, late, or have other gradients than the rest.

Every run has a limit: none waits for a process that is gone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract import assert_same_bits
from ranks import PATIENCE, in_ranks
from saving import load, save
from sharded import build, everything, give, train
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import state_dict as sd
from torch.multiprocessing.spawn import ProcessExitedException

import fusedopt
from fusedopt.step.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LAST = 6
LIMIT = 120.0
CLASSES: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.3},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "SGD": {"momentum": 0.9, "dampening": 0.3},
}


def _made(name: str = "AdamW", whose: Any = fusedopt) -> tuple[nn.Module, Any]:
    model = build("fsdp")
    # Kernels would run in Triton's interpreter, for minutes.
    options = CLASSES[name] | ({"backend": "reference"} if whose is fusedopt else {})
    return model, getattr(whose, name)(model.named_parameters(), lr=0.02, **options)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Killed, and resumed


def _die_in_step() -> None:
    """Shards and counts of this process have moved, those of the others perhaps."""
    launch = Plan.launch

    def half(self: Any, request: Any) -> None:
        launch(self, request)
        _kill()

    Plan.launch = half  # type: ignore[method-assign]


def _die_in_save() -> None:
    """Some tensors are in the file, and the others not."""
    write, written = filesystem._write_item, []

    def some(*arguments: Any, **named: Any) -> Any:
        written.append(1)
        return _kill() if len(written) > 3 else write(*arguments, **named)

    filesystem._write_item = some


def _train_and_die(rank: int, folder: str, where: str) -> None:
    """Save after steps 2 and 4; at the latter, or in the step after it, process 1 is killed."""
    model, optimizer = _made()
    train(model, optimizer, range(2), "fsdp", data=True)
    save(model, optimizer, Path(folder, "2"), "sharded")
    train(model, optimizer, range(2, 4), "fsdp", data=True)
    if where == "save" and rank == 1:
        _die_in_save()
    _save_in_background(model, optimizer, Path(folder, "4"))
    if where == "step":
        train(model, optimizer, range(4, 5), "fsdp", data=True)
        if rank == 1:
            _die_in_step()
    train(model, optimizer, range(5, LAST), "fsdp", data=True)
    time.sleep(LIMIT)


def _save_in_background(model: nn.Module, optimizer: Any, folder: Path) -> Any:
    of_model, of_optimizer = sd.get_state_dict(model, optimizer)
    # Of its own: collectives of the next steps would come between.
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return dcp.async_save(
        {"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, process_group=group
    )


def _last_whole(folder: Path) -> int:
    # What is written last, once all processes have written theirs.
    return max(int(at.parent.name) for at in folder.glob("*/.metadata"))


def _resume(folders: Iterable[str]) -> None:
    model, optimizer = _made()
    train(model, optimizer, range(LAST), "fsdp", data=True)
    for folder in folders:
        found = _last_whole(Path(folder))
        twin, other = _made()
        load(twin, other, Path(folder, str(found)), "sharded")
        train(twin, other, range(found, LAST), "fsdp", data=True)
        assert_same_bits(everything(twin, other), everything(model, optimizer), folder)


# Alive, and different


def _background(folder: Path) -> None:
    """Steps between the call and its end are not in the file."""
    model, optimizer = _made()
    train(model, optimizer, range(2), "fsdp")
    before = everything(model, optimizer)
    pending = _save_in_background(model, optimizer, folder)
    train(model, optimizer, range(2, 5), "fsdp")
    pending.result()
    twin, other = _made()
    load(twin, other, folder, "sharded")
    assert_same_bits(everything(twin, other), before)
    train(twin, other, range(2, 5), "fsdp")
    assert_same_bits(everything(twin, other), everything(model, optimizer))


def _late(rank: int, folder: Path) -> None:
    model, optimizer = _made()
    twin, other = _made()
    for step in range(3):
        time.sleep(1.0 if rank == step % 2 else 0.0)
        train(model, optimizer, [step], "fsdp", data=True)
        train(twin, other, [step], "fsdp", data=True)
    if rank == 1:
        time.sleep(1.0)
    save(model, optimizer, folder, "flat")
    load(twin, other, folder, "flat")
    assert_same_bits(everything(twin, other), everything(model, optimizer))


def _own_gradients(rank: int, fault: str) -> None:
    """Process 1 lacks a gradient, or has nan in it: it alone is touched, as by torch's class."""
    for name in CLASSES:
        pairs = [_made(name), _made(name, torch.optim)]
        for model, optimizer in pairs:
            for step in range(4):
                for _ in give(model, step):
                    weight = model.up.weight
                    if step == 2 and rank == 1 and fault == "none":
                        weight.grad = None
                    elif step == 2 and rank == 1:
                        weight.grad.to_local().fill_(float("nan"))
                optimizer.step()
                optimizer.zero_grad()
        ours, theirs = (everything(*pair) for pair in pairs)
        for key in ("parameters", "states"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-5, atol=2e-6, equal_nan=True)
        broken = not ours["parameters"].pop("up.weight").isfinite().all()
        assert broken == (rank == 1 and fault == "nan")
        assert all(p.isfinite().all() for p in ours["parameters"].values())


def _lives(rank: int, folder: str, killed: list[str]) -> None:
    _resume(killed)
    _background(Path(folder, "background"))
    dist.barrier()
    _late(rank, Path(folder, "late"))
    for fault in ("none", "nan"):
        _own_gradients(rank, fault)


def test_faults(tmp_path: Path) -> None:
    # Catches state that is not in the file, a file that is taken for whole, tensors of a save in
    # the background that later steps write into, and a step that waits for another process.
    killed = []
    for where in ("step", "save"):
        killed.append(str(tmp_path / where))
        Path(killed[-1]).mkdir()
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            in_ranks(2, tmp_path, _train_and_die, killed[-1], where, limit=LIMIT)
    assert _last_whole(Path(killed[1])) == 2
    in_ranks(2, tmp_path, _lives, str(tmp_path), killed, limit=LIMIT)
