"""The average in the place of the weights, and in checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedopt
from fusedopt import WeightAverage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 2)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for p in model.parameters():
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def trained(dtype: torch.dtype = torch.float32, kind: Any = fusedopt.AdamW, **options: Any) -> Any:
    model = model_of(dtype)
    options = {"average": WeightAverage(0.5), "backend": "reference", **options}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    train(model, optimizer, range(3))
    return model, optimizer


def bits(tensors: Any) -> list[Tensor]:
    return [t.detach().clone().view(torch.int16) for t in tensors]


FORMATS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master": "remainder"}),
    (torch.float16, {"rounding": "kahan"}),
)


@pytest.mark.parametrize(("dtype", "options"), FORMATS)
def test_swapped_and_restored(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """To the bit, nan and -0 included, whatever is raised; the run goes on as one without."""
    model, optimizer = trained(dtype, **options)
    first = next(model.parameters())
    with torch.no_grad():
        first.view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    before = bits(model.parameters())
    states = [{n: x.clone() for n, x in s.items()} for s in optimizer.state.values()]
    with pytest.raises(KeyError, match="mine"), optimizer.average.applied():
        assert optimizer.average.is_applied
        for p in model.parameters():
            assert torch.equal(p, optimizer.state[p]["ema"].to(dtype))
        with torch.no_grad():
            first.zero_()
        raise KeyError("mine")
    assert all(map(torch.equal, bits(model.parameters()), before))
    for old, new in zip(states, optimizer.state.values(), strict=True):
        assert all(torch.equal(x, new[n]) for n, x in old.items())
    assert not optimizer.average.is_applied
    again, control = trained(dtype, **options)
    with torch.no_grad():
        next(again.parameters()).view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    train(model, optimizer, range(3, 5))
    train(again, control, range(3, 5))
    assert all(map(torch.equal, bits(model.parameters()), bits(again.parameters())))


def test_a_failure_on_the_way_in() -> None:
    """Catches averages that stay where an exchange was not finished."""
    model, optimizer = trained()
    before = bits(model.parameters())
    last = list(model.parameters())[-1]
    optimizer.state[last]["ema"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError), optimizer.average.applied():
        raise AssertionError
    assert all(map(torch.equal, bits(model.parameters()), before))
    assert not optimizer.average.is_applied


def test_errors_within() -> None:
    model, optimizer = trained()
    average = optimizer.average
    state = optimizer.state_dict()
    release = fusedopt.gradient_release(model, optimizer)
    with average.applied():
        with pytest.raises(RuntimeError, match="are applied already"), average.applied():
            raise AssertionError
        applied = bits(model.parameters())
        with pytest.raises(RuntimeError, match="no step can be taken within"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="no state can be loaded within"):
            optimizer.load_state_dict(state)
        with pytest.raises(RuntimeError, match="average cannot be set within"):
            optimizer.average = None
        with pytest.raises(RuntimeError, match="gradients cannot be released within"):
            model(torch.ones(1, 3)).sum().backward()
        assert all(map(torch.equal, bits(model.parameters()), applied))
    release.remove()
    with pytest.raises(RuntimeError, match="no optimizer has this average"):
        with WeightAverage().applied():
            raise AssertionError


def test_autograd_notices() -> None:
    model, optimizer = trained()
    loss = model(torch.ones(1, 3)).sum()
    with optimizer.average.applied(), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_before_the_first_step() -> None:
    model = model_of()
    optimizer = fusedopt.AdamW(model.parameters(), average=WeightAverage())
    before = bits(model.parameters())
    with optimizer.average.applied():
        assert all(map(torch.equal, bits(model.parameters()), before))


def test_gradient_release() -> None:
    """Catches a quick step of one parameter that knows nothing of the average or a new decay."""
    runs = []
    for released in (False, True):
        model = model_of()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, average=WeightAverage(0.5))
        if released:
            handle = fusedopt.gradient_release(model, optimizer)
        for step in range(5):
            optimizer.average.decay = 0.5 + 0.1 * (step > 2)
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            if not released:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([optimizer.state[p]["ema"] for p in model.parameters()])
    handle.remove()
    assert all(map(torch.equal, *runs))


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [fusedopt.AdamW, fusedopt.SGD])
def test_torch_save(kind: Any, dtype: torch.dtype) -> None:
    """The run goes on to the bit; the file's options hold, also where there was no average."""
    average = WeightAverage(0.5, dtype, start=1)
    model, optimizer = trained(torch.bfloat16, kind, average=average, master="remainder")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = model_of(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    loaded = kind(other.parameters(), lr=0.5, backend="reference")
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert repr(loaded.average) == repr(average)
    train(model, optimizer, range(3, 5))
    train(other, loaded, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert loaded.state[q]["ema"].dtype == dtype
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, loaded.state[q][name]), name


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_torchs_files_and_back(name: str) -> None:
    """Torch's file has no average: it begins as the parameter. Ours loads into torch's class."""
    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)
    more = {"momentum": 0.9} if name == "SGD" else {}
    model = model_of()
    source = theirs(model.parameters(), lr=0.1, **more)
    train(model, source, range(3))
    more["backend"] = "reference"
    optimizer = ours(model.parameters(), lr=0.1, average=WeightAverage(0.5), **more)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.average.decay == 0.5
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(3, 4))
    for p, old in zip(model.parameters(), before, strict=True):
        # SGD's count begins here, and the first average is a copy.
        wanted = p.detach() if name == "SGD" else (old + p.detach()) / 2
        torch.testing.assert_close(optimizer.state[p]["ema"], wanted)
    source.load_state_dict(optimizer.state_dict())
    train(model, source, range(4, 5))
    for exported in fusedopt.export_state_dict(optimizer)["state"].values():
        assert "ema" not in exported
    assert "average_decay" not in fusedopt.export_state_dict(optimizer)["param_groups"][0]


def test_an_average_that_was_taken_away() -> None:
    """Catches one that begins anew in silence."""
    model, optimizer = trained()
    p = next(model.parameters())
    del optimizer.state[p]["ema"]
    with pytest.raises(KeyError, match="its state has no 'ema'"):
        train(model, optimizer, range(3, 4))
    saved = trained()[1].state_dict()
    del saved["state"][0]["ema"]
    with pytest.raises(KeyError, match="its state has no 'ema'"):
        trained()[1].load_state_dict(saved)
    saved["state"][0]["ema"] = torch.zeros(2)
    with pytest.raises(ValueError, match="its state 'ema' in the checkpoint has shape"):
        trained()[1].load_state_dict(saved)


@pytest.mark.parametrize("kind", [fusedopt.AdamW, fusedopt.SGD])
def test_distributed_checkpoint(kind: Any, tmp_path: Path) -> None:
    model, optimizer = trained(kind=kind)
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    other = model_of()
    loaded = kind(other.parameters(), lr=0.5, average=WeightAverage(0.5))
    state = {"o": get_optimizer_state_dict(other, loaded)}
    # It creates states by a step of zeros, which counts none.
    assert all(torch.equal(loaded.state[p]["ema"], p) for p in other.parameters())
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, loaded, state["o"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(loaded.state[q]["ema"], optimizer.state[p]["ema"])
        assert loaded.state[q]["step"] == 3
