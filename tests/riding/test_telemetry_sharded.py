"""Norms of sharded parameters: those of the whole, by one collective where they are read."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from norms_by_hand import check
from ranks import in_ranks
from sharded import build, give, train
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt
from fusedopt import Telemetry

LAYOUTS = ("fsdp", "tp", "hsdp")


class Counted:
    """Counts what is called of torch.distributed while it is entered."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter",
             "barrier", "reduce", "all_gather_object", "all_to_all", "gather")  # fmt: skip

    def __enter__(self) -> list[str]:
        self.calls: list[str] = []
        self.kept = {name: getattr(distributed, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(distributed, name, self._noting(name, function))
        self.mode = CommDebugMode()
        self.mode.__enter__()
        return self.calls

    def _noting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        for name, function in self.kept.items():
            setattr(distributed, name, function)
        # DTensors' collectives, which no function of torch.distributed is called for.
        counts = self.mode.get_comm_counts()
        self.calls += [
            str(c) for c, n in counts.items() if "c10d_functional" in str(c) for _ in range(n)
        ]


def same_everywhere(x: Tensor) -> bool:
    found = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, x)
    return all(torch.equal(found[0].view(torch.int32), y.view(torch.int32)) for y in found)


def optimizer_of(model: nn.Module, backend: str, **options: Any) -> Any:
    return fusedopt.AdamW(
        model.named_parameters(), lr=0.05, weight_decay=0.3, telemetry=Telemetry(),
        backend=backend, **options,
    )  # fmt: skip


def _layouts(rank: int) -> None:
    """As one process' to rounding, for shards that are uneven or empty, and replicas."""
    for layout in LAYOUTS:
        for backend in ("reference", "triton") if layout == "fsdp" else ("reference",):
            plain, model = build("plain"), build(layout)
            alone, optimizer = optimizer_of(plain, backend), optimizer_of(model, backend)
            for step in range(2):
                train(plain, alone, [step], "plain")
                for _ in give(model, step):
                    with Counted() as calls:
                        optimizer.step()
                assert calls == [], f"{layout}: {calls}"
                optimizer.zero_grad()
                with Counted() as calls:
                    found = optimizer.telemetry.norms
                assert calls == ["all_reduce"], f"{layout}: {calls}"
                check(found, alone.telemetry.norms.double(), 1e-5)
                assert same_everywhere(found)
            with Counted() as calls:
                table, log = optimizer.telemetry.table(), optimizer.telemetry.log_dict()
            assert calls == ["all_reduce"] * 2
            assert list(table) == [name for name, _ in plain.named_parameters()]
            assert log.keys() == alone.telemetry.log_dict().keys()


def _placed() -> tuple[list[nn.Parameter], list[Any]]:
    mesh = init_device_mesh("cpu", (2,))
    drawn = torch.Generator().manual_seed(0)
    placed = [[Shard(0)], [Replicate()], [Shard(1)], [Shard(0)], [Shard(0)]]
    shapes = [(2051, 2), (5,), (3, 7), (1, 4), (0, 2)]
    params = [
        nn.Parameter(distribute_tensor(torch.randn(s, generator=drawn), mesh, p))
        for s, p in zip(shapes, placed, strict=True)
    ]
    return params, placed


def _mixed(rank: int) -> None:
    """Cut along rows and columns, replicated, cut so that one has nothing; and plain ones."""
    params, placed = _placed()
    telemetry = Telemetry(every=2)
    optimizer = fusedopt.SGD(params, lr=0.5, telemetry=telemetry, backend="triton")
    wanted = []
    for step in range(3):
        drawn = torch.Generator().manual_seed(step)
        if step % 2 == 0:
            wanted = []
        for p, own in zip(params, placed, strict=True):
            gradient = torch.randn(p.shape, generator=drawn)
            p.grad = distribute_tensor(gradient, p.device_mesh, own)
            if step % 2 == 0:
                before = p.full_tensor().detach()
                norms = (gradient, before - 0.5 * gradient, 0.5 * gradient)
                wanted.append([x.double().square().sum().sqrt() for x in norms])
        optimizer.step()
        assert telemetry.measured == (step % 2 == 0)
        check(telemetry.norms, torch.tensor(wanted, dtype=torch.float64))
        assert same_everywhere(telemetry.norms)


def _lacking(rank: int) -> None:
    """A gradient that one process has not: what it has not updated is none of the norm.

    And a step in which one process had nothing to do at all: both can read.
    """
    params, placed = _placed()
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(params[:2], lr=0.5, telemetry=telemetry, backend="reference")
    ones = [torch.ones(2051, 2), torch.ones(5)]

    def step(*given: bool) -> list[list[float]]:
        for p, own, one, is_given in zip(params, placed, ones, given, strict=False):
            gradient = distribute_tensor(one, p.device_mesh, own)
            p.grad = gradient if is_given else None
        optimizer.step()
        assert same_everywhere(telemetry.norms)
        return telemetry.norms.tolist()

    cut, whole = step(rank == 0, True)
    assert cut[0] == pytest.approx(2052**0.5) and cut[2] == pytest.approx(0.5 * 2052**0.5)
    assert whole[0] == pytest.approx(5**0.5)
    cut, whole = step(True, False)
    assert cut[0] == pytest.approx(4102**0.5) and whole[0] != whole[0]


def _first_on_one(rank: int) -> None:
    """Before any step all are nan, and no process waits for one that has raised."""
    params, _ = _placed()
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(params, lr=0.5, telemetry=telemetry, backend="reference")
    assert telemetry.norms.isnan().all()
    if rank == 0:
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert telemetry.norms.isnan().all(1).tolist() == [False] + [True] * 4
    assert same_everywhere(telemetry.norms)


def _alone(rank: int) -> None:
    """Plain parameters are each process' own: no collective, also where others do not read."""
    p = nn.Parameter(torch.full((3,), 1.0 + rank))
    telemetry = Telemetry()
    optimizer = fusedopt.SGD([p], lr=0.0, telemetry=telemetry, backend="reference")
    p.grad = torch.ones(3)
    optimizer.step()
    if rank == 0:
        with Counted() as calls:
            norms = telemetry.norms
        assert calls == [] and norms[0, 1] == pytest.approx(3**0.5)


def _dealt_out(rank: int) -> None:
    # Its package compiles functions with what torch is about to give up.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    zero = ZeroRedundancyOptimizer(params, fusedopt.SGD, telemetry=Telemetry(), lr=0.5)
    for p in params:
        p.grad = torch.ones(4)
    zero.step()
    inner: Any = zero.optim
    own = [p for group in inner.param_groups for p in group["params"]]
    found = inner.telemetry.norms
    assert found.shape == (len(own), 3) and 0 < len(own) < 3
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 1.0]]).expand(len(own), 3))


