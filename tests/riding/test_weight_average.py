"""``average=WeightAverage``: values, against loops by hand in float64 and torch's AveragedModel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from marks import both_backends
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt import WeightAverage
from fusedopt.memory import parameter as codec

SHAPES = ((1030,), (3, 5), ())
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fusedopt.AdamW, {"lr": 0.1, "betas": (0.6, 0.8), "weight_decay": 0.3}),
    "SGD": (fusedopt.SGD, {"lr": 0.3}),
    "SGD momentum": (fusedopt.SGD, {"lr": 0.1, "momentum": 0.8}),
    "RMSprop": (fusedopt.RMSprop, {"lr": 0.03, "centered": True}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def params_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def give(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(kind: str, params: list[nn.Parameter], **options: Any) -> Any:
    cls, own = KINDS[kind]
    return cls(params, **own, **options)


def follow(averages: list[Tensor] | None, params: list[Tensor], decay: float) -> list[Tensor]:
    """The average by hand: a copy at first."""
    values = [p.detach().double().clone() for p in params]
    if averages is None:
        return values
    return [decay * a + (1 - decay) * v for a, v in zip(averages, values, strict=True)]


def emas(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p]["ema"] for p in params]


@both_backends
@each_kind
@pytest.mark.parametrize(("capturable", "start"), [(False, 0), (True, 2)])
def test_by_hand(kind: str, backend: str, capturable: bool, start: int) -> None:
    """Catches a first average that is not a copy, one that begins a step off, and a stale decay."""
    params = params_of(torch.float64)
    average = WeightAverage(0.75, dtype=None, start=start)
    optimizer = make(kind, params, average=average, backend=backend, capturable=capturable)
    wanted = None
    for step in range(1, 7):
        average.decay = 0.75 if step < 5 else 0.25
        give(params, step)
        optimizer.step()
        wanted = follow(wanted if step > start + 1 else None, params, average.decay)
        for found, value in zip(emas(optimizer, params), wanted, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-15)


@both_backends
def test_as_torchs_averaged_model(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 300))
    optimizer = fusedopt.AdamW(
        model.parameters(), lr=0.01, average=WeightAverage(0.9), backend=backend
    )
    control = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(8):
        model(torch.randn(3, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        control.update_parameters(model)
    for p, q in zip(model.parameters(), control.module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], q.detach(), rtol=1e-6, atol=1e-7)


F32, BF16 = torch.float32, torch.bfloat16
# Of the parameter, options, and of the average.
FORMATS: tuple[tuple[torch.dtype, dict[str, Any], torch.dtype], ...] = (
    (F32, {}, F32),
    (F32, {}, BF16),
    (F32, {"state_dtype": "int8"}, F32),
    (BF16, {}, F32),
    (BF16, {"rounding": "stochastic"}, BF16),
    (BF16, {"rounding": "kahan"}, F32),
    (BF16, {"master": "remainder"}, F32),
    (BF16, {"master": "remainder8", "rounding": "stochastic", "state_dtype": "fp8"}, BF16),
    (torch.float16, {"master": "float32", "state_dtype": F32}, BF16),
)


@both_backends
@pytest.mark.parametrize(("of", "options", "dtype"), FORMATS)
def test_nothing_else_changes(
    of: torch.dtype, options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    """Parameters and states are the same to the bit; the average is that of the full parameter."""
    runs = []
    for average in (None, WeightAverage(0.75, dtype)):
        params = params_of(of)
        optimizer = make("AdamW", params, average=average, backend=backend, **options)
        wanted = None
        for step in range(3):
            give(params, step)
            optimizer.step()
            full = [whole(optimizer, p, options) for p in params]
            wanted = follow(wanted, full, 0.75)
        runs.append((params, optimizer))
    (plain, without), (params, optimizer) = runs
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
        for name, value in without.state[q].items():
            assert torch.equal(value.float(), optimizer.state[p][name].float()), name
    # The parameter is rounded, unless there is a master; the average in 16 bits is, each time.
    unit = 2.0**-7 if of != torch.float32 and "master" not in options else 2.0**-16
    unit = max(unit, 2.0**-6 if dtype == torch.bfloat16 else 0.0)
    for found, value in zip(emas(optimizer, params), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), value, rtol=unit, atol=unit)


def whole(optimizer: Any, p: Tensor, options: dict[str, Any]) -> Tensor:
    """The parameter that a master has the rest of."""
    master = optimizer.state[p].get("master")
    if master is None:
        return p
    kind = "float32" if options["master"] == "float32" else "remainder"
    return codec.load(p.detach(), master, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_in_16_bits(dtype: torch.dtype) -> None:
    """Catches rounding to nearest, by which 1 - decay = 2^-11 of a unit never moves the average.

    And backends that draw differently.
    """
    found = []
    for backend in ("reference", "triton"):
        p = nn.Parameter(torch.ones(1024))
        optimizer = fusedopt.SGD(
            [p], lr=1.0, average=WeightAverage(1 - 2**-11, dtype), backend=backend
        )
        p.grad = torch.zeros(1024)
        optimizer.step()
        p.grad = torch.full((1024,), -1.0)
        optimizer.step()
        p.grad.zero_()
        for _ in range(7):
            optimizer.step()
        found.append(optimizer.state[p]["ema"])
    assert torch.equal(*found)
    moved = found[0].double().mean().item() - 1
    wanted = 1 - (1 - 2**-11) ** 8
    assert abs(moved - wanted) < 0.15 * wanted


@both_backends
def test_parameter_and_average_are_rounded_independently(backend: str) -> None:
    """Catches the same bits for both: at decay 0 they are rounded from the same number."""
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD(
        [p], lr=1.0, rounding="stochastic", average=WeightAverage(0.0, torch.bfloat16),
        backend=backend,
    )  # fmt: skip
    # Half-way between neighbours.
    p.grad = torch.full((4096,), -(2.0**-8), dtype=torch.bfloat16)
    optimizer.step()
    up, average_up = p > 1, optimizer.state[p]["ema"] > 1
    for found in (up, average_up, up == average_up):
        assert abs(found.double().mean().item() - 0.5) < 0.03


@both_backends
def test_per_sample_gradients(backend: str) -> None:
    """The kernel that reduces samples and updates, too."""
    torch.manual_seed(0)
    runs = []
    for average in (None, WeightAverage(0.5)):
        params = params_of()
        optimizer = fusedopt.BatchDecoupledAdam(
            params, lr=0.1, statistics=fusedopt.GradSampleSquares(), average=average,
            backend=backend,
        )  # fmt: skip
        wanted = None
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad_sample = torch.randn(4, *p.shape, generator=generator)
            optimizer.step()
            wanted = follow(wanted, params, 0.5)
        runs.append((params, optimizer, wanted))
    (plain, _, _), (params, optimizer, wanted) = runs
    assert all(map(torch.equal, params, plain))
    for found, value in zip(emas(optimizer, params), wanted, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)


@both_backends
def test_complex_parameters_and_strides(backend: str) -> None:
    p = nn.Parameter(torch.randn(5, 7, dtype=torch.complex64).t())
    optimizer = fusedopt.AdamW([p], lr=0.1, average=WeightAverage(0.5), backend=backend)
    wanted = None
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        value = p.detach().clone()
        wanted = value if wanted is None else (wanted + value) / 2
    assert optimizer.state[p]["ema"].stride() == p.stride()
    torch.testing.assert_close(optimizer.state[p]["ema"], wanted)


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
def test_skipped_steps(backend: str, capturable: bool) -> None:
    """An overflow changes neither average nor count: the first average is still a copy."""
    params = params_of()
    optimizer = make(
        "AdamW", params, average=WeightAverage(0.5, start=1), backend=backend,
        capturable=capturable,
    )  # fmt: skip
    wanted, taken = None, 0
    for step, overflow in enumerate([False, True, False, False, True, False]):
        give(params, step)
        optimizer.grad_scale = None
        optimizer.found_inf = torch.tensor(float(overflow))
        optimizer.step()
        if not overflow:
            taken += 1
            wanted = follow(wanted if taken > 2 else None, params, 0.5)
        for found, value in zip(emas(optimizer, params), wanted, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)


@both_backends
def test_parameters_without_a_gradient(backend: str) -> None:
    """Neither they nor their averages change, and their first average is of their first step."""
    params = params_of()
    optimizer = make("SGD", params, average=WeightAverage(0.5), backend=backend)
    give(params, 0)
    params[1].grad = None
    optimizer.step()
    assert params[1] not in optimizer.state
    before = optimizer.state[params[0]]["ema"].clone()
    give(params, 1)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["ema"], before)
    assert torch.equal(optimizer.state[params[1]]["ema"], params[1])


def test_by_group() -> None:
    """Catches a decay or a start of another group, and one that is None."""
    params = params_of(torch.float64)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "average_decay": 0.25, "average_start": 1},
        {"params": params[2:], "average_decay": None},
    ]
    average = WeightAverage(0.75, dtype=None)
    optimizer = fusedopt.AdamW(groups, lr=0.1, average=average, backend="triton")
    first = second = None
    for step in range(1, 5):
        give(params, step)
        optimizer.step()
        first = follow(first, params[:1], 0.75)
        second = follow(second if step > 2 else None, params[1:2], 0.25)
    assert "ema" not in optimizer.state[params[2]]
    torch.testing.assert_close(emas(optimizer, params[:2]), [*first, *second])
    with pytest.raises(ValueError, match="groups differ"):
        _ = average.decay
    assert average.dtype is None


@both_backends
def test_numbers_are_live(backend: str) -> None:
    """A new decay makes no new plan; a tensor is read where it is, and on the device if there."""
    params = params_of()
    decay = torch.tensor(0.5, dtype=torch.float64)
    optimizer = make("SGD", params, average=WeightAverage(decay), backend=backend, capturable=True)
    wanted, plans = None, set()
    for step in range(5):
        decay.fill_(0.5 + 0.1 * step)
        give(params, step)
        optimizer.step()
        plans.add(id(optimizer._engine.plan))
        wanted = follow(wanted, params, decay.item())
    for found, value in zip(emas(optimizer, params), wanted, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)
    other = make("AdamW", params, average=WeightAverage(0.5), backend=backend)
    for step in range(3):
        other.average.decay = 0.5 + 0.1 * step
        give(params, step)
        other.step()
        plans.add(id(other._engine.plan))
    assert len(plans) == 2


def test_set_between_steps() -> None:
    """An average that begins later begins as the parameter, and its master; none deletes it."""
    params = params_of(torch.bfloat16)
    optimizer = make("AdamW", params, master="remainder")
    for step in range(3):
        give(params, step)
        optimizer.step()
    before = [whole(optimizer, p, {"master": "remainder"}).clone() for p in params]
    assert any(not torch.equal(x, p.float()) for x, p in zip(before, params, strict=True))
    optimizer.average = average = WeightAverage(0.5)
    give(params, 3)
    optimizer.step()
    now = [whole(optimizer, p, {"master": "remainder"}) for p in params]
    wanted = [(x + y) / 2 for x, y in zip(before, now, strict=True)]
    torch.testing.assert_close(emas(optimizer, params), wanted)
    assert optimizer.average is average
    optimizer.average = None
    assert not any("ema" in optimizer.state[p] for p in params)
    give(params, 4)
    optimizer.step()
    assert optimizer.average is None and "average_decay" not in optimizer.param_groups[0]


def test_copies_have_their_own() -> None:
    params = params_of()
    optimizer = make("AdamW", params, average=WeightAverage(0.5))
    give(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.average is not optimizer.average and twin.average.decay == 0.5
    twin.average.decay = 0.25
    assert optimizer.average.decay == 0.5
    (p, *_) = twin.param_groups[0]["params"]
    with twin.average.applied():
        assert torch.equal(p, twin.state[p]["ema"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, "decay must be a number from 0 to 1, got 1.5"),
        ({"decay": "a"}, ValueError, "decay must be a number from 0 to 1, got 'a'"),
        ({"decay": torch.ones(2)}, ValueError, "decay must be a number"),
        ({"dtype": torch.float64}, ValueError, "dtype must be torch.float32, torch.bfloat16"),
        ({"dtype": "int8"}, ValueError, "dtype must be torch.float32"),
        ({"start": -1}, ValueError, "start must be an int of at least 0, got -1"),
        ({"start": 1.0}, ValueError, "start must be an int of at least 0, got 1.0"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        WeightAverage(**arguments)
    with pytest.raises(error, match=f"average_{message}"):
        name, value = arguments.popitem()
        group = {"params": params_of(), f"average_{name}": value}
        fusedopt.SGD([group], average=WeightAverage())


def test_refusals() -> None:
    params = params_of()
    with pytest.raises(TypeError, match=r"average must be a fusedopt.WeightAverage or None, got 0"):
        fusedopt.SGD(params, average=0.99)
    average = WeightAverage()
    optimizer = fusedopt.SGD(params, average=average)
    with pytest.raises(ValueError, match="make a WeightAverage for each"):
        fusedopt.SGD(params_of(), average=average)
    with pytest.raises(ValueError, match="average_dtype=None keeps the average of one of shape"):
        fusedopt.SGD(params_of(torch.bfloat16), average=WeightAverage(dtype=None))
    complex_one = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="average_dtype=torch.bfloat16 is for real parameters"):
        fusedopt.SGD([complex_one], average=WeightAverage(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="SVAG's theory covers only average_decay=None"):
        fusedopt.SVAG(optimizer, ell=2)
    with pytest.raises(ValueError, match="average is one for all groups"):
        optimizer.add_param_group({"params": params_of(), "average": WeightAverage()})
    del optimizer
    # Whose optimizer is gone, is free.
    fusedopt.SGD(params, average=average)
