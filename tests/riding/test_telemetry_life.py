"""``telemetry=Telemetry`` in an optimizer: names, copies, changes between steps, refusals."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from marks import both_backends
from norms_by_hand import bits, check, give, norm, rows, same
from releasing import loss_of, tokens, two_groups, various
from torch import Tensor, nn

import fusedopt
from fusedopt import Telemetry
from fusedopt import telemetry as module


def params_of() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=drawn)) for s in ((20,), (3, 5))]


def sgd(params: Any, telemetry: Any, **options: Any) -> Any:
    return fusedopt.SGD(params, **{"lr": 0.5, **options}, telemetry=telemetry)


def take(optimizer: Any, params: list[nn.Parameter]) -> Tensor:
    """Take a step; return its norms by hand."""
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return rows([p.grad for p in params], before, params)


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, ValueError, "every must be at least 1, got 0"),
        (-3, ValueError, "every must be at least 1, got -3"),
        (True, TypeError, "every must be an int, got True"),
        (2.5, TypeError, "every must be an int, got 2.5"),
        ("2", TypeError, "every must be an int, got '2'"),
    ],
)
def test_bad_every(every: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Telemetry(every=every)


def test_bad_telemetry() -> None:
    """Refused before anything of the optimizer has changed."""
    params = params_of()
    for bad in (True, 3, "all", Telemetry):
        with pytest.raises(TypeError, match=r"telemetry must be a fusedopt\.Telemetry or None"):
            sgd(params, bad)
    telemetry = Telemetry()
    optimizer = sgd(params, telemetry)
    with pytest.raises(TypeError, match="telemetry must be"):
        optimizer.telemetry = 1
    assert optimizer.telemetry is telemetry
    with pytest.raises(ValueError, match="telemetry is one for all groups"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(1))], "telemetry": Telemetry()}
        )
    assert len(optimizer.param_groups) == 1


def test_one_optimizer_has_it() -> None:
    params, telemetry = params_of(), Telemetry(every=2)
    first = sgd(params[:1], telemetry)
    with pytest.raises(ValueError, match="one optimizer's: make a Telemetry for each"):
        sgd(params[1:], telemetry)
    second = sgd(params[1:], None)
    with pytest.raises(ValueError, match="one optimizer's"):
        second.telemetry = telemetry
    assert second.telemetry is None
    give(params, 0)
    first.step()
    # Set again it stays; of one that is gone it is free, and begins anew.
    first.telemetry = telemetry
    assert telemetry.measured and telemetry.norms.shape == (1, 3)
    del first
    gc.collect()
    second.telemetry = telemetry
    assert not telemetry.measured
    with pytest.raises(RuntimeError, match="no step was measured yet"):
        telemetry.norms  # noqa: B018
    wanted = take(second, params[1:])
    assert telemetry.measured
    check(telemetry.norms, wanted)


def test_nothing_to_read() -> None:
    telemetry = Telemetry()
    for read in (lambda: telemetry.norms, telemetry.table, telemetry.log_dict):
        with pytest.raises(RuntimeError, match="no optimizer has this Telemetry"):
            read()
    params = params_of()
    optimizer = sgd(params, telemetry)
    for read in (lambda: telemetry.norms, telemetry.table, telemetry.log_dict):
        with pytest.raises(RuntimeError, match="no step was measured yet"):
            read()
    give(params, 0)
    wanted = take(optimizer, params)
    check(telemetry.norms, wanted)


def test_meshes_with_nothing_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches advice about GlobalNorm, which this has nothing to do with."""

    def apart(*_: Any) -> Any:
        raise RuntimeError("name those to be clipped together, GlobalNorm(...)")

    params, telemetry = params_of(), Telemetry()
    optimizer = sgd(params, telemetry)
    give(params, 0)
    optimizer.step()
    monkeypatch.setattr(module, "in_several_processes", lambda: True)
    monkeypatch.setattr(module, "span_of", apart)
    with pytest.raises(RuntimeError, match=r"an optimizer, and a Telemetry, for each mesh"):
        telemetry.norms  # noqa: B018


