"""Micro-batches in float32: sums, and all that reads and clears them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import batches, decoupled, loss_of, network
from guarded import Guarded, channels_last, padded_rows, transposed
from ranks import in_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt.backends import sums_on, triton_accumulate

BF16 = torch.bfloat16
each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


def _narrow() -> nn.Module:
    return network().bfloat16()


def _batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.bfloat16(), y.bfloat16()) for x, y in batches(steps, 4)]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def _each(model: nn.Module, steps: int) -> list[list[Tensor]]:
    """The gradients of each micro-batch, in bfloat16."""
    twin, found = copy.deepcopy(model), []
    for x, y in _batches(steps):
        twin.zero_grad()
        loss_of(twin, x, y).backward()
        found.append(_gradients(twin))
    return found


def _in_float32(model: nn.Module, steps: int) -> list[Tensor]:
    """Their sums, added up one by one."""
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for gradients in _each(model, steps):
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return sums


def _accumulate(accumulator: Any, model: nn.Module, some: list[Any]) -> None:
    for x, y in some:
        with accumulator.micro_batch():
            loss_of(model, x, y).backward()


@each_backend
def test_against_sums_in_float64(backend, device) -> None:
    """64 micro-batches: to float32's rounding, where bfloat16 loses a hundredth."""
    count = 64
    model, plain = _narrow().to(device), _narrow().to(device)
    some = [(x.to(device), y.to(device)) for x, y in _batches(count)]
    accumulator = fusedopt.GradientAccumulator(model, backend=backend)
    _accumulate(accumulator, model, some)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in plain.parameters()]
    for x, y in some:
        loss_of(plain, x, y).backward()
    for gradients in _each(plain.cpu(), count):
        for total, gradient in zip(exact, gradients, strict=True):
            total += gradient.to(device)
    for ours, theirs, total in zip(_gradients(model), _gradients(plain), exact, strict=True):
        assert ours.dtype == torch.float32 and theirs.dtype == BF16
        size = total.norm()
        # Each addition rounds to half a unit of 2^-23.
        assert (ours - total).norm() <= count * 2.0**-24 * size
        assert (theirs - total).norm() >= 1e-3 * size


Column = tuple[Guarded, Tensor, bool]


