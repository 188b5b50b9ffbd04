"""Memory of a plan that several streams read, and what captured graphs keep.

There are no streams on a CPU: stand-ins note what a GPU's allocator would be told.
"""

from __future__ import annotations

import pytest
import torch
from contract import DEVICE

import fusedopt
from fusedopt.memory import streams
from fusedopt.step import device_group as lane


class Streams:
    """Stands for the current stream, and for the allocator's notes of who reads what."""

    def __init__(self) -> None:
        self.current = "first"
        self.noted: list[tuple[int, str]] = []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(lane, "readers", streams.Readers)
    monkeypatch.setattr(streams, "current", lambda device: found.current)
    monkeypatch.setattr(
        streams, "record", lambda tensor, stream: found.noted.append((id(tensor), stream))
    )
    return found


def make(cls=fusedopt.AdamW, **options):
    # The second goes through staging buffers.
    values = [torch.randn(6), torch.randn(4, 4)]
    whole, wide = (x.to(DEVICE) for x in values)
    params = [torch.nn.Parameter(whole), torch.nn.Parameter(wide[:, ::2])]
    for p in params:
        p.grad = torch.randn(p.shape).to(DEVICE)
    return params, cls(params, lr=0.1, backend="triton", **options)


def tensors_in(thing, seen):
    """Every tensor that an object holds, however deep."""
    if id(thing) in seen or isinstance(thing, (torch.nn.Parameter, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    if isinstance(thing, dict):
        children = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        children = list(thing)
    else:
        own = type(thing).__module__.startswith("fusedopt")
        children = list(vars(thing).values()) if own and hasattr(thing, "__dict__") else []
    for child in children:
        yield from tensors_in(child, seen)


OPTIONS = [{}, {"capturable": True}, {"clip": fusedopt.GlobalNorm(1.0)}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
def test_every_tensor_that_a_lane_holds_is_known_to_the_allocator(machine, options):
    params, ours = make(**options)
    ours.step()
    known = {name for name, stream in machine.noted if stream == "first"}
    # What users own: its memory is theirs to order, as with torch's optimizers.
    users = {t.data_ptr() for p in params for t in (p, *ours.state[p].values())}
    held = [t for one in ours._engine.plan.device_groups for t in tensors_in(one, set())]
    rest = [t for t in held if t.numel() and t.data_ptr() not in users]
    storages = {t.untyped_storage().data_ptr() for t in ours._engine.plan.device_groups[0].memory()}
    missing = [t for t in rest if id(t) not in known]
    # Views of what is known, and step counts on the host, are no memory of their own.
    missing = [t for t in missing if t.untyped_storage().data_ptr() not in storages]
    # Numbers on the host, which are copied from where the allocator pins memory.
    numbers = getattr(ours._engine.plan.device_groups[0].table, "_host", None)
    assert [t for t in missing if t is not numbers] == []
    assert len(known) > 5


def test_each_stream_is_noted_once(machine):
    _, ours = make()
    for stream in ("first", "first", "second", "second", "first"):
        machine.current = stream
        ours.step()
    assert {stream for _, stream in machine.noted} == {"first", "second"}
    assert len(set(machine.noted)) == len(machine.noted)


def test_a_norm_is_noted_by_each_stream_that_writes_it(machine):
    """The user may drop it while another stream has yet to write there."""
    _, ours = make(clip=fusedopt.GlobalNorm(1.0))
    for stream in ("first", "second", "second"):
        machine.current = stream
        ours.step()
    first = ours.clip.last
    assert [s for name, s in machine.noted if name == id(first)] == ["first", "second"]
    # Another one, by a stream that is known already.
    ours.clip.last = None
    ours.step()
    again = ours.clip.last
    assert again is not first
    assert [s for name, s in machine.noted if name == id(again)] == ["second"]


def test_coefficients_stay_where_they_are(machine):
    """A table that moved would free what another stream reads, and be unknown to the allocator."""
    params, ours = make()
    ours.step()
    values = ours._engine.plan.device_groups[0].table.values
    params[0].grad = None
    ours.step()
    params[0].grad = torch.randn(6).to(DEVICE)
    ours.step()
    # Unequal step counts are two rows, equal ones one.
    before = ours._engine.plan.device_groups[0].table
    ours.state[params[0]]["step"].fill_(9.0)
    ours.step()
    assert before is ours._engine.plan.device_groups[0].table and len(before.rows) == 2
    ours.state[params[1]]["step"].copy_(ours.state[params[0]]["step"])
    ours.step()
    assert len(before.rows) == 1 and values is not before.values
    assert {id(before.values)} <= {name for name, _ in machine.noted}


def test_parameters_on_meta_are_judged_at_the_step():
    model = torch.nn.Linear(3, 2, device="meta")
    ours = fusedopt.AdamW(model.parameters(), backend="triton")
    model.to_empty(device=DEVICE)
    for p in model.parameters():
        torch.nn.init.ones_(p)
    ours = fusedopt.AdamW(model.parameters(), backend="triton", lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ours.step()
    assert model.weight.detach().lt(1).all()


def test_a_step_on_meta_is_an_error_that_names_the_parameter():
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    ours = fusedopt.SGD([p], lr=0.1, backend="triton")
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match=r"param_groups\[0\].*meta"):
        ours.step()


def test_released_graphs_leave_nothing_behind(monkeypatch):
    from fusedopt import coefficients, engine
    from fusedopt.memory import device as memory_device
    from fusedopt.step import plan, scale

    capturing = [False]
    for module in (memory_device, coefficients, engine, plan, scale):
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing[0])
    params, ours = make(capturable=True)
    ours.step()
    capturing[0] = True
    ours.step()
    capturing[0] = False
    captured = ours._engine.plan
    params[0].grad = None
    ours.step()
    assert ours._engine.captured == [captured]
    captured.device_groups[0].executor._captured.append(torch.empty(1))
    ours.release_graphs()
    assert ours._engine.captured == [] and not ours._engine.plan.captured
    before = params[1].detach().clone()
    ours.step()
    assert not torch.equal(params[1], before)