@both_backends
def test_set_between_steps(backend: str) -> None:
    """Bits are those without; another begins anew, and what was None is measured from then on."""
    found = []
    for changes in (False, True):
        params = params_of()
        optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend)
        first, second = Telemetry(every=2), Telemetry()
        for step in range(6):
            if changes:
                optimizer.telemetry = (None, first, first, None, second, first)[step]
            give(params, step)
            wanted = take(optimizer, params)
            if changes and step in (1, 4, 5):
                assert optimizer.telemetry.measured
                check(optimizer.telemetry.norms, wanted)
            if changes and step == 2:
                assert not first.measured
        found.append(bits(optimizer, params))
    assert same(*found)


@both_backends
def test_copies(backend: str) -> None:
    """They measure their own steps from the first on, and nothing of it is saved."""
    params, telemetry = params_of(), Telemetry(every=2)
    optimizer = sgd(params, telemetry, momentum=0.9, backend=backend)
    give(params, 0)
    optimizer.step()
    before = telemetry.norms
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = twin.param_groups[0]["params"]
        assert twin.telemetry is not telemetry and twin.telemetry.every == 2
        assert not twin.telemetry.measured
        with pytest.raises(RuntimeError, match="no step was measured yet"):
            twin.telemetry.norms  # noqa: B018
        give(theirs, 1)
        wanted = take(twin, theirs)
        assert twin.telemetry.measured
        check(twin.telemetry.norms, wanted)
        assert torch.equal(telemetry.norms, before)
    for alone in (copy.deepcopy(telemetry), pickle.loads(pickle.dumps(telemetry))):
        assert repr(alone) == repr(telemetry) == "Telemetry(every=2)"
        other = sgd(params_of(), alone)
        assert other.telemetry is alone


def test_state_dict_has_nothing_of_it() -> None:
    saved = []
    for telemetry in (None, Telemetry()):
        params = params_of()
        optimizer = fusedopt.AdamW(params, lr=0.1, telemetry=telemetry)
        give(params, 0)
        optimizer.step()
        saved.append(optimizer.state_dict())
    assert telemetry is not None
    # Wrappers put all arguments of the constructor into groups.
    optimizer.param_groups[0]["telemetry"] = telemetry
    saved.append(optimizer.state_dict())
    assert "telemetry" not in repr(saved).lower()
    assert repr(saved[0]) == repr(saved[1]) == repr(saved[2])
    optimizer.load_state_dict(saved[0])
    assert optimizer.telemetry is telemetry
    give(params, 1)
    wanted = take(optimizer, params)
    check(telemetry.norms, wanted)