def _columns(device: torch.device) -> Iterator[Column]:
    """Sums and gradients of every shape, order and alignment; whether there is a sum already."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    shapes: list[tuple[int, ...]] = [(1024,), (2500,), (3, 5, 7), (), (0,), (1,), (4, 3, 5, 5)]
    for i, shape in enumerate(shapes):
        for dtype in (BF16, torch.float16, torch.float32):
            yield Guarded(draw(*shape)), draw(*shape).to(dtype), bool(i % 2)
    yield Guarded(draw(2048), shift=1), draw(2049)[1:].to(BF16), True
    for strides in (transposed, padded_rows):
        yield Guarded(draw(6, 40)), Guarded(draw(6, 40).to(BF16), strides((6, 40))).view, True
    image = (4, 3, 5, 5)
    yield Guarded(draw(*image), channels_last(image)), draw(*image).to(BF16), True
    hard = [0.0, -0.0, 1e-40, 3e38, torch.nan, torch.inf, -torch.inf]
    yield Guarded(draw(7)), torch.tensor(hard, device=device).to(BF16), False


def test_kernel_and_twin_agree_to_the_bit(device) -> None:
    ends = []
    for backend in ("triton", "reference"):
        sums, gradients, begun = map(list, zip(*_columns(device), strict=True))
        before = [g.clone() for g in gradients]
        for total, old in zip(sums, begun, strict=True):
            # What is written must not be read: it may be anything.
            if not old:
                total.view.fill_(torch.nan)
        sums_on(device, backend).add([total.view for total in sums], gradients, begun)
        for total in sums:
            total.check("a sum")
        for gradient, old_gradient in zip(gradients, before, strict=True):
            torch.testing.assert_close(gradient, old_gradient, rtol=0, atol=0, equal_nan=True)
        ends.append([total.view for total in sums])
    for a, b, (total, gradient, old) in zip(*ends, _columns(device), strict=True):
        assert torch.equal(*(x.contiguous().view(-1).view(torch.int32) for x in (a, b)))
        expected = total.view + gradient.float() if old else gradient.float()
        torch.testing.assert_close(a, expected, rtol=0, atol=0, equal_nan=True)


def test_one_launch_for_all(monkeypatch) -> None:
    launches: list[int] = []
    real = triton_accumulate.launch

    def launch(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        launches.append(programs)
        real(kernel, programs, *arguments, **meta)

    monkeypatch.setattr(triton_accumulate, "launch", launch)
    model = _narrow()
    accumulator = fusedopt.GradientAccumulator(model, backend="triton")
    _accumulate(accumulator, model, _batches(3))
    assert launches == [len(list(model.parameters()))] * 3


def test_wide_accesses_where_addresses_allow(monkeypatch, device) -> None:
    # Nothing else shows it where there is no GPU: there it is a fault.
    seen: list[bool] = []
    monkeypatch.setattr(
        triton_accumulate, "launch", lambda *_, **meta: seen.append(bool(meta["ALIGNED"]))
    )
    memory, gradient = torch.zeros(33, device=device), torch.ones(33, device=device).to(BF16)
    sums = sums_on(device, "triton")
    for total, own in ((memory, gradient), (memory[1:], gradient[:-1]), (memory[4:], gradient[4:])):
        sums.add([total], [own], [True])
    assert seen == [True, False, False]


@pytest.mark.parametrize("clip", [None, "ours", "torch's"])
def test_the_optimizer_reads_the_sums(clip) -> None:
    model, twin = _narrow(), _narrow()
    accumulator = fusedopt.GradientAccumulator(model)
    ends = []
    for own in (model, twin):
        bound = fusedopt.GlobalNorm(0.05) if clip == "ours" else None
        optimizer = fusedopt.AdamW(own.parameters(), lr=1e-2, clip=bound, backend="reference")
        for _ in range(3):
            if own is model:
                _accumulate(accumulator, model, _batches(4))
            else:
                for p, total in zip(own.parameters(), _in_float32(own, 4), strict=True):
                    p.grad_dtype = None
                    p.grad = total
            if clip == "torch's":
                nn.utils.clip_grad_norm_(own.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in own.parameters())
        ends.append(list(own.parameters()))
    assert all(map(torch.equal, *ends))
    assert not any(map(torch.equal, ends[0], _narrow().parameters()))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_loss_scaler(unscale, overflow) -> None:
    """Sums in float32 have room for what float16 has not; the overflow of one gradient shows."""
    model = network().half()
    plain = fusedopt.SGD(model.parameters(), lr=0.1, clip=fusedopt.GlobalNorm(0.5))
    accumulator = fusedopt.GradientAccumulator(model)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    some = [(x.half(), y.half()) for x, y in batches(2, 4)]
    if overflow:
        some[0][0].fill_(6e4)
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for x, y in some:
        with accumulator.micro_batch():
            scaler.scale(loss_of(model, x, y).float()).backward()
            for total, p in zip(expected, model.parameters(), strict=True):
                total += p.grad
    if unscale:
        scaler.unscale_(plain)
    scaler.step(plain)
    scaler.update()
    assert (scaler.get_scale() < 2.0**7) == overflow
    expected = [total / 2.0**7 for total in expected]
    norm = torch.nn.utils.get_total_norm(expected)
    for p, old, total in zip(model.parameters(), before, expected, strict=True):
        if not overflow:
            old = old.float() - 0.1 * total * torch.clamp(0.5 / (norm + 1e-6), max=1)
            torch.testing.assert_close(p.float(), old, rtol=2.0**-10, atol=2.0**-12)
        else:
            assert torch.equal(p, old)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_begins_anew(to_none) -> None:
    # Catches a sum that goes on where it should have begun.
    model = _narrow()
    accumulator = fusedopt.GradientAccumulator(model)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.0)
    some = _batches(3)
    _accumulate(accumulator, model, [*some, *some])
    optimizer.zero_grad(set_to_none=to_none)
    _accumulate(accumulator, model, some)
    assert all(map(torch.equal, _gradients(model), _in_float32(model, 3)))


def test_passes_outside_count_as_well() -> None:
    """The first leaves a gradient in bfloat16, which is taken in; the last adds to the sum."""
    model = _narrow()
    accumulator = fusedopt.GradientAccumulator(model)
    first, second, third, fourth = _batches(4)
    loss_of(model, *first).backward()
    assert all(g.dtype == BF16 for g in _gradients(model))
    _accumulate(accumulator, model, [second, third])
    loss_of(model, *fourth).backward()
    assert all(map(torch.equal, _gradients(model), _in_float32(model, 4)))


def test_a_micro_batch_that_failed_is_left_out() -> None:
    model = _narrow()
    accumulator = fusedopt.GradientAccumulator(model)
    some = _batches(3)
    for start in (0, 2):
        with pytest.raises(ArithmeticError), accumulator.micro_batch():
            loss_of(model, *some[0]).backward()
            raise ArithmeticError
        assert all((g is None) == (start == 0) for g in _gradients(model))
        _accumulate(accumulator, model, some[start : start + 2])
    assert all(map(torch.equal, _gradients(model), _in_float32(model, 3)))


def test_parts_of_a_model() -> None:
    """Layers without a gradient in some micro-batches, in float32, and frozen ones."""
    model = nn.ModuleList([nn.Linear(3, 3).bfloat16() for _ in range(3)] + [nn.Linear(3, 3)])
    model[2].requires_grad_(False)
    accumulator = fusedopt.GradientAccumulator(model)
    x = torch.ones(2, 3)
    for chosen in ([0], [1, 3], [0, 3], [0, 1]):
        with accumulator.micro_batch():
            sum(model[i](x.to(model[i].weight.dtype)).sum().float() for i in chosen).backward()
    weights = [layer.weight.grad for layer in model]
    assert [None if g is None else float(g[0, 0]) for g in weights] == [6.0, 4.0, None, 4.0]
    assert model[3].weight.grad_dtype == torch.float32
    model[2].requires_grad_(True)
    _ = accumulator
    with accumulator.micro_batch():
        model[2](x.bfloat16()).sum().backward()
    assert model[2].weight.grad.dtype == torch.float32


def test_gradients_are_freed() -> None:
    """Beside the sums nothing stays: 4 bytes a parameter, and 2 during backward."""
    model = _narrow()
    accumulator = fusedopt.GradientAccumulator(model)
    found = []
    for x, y in _batches(2):
        with accumulator.micro_batch():
            loss_of(model, x, y).backward()
            found += [weakref.ref(g) for g in _gradients(model)]
            assert sum(g.nbytes for g in _gradients(model)) == 2 * _numel(model)
        assert [ref() for ref in found] == [None] * len(found)
    assert sum(g.nbytes for g in _gradients(model)) == 4 * _numel(model)


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("last", ["outside", "inside"])
def test_with_gradient_release(last) -> None:
    """Nothing is stepped within a micro-batch; a last pass outside adds to the sum, and steps."""
    ends = []
    for released in (True, False):
        model = _narrow()
        optimizer = fusedopt.AdamW(model.parameters(), rounding="stochastic", backend="reference")
        accumulator = fusedopt.GradientAccumulator(model)
        if released:
            fusedopt.gradient_release(model, optimizer)
        for _ in range(3):
            some = _batches(4)
            _accumulate(accumulator, model, some[:3] if last == "outside" else some)
            if last == "outside":
                loss_of(model, *some[3]).backward()
                assert all((p.grad is None) == released for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))
    assert not any(map(torch.equal, ends[0], _narrow().parameters()))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter has 16 bits"):
        fusedopt.GradientAccumulator(network())
    with pytest.raises(TypeError, match="a module or parameters"):
        fusedopt.GradientAccumulator(["weight"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="backend must be one of"):
        fusedopt.GradientAccumulator(_narrow(), backend="cuda")
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).bfloat16()
    accumulator = fusedopt.GradientAccumulator(model)
    with pytest.raises(RuntimeError, match="micro_batch.. within"), accumulator.micro_batch():
        accumulator.micro_batch().__enter__()
    with pytest.raises(RuntimeError, match=r"parameter 0.*shape \(5, 3\).*sparse"):
        with accumulator.micro_batch():
            model(torch.tensor([1])).sum().backward()
    assert model[1].weight.grad is None
    with accumulator.micro_batch():
        model[1](torch.ones(1, 3, dtype=BF16)).sum().backward()
    model[1].weight.data = torch.ones(4, 3, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"parameter 1.*zero_grad\(\)"):
        with accumulator.micro_batch():
            model[1].weight.sum().backward()


def test_squares_of_samples_do_not_follow() -> None:
    """A sum is another tensor than the gradient that squares were gathered with: an error."""
    model = network().bfloat16()
    optimizer = decoupled(model, virtual_batch_size=1)
    accumulator = fusedopt.GradientAccumulator(model)
    _accumulate(accumulator, model, _batches(2))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def _two(rank: int) -> None:
    for wrap in ("ddp", "fsdp"):
        model = network().bfloat16()
        if wrap == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            outer: nn.Module = model
        else:
            outer = DistributedDataParallel(model, gradient_as_bucket_view=True)
        accumulator = fusedopt.GradientAccumulator(model)
        halves = [[(x.chunk(2)[r], y.chunk(2)[r]) for x, y in _batches(3)] for r in (0, 1)]
        own = halves[rank]
        _accumulate(accumulator, outer, own)
        twin = network().bfloat16()
        parts = [
            _each_of(twin, [(x.chunk(2)[r], y.chunk(2)[r]) for x, y in _batches(3)]) for r in (0, 1)
        ]
        for i, p in enumerate(model.parameters()):
            total = sum(((a[i].float() + b[i].float()) / 2) for a, b in zip(*parts, strict=True))
            whole = p.grad.full_tensor() if wrap == "fsdp" else p.grad
            assert whole.dtype == torch.float32
            torch.testing.assert_close(whole, total, rtol=2.0**-7, atol=1e-3)
        if wrap == "ddp":
            with outer.no_sync():  # type: ignore[operator]
                try:
                    _accumulate(accumulator, outer, own[:1])
                    raise AssertionError("gradients of one process were added up")
                except RuntimeError as error:
                    assert "no_sync()" in str(error)


def _each_of(model: nn.Module, some: list[Any]) -> list[list[Tensor]]:
    found = []
    for x, y in some:
        model.zero_grad()
        loss_of(model, x, y).backward()
        found.append(_gradients(model))
    return found


def test_over_processes(tmp_path: Path) -> None:
    """Each micro-batch is reduced; gradients of one process alone are refused."""
    in_ranks(2, tmp_path, _two)
    assert not distributed.is_initialized()