def _flat(rank: int) -> None:
    """``FullyShardedDataParallel``: of its flat tensors, or of what each process has of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel
    for original in (True, False):
        torch.manual_seed(0)
        inner = nn.Linear(5, 3)
        plain = copy.deepcopy(inner)
        model = FullyShardedDataParallel(
            inner, device_id=torch.device("cpu"), use_orig_params=original
        )
        ours = fusedopt.SGD(model.parameters(), lr=0.5, telemetry=Telemetry())
        theirs = fusedopt.SGD(plain.parameters(), lr=0.5, telemetry=Telemetry())
        x = torch.randn(2, 5)
        for each, optimizer in ((model, ours), (plain, theirs)):
            each(x).square().sum().backward()
            optimizer.step()
        found, wanted = ours.telemetry.norms, theirs.telemetry.norms.double()
        if not original:
            wanted = wanted.square().sum(0, keepdim=True).sqrt()
        check(found, wanted, 1e-5)
        assert same_everywhere(found)


def _two_meshes(rank: int) -> None:
    """One parameter is cut over both processes, one is there whole on each, in a mesh of one."""
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(4), meshes[name], [Shard(0)])) for name in "ab"
    ]
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(params, lr=0.5, telemetry=telemetry, backend="reference")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    check(telemetry.norms, torch.tensor([[2.0, 1.0, 1.0]] * 2, dtype=torch.float64))


def _all(rank: int) -> None:
    works = _layouts, _mixed, _lacking, _first_on_one, _alone, _dealt_out, _flat, _two_meshes
    for work in works:
        work(rank)
        distributed.barrier()


def test_in_two_processes(tmp_path: Path) -> None:
    in_ranks(2, tmp_path, _all)