def test_names_and_numbers() -> None:
    """Of ``table`` and ``log_dict``, by name in the order of the groups."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    telemetry = Telemetry()
    optimizer = sgd(model.named_parameters(), telemetry)
    params = list(model.parameters())
    give(params, 0)
    params[1].grad = None
    take(optimizer, params)
    norms = telemetry.norms.tolist()
    table = telemetry.table()
    assert list(table) == ["0.weight", "0.bias", "1.weight"]
    for (name, own), (gradient, parameter, update) in zip(table.items(), norms, strict=True):
        if name == "0.bias":
            assert all(map(math.isnan, (*own, own.ratio)))
            continue
        assert own == (gradient, parameter, update)
        assert (own.gradient, own.parameter, own.update) == (gradient, parameter, update)
        assert own.ratio == update / parameter
    found = telemetry.log_dict("train/")
    keys = ("grad_norm", "param_norm", "update_norm", "update_ratio")
    names = ("", "/0.weight", "/1.weight")
    assert set(found) == {f"train/{key}{name}" for key in keys for name in names}
    assert all(type(x) is float for x in found.values())
    assert found["train/grad_norm/0.weight"] == norms[0][0]
    assert found["train/update_ratio/1.weight"] == norms[2][2] / norms[2][1]
    for column, key in enumerate(keys[:3]):
        total = math.sqrt(norms[0][column] ** 2 + norms[2][column] ** 2)
        assert found[f"train/{key}"] == pytest.approx(total, rel=1e-12)
    wanted = found["train/update_norm"] / found["train/param_norm"]
    assert found["train/update_ratio"] == pytest.approx(wanted, rel=1e-12)
    assert telemetry.log_dict().keys() == {key.removeprefix("train/") for key in found}


def test_printed() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.zero_()
    telemetry = Telemetry()
    optimizer = sgd(model.named_parameters(), telemetry, lr=0.25)
    model.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert str(telemetry.table()).splitlines() == [
        "parameter  gradient norm  parameter norm  update norm  update / parameter",
        "weight                 0               5            0                   0",
        "bias                 nan             nan          nan                 nan",
    ]


def test_names_without_names() -> None:
    """Also of what was added to a group, or as a group, later."""
    params = params_of()
    telemetry = Telemetry()
    optimizer = sgd([{"params": params[:1]}, {"params": params[1:]}], telemetry)
    give(params, 0)
    optimizer.step()
    assert list(telemetry.table()) == ["group0.param0", "group1.param0"]
    more = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(more)
    give([*params, more], 1)
    optimizer.step()
    assert list(telemetry.table()) == ["group0.param0", "group0.param1", "group1.param0"]
    assert telemetry.table()["group0.param1"].gradient == pytest.approx(norm(more.grad))
    # Taken out of its group, it is no more in the norms, either.
    optimizer.param_groups[0]["params"].remove(params[0])
    assert list(telemetry.table()) == ["group0.param0", "group1.param0"]
    assert telemetry.table()["group0.param0"].gradient == pytest.approx(norm(more.grad))


def test_zero_parameters() -> None:
    """The ratio is inf, or nan where the update is zero, too."""
    params = [nn.Parameter(x) for x in (torch.zeros(3), torch.ones(2), torch.zeros(0))]
    telemetry = Telemetry()
    optimizer = sgd(params, telemetry, lr=1.0)
    for p, gradient in zip(params, (0.0, 1.0, 1.0), strict=True):
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    root = pytest.approx(2**0.5)
    assert telemetry.norms.tolist() == [[0.0] * 3, [root, 0.0, root], [0.0] * 3]
    first, second, third = telemetry.table().values()
    # A step of 1 has made zeros of ones.
    assert math.isnan(first.ratio) and second.ratio == math.inf and math.isnan(third.ratio)
    assert str(telemetry.table()).splitlines()[2].split()[-1] == "inf"
    assert telemetry.log_dict()["update_ratio"] == math.inf


@both_backends
def test_released(backend: str) -> None:
    """Each backward pass is a step: norms as those of steps after it, and the same bits."""
    runs = []
    for released in (False, True):
        model = various()
        telemetry = Telemetry(every=2)
        optimizer = fusedopt.AdamW(two_groups(model), lr=0.1, telemetry=telemetry, backend=backend)
        if released:
            fusedopt.gradient_release(model, optimizer)
        found = []
        for step, batch in enumerate(tokens(4)):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert telemetry.measured == (step % 2 == 0)
            found.append(telemetry.norms)
        runs.append((bits(optimizer, list(model.parameters())), torch.stack(found)))
    (ours, norms), (theirs, wanted) = runs
    assert same(ours, theirs)
    torch.testing.assert_close(norms, wanted, rtol=1e-6, atol=0, equal_nan=True)
    # Two frozen ones and two of a layer that is not used.
    assert norms[0].isnan().all(1).sum() == 4 and not torch.equal(norms[0, -1], norms[2, -1])


@both_backends
def test_released_and_clipped(backend: str) -> None:
    """By the norm of the pass before: the gradient is the one before clipping."""
    model, control = various(), various()
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(
        model.parameters(), lr=0.5, clip=fusedopt.GlobalNorm(0.1), telemetry=telemetry,
        backend=backend,
    )  # fmt: skip
    fusedopt.gradient_release(model, optimizer, clip="previous")
    last = None
    for batch in tokens(3):
        control.load_state_dict(model.state_dict())
        control.zero_grad()
        loss_of(control, batch).backward()
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, batch).backward()
        wanted = rows([p.grad for p in control.parameters()], before, list(model.parameters()))
        check(telemetry.norms, wanted, 2e-5)
        factor = 1.0 if last is None else min(1.0, 0.1 / last)
        wanted[:, 2] = 0.5 * factor * wanted[:, 0]
        check(telemetry.norms, wanted, 2e-5)
        last = wanted[:, 0].nan_to_num().square().sum().sqrt().item()
