"""Training with compressed states over processes: wrappers, scalers, the step for checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract import assert_same_bits
from kept_shards import FORMATS, build, gradients, own, train
from ranks import in_ranks
from saving import Container
from sharded import everything, local
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

COMPRESSED = ("int8, stochastic", "remainder, int8", "remainder8, fp8", "kahan")


def _optimizer(parameters: Any, format: str, **options: Any) -> Any:
    # Kernels would run in Triton's interpreter, for minutes.
    return fusedopt.AdamW(parameters, lr=0.01, backend="reference", **FORMATS[format], **options)


def _given(parameters: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 24), nn.Tanh(), nn.Linear(24, 5))
    return model.to(torch.bfloat16)


# The step that distributed checkpoint makes


def _created(format: str, how: str, lr: Any) -> None:
    model, twin = (build("rows") for _ in range(2))
    optimizers = []
    for m in (model, twin):
        optimizers.append(_optimizer(m.named_parameters(), format, weight_decay=0.5))
        optimizers[-1].param_groups[0]["lr"] = lr
    before = [local(p) for p in model.parameters()]
    if how == "torch":
        saved = sd.get_optimizer_state_dict(model, optimizers[0])["state"]
        assert all(float(state["step"]) == 0 for state in saved.values())
    else:
        Container([optimizers[0]]).state_dict()
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(own(p), value)
        assert optimizers[0].state[p]
    if how == "torch":
        for m, o in zip((model, twin), optimizers, strict=True):
            train(m, o, range(2))
        assert_same_bits(everything(model, optimizers[0]), everything(twin, optimizers[1]))


# Saved in the background


def _in_background(format: str, folder: Path) -> None:
    model, twin = build("rows"), build("rows", seed=5)
    optimizer, other = (_optimizer(m.named_parameters(), format) for m in (model, twin))
    train(model, optimizer, range(2))

    def states(m: nn.Module, o: Any) -> dict[str, Any]:
        of_model, of_optimizer = sd.get_state_dict(m, o)
        return {"model": of_model, "optimizer": of_optimizer}

    before = everything(model, optimizer)
    group = dist.new_group(backend="gloo")
    saving = dcp.async_save(states(model, optimizer), checkpoint_id=folder, process_group=group)
    train(model, optimizer, range(2, 4))
    saving.result()
    dist.barrier()
    state = states(twin, other)
    dcp.load(state, checkpoint_id=folder)
    sd.set_state_dict(
        twin, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert_same_bits(everything(twin, other), before, format)
    train(twin, other, range(2, 4))
    assert_same_bits(everything(twin, other), everything(model, optimizer), format)


# Parameters that are bfloat16 themselves


def _accumulated(rank: int, format: str) -> None:
    """Three micro-batches, of which the last is reduced, and an overflow on one process."""
    model = _network()
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mp_policy=policy)
    clip = fusedopt.GlobalNorm(1.0)
    optimizer = _optimizer(model.named_parameters(), format, clip=clip)
    whole = [p.detach().full_tensor() for p in model.parameters()]
    plain = [nn.Parameter(p.clone()) for p in whole]
    alone = _optimizer(plain, format)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            x = torch.randn(4, 130, generator=generator).to(torch.bfloat16)
            scaler.scale(model(x).float().square().mean() / 100).backward()
        if step == 1 and rank == 1:
            next(model.parameters()).grad.to_local()[0, 0] = float("inf")
        before = everything(model, optimizer)
        if step != 1:
            for p, q in zip(plain, model.parameters(), strict=True):
                p.grad = q.grad.full_tensor() / 8 if step == 0 else q.grad.full_tensor() / 4
            alone.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = everything(model, optimizer)
        if step == 1:
            assert_same_bits(after, before, format)
    for p, q in zip(model.parameters(), plain, strict=True):
        # The norm is below the bound: nothing is clipped. Weights lie in groups of one process.
        if q.dim() == 2 and q.shape[1] >= 128:
            assert torch.equal(p.full_tensor(), q), format


# Several meshes, and plain parameters beside DTensors


def _mixed(format: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    given, values = gradients(0), {k: v for k, v in _values().items()}
    placements = {"rows": [Shard(0)], "deep": [Replicate()], "odd rows": None}
    found = {}
    for name, placed in placements.items():
        value = values[name]
        p = nn.Parameter(value if placed is None else distribute_tensor(value, mesh, placed))
        gradient = given[name]
        p.grad = gradient if placed is None else distribute_tensor(gradient, mesh, placed)
        found[name] = p
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    p = nn.Parameter(distribute_tensor(values["few rows"], other, [Replicate(), Shard(0)]))
    p.grad = distribute_tensor(given["few rows"], other, [Replicate(), Shard(0)])
    found["few rows"] = p
    plain = {name: nn.Parameter(values[name].clone()) for name in found}
    for name, q in plain.items():
        q.grad = given[name].clone()
    clip = fusedopt.GlobalNorm(0.5, norm_type=float("inf"))
    for parameters in (found, plain):
        _optimizer(parameters.values(), format, clip=clip).step()
    for name, q in plain.items():
        full = found[name].full_tensor() if placements.get(name, ...) is not None else found[name]
        assert torch.equal(full, q), f"{format}: {name}"


def _values() -> dict[str, Tensor]:
    from kept_shards import values

    return values()


# Wrappers


def _zero(rank: int, format: str) -> None:
    """Each rank's optimizer is one of its own: numbers of parameters are those in it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrapped(m: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(
            m.parameters(),
            optimizer_class=fusedopt.AdamW,
            lr=0.01,
            backend="reference",
            **FORMATS[format],
        )

    model, again = _network(), _network()
    optimizer = wrapped(model)
    for step in range(3):
        _given(model.parameters(), step)
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved)
    again.load_state_dict(model.state_dict())
    other = wrapped(again)
    other.load_state_dict(copy.deepcopy(saved[0]))
    for step in range(3, 5):
        for m, o in ((model, optimizer), (again, other)):
            _given(m.parameters(), step)
            o.step()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), format
    for p, state in optimizer.optim.state.items():
        q = dict(zip(model.parameters(), again.parameters(), strict=True))[p]
        assert_same_bits(dict(other.optim.state[q]), dict(state), format)


