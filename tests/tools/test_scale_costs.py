"""The formulas of docs/scale.md, each against another way to find the same."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.kernels import multi_tensor, norms

# bench and tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(Path(__file__).resolve().parents[2]))

models = importlib.import_module("tools.scale.models")
cluster = importlib.import_module("tools.scale.cluster")
measured = importlib.import_module("tools.scale.measured")
costs = importlib.import_module("tools.scale.costs")
Group, Layout, Step = cluster.Group, costs.Layout, costs.Step
SMALL = models.MODELS[0]


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_parameters_are_the_published_ones(model: Any) -> None:
    # Catches a matrix left out of a layer, and units that are not all of the model.
    assert model.parameters == pytest.approx(model.published, rel=0.01)
    assert len(model.shapes) == 9 * model.layers + 3
    assert sum(model.units) == model.parameters and len(model.units) == model.layers + 1
    assert model.units[-1] == sum(map(math.prod, [model.shapes[0], *model.shapes[-2:]]))


@pytest.mark.parametrize("shards", [1, 8, 512, 3000, 16384])
def test_the_first_process_has_what_torch_chunk_gives_it(shards: int) -> None:
    # Catches rows that are rounded down, or shared out evenly.
    first = {s: torch.empty(s, device="meta").chunk(shards)[0].numel() for s in set(SMALL.shapes)}
    assert SMALL.largest_shard(shards) == sum(first[shape] for shape in SMALL.shapes)


def test_bytes_are_those_of_the_readme() -> None:
    # Catches states, squares or the norm that are not counted, or are counted in another type.
    assert costs.kernel_bytes("Adam") == (28, 4)
    assert costs.kernel_bytes("Adam", "bf16") == (14, 2)
    assert costs.kernel_bytes("BatchDecoupledAdam") == (32, 4)
    assert costs.kept_bytes("Adam") == 16 and costs.kept_bytes("Adam", "bf16") == 8
    assert costs.kept_bytes("BatchDecoupledAdam") == 20
    # The gradient in bfloat16, its squares not.
    assert costs.kept_bytes("BatchDecoupledAdam", "bf16") == 12


def test_tables_are_what_an_executor_keeps() -> None:
    # Catches a table that was added or widened, and one that is counted twice.
    sizes = [1, 1024, 5000, 8192, 100_000]
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    clip = fusedopt.GlobalNorm(1.0)
    optimizer = fusedopt.AdamW(params, clip=clip, backend="triton")
    optimizer.step()
    (group,) = optimizer._engine.plan.device_groups
    kept = sum(tensor.nbytes for tensor in group.executor.memory())
    counted = costs.table_bytes(sum(sizes), len(sizes))
    # A chunk a tensor is the most that can be too many: of the update, and of the norm.
    assert kept <= counted <= kept + len(sizes) * (8 + 16)
    assert multi_tensor.BLOCK < norms.NORM_BLOCK  # which one is which


def walk(ranks: int, near: int) -> tuple[int, int]:
    """Send one piece around a ring until every rank has had it; count hops within and between."""
    places = [rank // near for rank in range(ranks)]
    hops = [a == b for a, b in zip(places, places[1:], strict=False)]
    return hops.count(True), hops.count(False)


@pytest.mark.parametrize("ranks, near", [(2, 2), (8, 8), (64, 8), (32, 1), (16, 2)])
def test_a_ring_is_a_walk_past_every_process(ranks: int, near: int) -> None:
    # Catches a hop too many, hops within a node that cost those of the network, a lost base.
    group, size = Group(ranks, near), 1000.0 * ranks
    own = cluster.reduce_scatter(group, size)
    within, between = walk(ranks, near)
    assert 1e6 * own.latency == pytest.approx(8.4 + 3.4 * within + 14.0 * between)
    # Every process sends each piece but its own once.
    assert own.sent == pytest.approx((ranks - 1) * size / ranks)
    both = cluster.all_reduce(group, size)
    assert both.sent == pytest.approx(2 * own.sent)
    assert both.transfer == pytest.approx(2 * own.transfer)
    assert 1e6 * both.latency - 8.4 == pytest.approx(2 * (1e6 * own.latency - 8.4))


def test_one_process_has_nobody_to_send_to() -> None:
    assert cluster.all_reduce(Group(1, 1), 1e9) == cluster.Cost()


@pytest.mark.parametrize("ranks, near, gigabytes", [(8, 8, 450), (64, 8, 400), (32, 1, 50)])
def test_bandwidth_is_that_of_all_links_of_a_node(ranks: int, near: int, gigabytes: float) -> None:
    # Catches one network card for all, and a network in a node.
    own = cluster.reduce_scatter(Group(ranks, near), 1e9)
    assert own.transfer == pytest.approx(own.sent / (1e9 * gigabytes))


@pytest.mark.parametrize("ranks, levels", [(8, 0), (16, 1), (24, 2), (16384, 11)])
def test_a_tree_grows_by_a_level_when_nodes_double(ranks: int, levels: int) -> None:
    # Catches a way up without the way down, and levels that are counted in GPUs.
    expected = 6.8 + 2 * (7 * 0.6 + 5.0 * levels)
    assert 1e6 * cluster.tree_all_reduce(Group(ranks, 8)) == pytest.approx(expected)


@pytest.mark.parametrize("gpus, shards", [(64, 64), (64, 8), (64, 4), (16384, 512), (2, 2)])
def test_groups_are_those_of_a_mesh(gpus: int, shards: int) -> None:
    # Catches replicas taken for neighbours, and shards that are no neighbours.
    mesh = torch.arange(gpus).view(gpus // shards, shards)
    layout = Layout(gpus, shards)
    for group, ranks in ((layout.shard, mesh[0]), (layout.replicas, mesh[:, 0])):
        nodes = len((ranks // 8).unique())
        assert (group.ranks, group.nodes) == (len(ranks), nodes)
    assert layout.world.ranks == gpus and layout.name[0] == ("F" if gpus == shards else "H")


def test_squares_are_reduced_over_shards_and_then_over_replicas() -> None:
    # Catches squares of 2 bytes, replicas that are sent everything, a collective that is left out.
    step = Step(SMALL, Layout(64, 8))
    own = step.squares([800, 1600])
    parts = []
    for elements in (800, 1600):
        parts.append(cluster.reduce_scatter(Group(8, 8), 4 * elements))
        parts.append(cluster.all_reduce(Group(8, 1), 4 * elements / 8))
    assert own.latency == pytest.approx(sum(part.latency for part in parts))
    assert own.transfer == pytest.approx(sum(part.transfer for part in parts))
    assert own.sent == pytest.approx(4 * 2400 * 7 / 8 + 2 * 4 * 300 * 7 / 8)
    # Cut over all, there are no replicas: no more bytes than those of the shards.
    assert Step(SMALL, Layout(64, 64)).squares([640]).sent == pytest.approx(4 * 640 * 63 / 64)


def test_a_step_is_the_sum_of_its_parts_or_the_host() -> None:
    # Catches a part left out, and a host that is added where it runs beside the device.
    for gpus in (8, 16384):
        s = Step(SMALL, Layout(gpus, gpus))
        device = s.passes + s.launching + s.norm
        assert s.seconds == max(device, s.host)
        assert s.moved == 32 * s.elements
        assert s.launching == pytest.approx(s.launches * costs._device().fixed / 5)
    assert Step(SMALL, Layout(8, 8)).host < Step(SMALL, Layout(8, 8)).seconds
    assert s.host == s.seconds
    # 6 x 8.03e9 x 8192 operations at 4e14 a second.
    assert s.training == pytest.approx(0.98676, rel=1e-4)


def test_memory_of_a_process() -> None:
    # Catches squares that are free, and a unit that is whole without them.
    s = Step(SMALL, Layout(64, 64))
    assert s.resident(squares=False) == 16 * s.elements + s.tables
    assert s.resident(squares=True) == 20 * s.elements + s.tables
    largest = 2 * 128256 * 4096 + 4096
    assert s.peak(squares=False) - s.resident(squares=False) == 10 * largest
    assert s.peak(squares=True) - s.resident(squares=True) == 14 * largest
