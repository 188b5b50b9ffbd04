"""Checkpoints of a model and its optimizer, in every form in which torch writes and reads them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.checkpoint.stateful import Stateful

FORMS = ("sharded", "flat", "full", "each full", "titan")


def save(model: nn.Module, optimizer: Any, folder: Path, form: str) -> None:
    """Save both, on all processes of the group together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = _read(model, optimizer, form)
        if not form.endswith("full"):
            dcp.save(state, checkpoint_id=folder)
        elif _rank() == 0:
            folder.mkdir(parents=True)
            torch.save(state, folder / "whole.pt")
    _meet()


def load(model: nn.Module, optimizer: Any, folder: Path, form: str, staged: bool = False) -> None:
    """Load what ``save`` wrote in the same form, under any layout.

    Args:
        model: whose parameters.
        optimizer: whose states and groups.
        folder: that ``save`` was given.
        form: the same.
        staged: read files of shards into copies, so that a file that is cut changes nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form.endswith("full"):
            reads = _rank() == 0 or form == "each full"
            state = torch.load(folder / "whole.pt", weights_only=True) if reads else {}
        else:
            state = _read(model, optimizer, form)
            if form == "titan" and staged:
                state["optimizer"] = state["optimizer"].state_dict()
            state = copy.deepcopy(state) if staged else state
            dcp.load(state, checkpoint_id=folder)
        if form == "titan" and staged:
            Container([optimizer]).load_state_dict(state["optimizer"])
        write(model, optimizer, state, form)


def write(model: nn.Module, optimizer: Any, state: dict[str, Any], form: str) -> None:
    """Hand over what was read to the model and the optimizer."""
    if form == "titan":
        # What dcp.load does for an object with the two methods, it has done.
        sd.set_model_state_dict(model, state["model"])
        return
    options = _options(form, loading=True)
    of_model, of_optimizer = state.get("model", {}), state.get("optimizer", {})
    if not options.broadcast_from_rank0:
        sd.set_state_dict(
            model,
            optimizer,
            model_state_dict=of_model,
            optim_state_dict=of_optimizer,
            options=options,
        )
        return
    # In one call torch takes an empty state of the model, as all ranks but one have, for none, and
    # rank 0 waits for them. The optimizer comes first: what it refuses has changed nothing.
    sd.set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
    sd.set_model_state_dict(model, of_model, options=options)


def _read(model: nn.Module, optimizer: Any, form: str) -> dict[str, Any]:
    if form == "titan":
        return {"model": sd.get_model_state_dict(model), "optimizer": Container([optimizer])}
    of_model, of_optimizer = sd.get_state_dict(model, optimizer, options=_options(form))
    return {"model": of_model, "optimizer": of_optimizer}


def _options(form: str, loading: bool = False) -> sd.StateDictOptions:
    full = form.endswith("full")
    return sd.StateDictOptions(
        full_state_dict=full,
        # Loading, only states that are whole on the host would be moved there.
        cpu_offload=full and not loading,
        broadcast_from_rank0=full and loading and form != "each full" and dist.is_initialized(),
        flatten_optimizer_state_dict=form == "flat",
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


class Container(Stateful):
    """Flat keys as torchtitan writes them, by the calls that its container makes.

    That is (components/optimizer of 2026): a step with zero gradients at lr 0 where there is no
    state; ``optimizer.state_dict()``, whose numbers become the ``param_names`` of the groups; keys
    ``state.{name}.{entry}`` and ``param_groups.{name}.{option}``. Loading asks for the entries of
    the live state, and for every option of the live groups.
    """

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return the flat state of all optimizers."""
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            _initialise(optimizer)
            flat.update(_flattened(optimizer.state_dict()))
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each optimizer's own part of a flat state."""
        for optimizer in self.optimizers:
            _initialise(optimizer)
            optimizer.load_state_dict(_unflattened(optimizer, state_dict))


def _initialise(optimizer: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state or any(p.grad is not None for p in params):
        return
    for p in params:
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.tensor(0.0) if isinstance(lr, torch.Tensor) else 0.0
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)


def _flattened(saved: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for group in saved["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            _put(flat, f"state.{name}", saved["state"].get(number, {}))
            for key in group.keys() - {"params", "param_names"}:
                flat[f"param_groups.{name}.{key}"] = group[key]
    return flat


def _put(flat: dict[str, Any], prefix: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _put(flat, f"{prefix}.{key}", value)
        else:
            flat[f"{prefix}.{key}"] = value


def _unflattened(optimizer: Any, flat: dict[str, Any]) -> dict[str, Any]:
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in optimizer.param_groups:
        numbers = []
        for name, p in zip(group["param_names"], group["params"], strict=True):
            keys = {key: f"state.{name}.{key}" for key in optimizer.state.get(p, ())}
            found = {key: flat[place] for key, place in keys.items() if place in flat}
            if found:
                states[number] = found
            numbers.append(number)
            number += 1
        first = group["param_names"][0]
        options = group.keys() - {"params", "param_names"}
        groups.append({key: flat[f"param_groups.{first}.{key}"] for key in options})
        groups[-1]["params"] = numbers
    return {"state": states, "param_groups": groups}