def _fsdp1(rank: int, format: str) -> None:
    """Each rank's own state to the bit; over ranks what is exported, in torch's format."""
    cpu = torch.device("cpu")
    model, again, third = (
        FullyShardedDataParallel(_network(), device_id=cpu, use_orig_params=False) for _ in range(3)
    )
    optimizer, other, exported = (_optimizer(m.parameters(), format) for m in (model, again, third))
    for step in range(3):
        x = torch.randn(4, 130, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x.to(torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for m in (again, third):
        sd.set_model_state_dict(m, sd.get_model_state_dict(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wrap = FullyShardedDataParallel
    if any(x.dtype == torch.int8 for state in optimizer.state.values() for x in state.values()):
        # Files that torch writes and does not load.
        for gather in (wrap.optim_state_dict, wrap.full_optim_state_dict,
                       wrap.sharded_optim_state_dict, sd.get_optimizer_state_dict):  # fmt: skip
            with pytest.raises(ValueError, match="export_state_dict"):
                gather(model, optimizer)
    else:
        sd.get_optimizer_state_dict(model, optimizer)
    plain = fusedopt.export_state_dict(optimizer)
    saved = wrap.optim_state_dict(model, optimizer, plain)
    exported.load_state_dict(wrap.optim_state_dict_to_load(third, exported, saved))
    for p, q, r in zip(model.parameters(), again.parameters(), third.parameters(), strict=True):
        assert_same_bits(dict(other.state[q]), dict(optimizer.state[p]), format)
        assert exported.state[r]["step"] == 3
    states = fusedopt.export_state_dict(exported)["state"]
    for i, state in plain["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            error = (states[i][name] - state[name]).square().sum() / state[name].square().sum()
            assert error <= 7e-3, name


def _replicas(rank: int, format: str) -> None:
    """DistributedDataParallel: every process draws the same bits."""
    model = nn.parallel.DistributedDataParallel(_network())
    optimizer = _optimizer(model.parameters(), format)
    for step in range(3):
        x = torch.randn(4, 130, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x.to(torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = [p.detach() for p in model.parameters()]
    theirs = [mine]
    dist.broadcast_object_list(theirs)
    for p, q in zip(mine, theirs[0], strict=True):
        assert torch.equal(p, q), format


def _all(rank: int, folder: str) -> None:
    for i, format in enumerate(COMPRESSED):
        for how in ("torch", "titan"):
            for lr in (0.01, torch.tensor(0.01)):
                _created(format, how, lr)
        _in_background(format, Path(folder, str(i)))
        _accumulated(rank, format)
        _mixed(format)
        _zero(rank, format)
        _fsdp1(rank, format)
        _replicas(rank, format)


def test_over_two_processes(tmp_path: Path) -> None:
    # Catches a step for states alone that counts, decays or rounds; codes in the background that
    # are the live ones; masters that an overflow touches; draws that differ between replicas.
    in_ranks(2, tmp_path, _all, str(tmp_path))
