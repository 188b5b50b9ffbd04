"""Who keeps whom: copies, pickles, and what is freed when it is let go."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from releasing import loss_of, tokens, various
from torch import nn

import fusedopt


def _released() -> tuple[nn.Module, Any]:
    model = various()
    optimizer = fusedopt.AdamW(model.parameters(), backend="reference")
    fusedopt.gradient_release(model, optimizer)
    loss_of(model, tokens(1)[0]).backward()
    return model, optimizer


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """So that what is freed is freed by its last reference, and no circle is broken."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_nothing_is_kept() -> None:
    """Hooks of parameters are not followed by the collector: a circle through one stays."""
    model, optimizer = _released()
    found = [weakref.ref(x) for x in (model, optimizer, optimizer.gradient_release)]
    found += map(weakref.ref, model.parameters())
    del model, optimizer
    assert [ref() for ref in found] == [None] * len(found)


@pytest.mark.usefixtures("_no_collection")
def test_an_optimizer_that_was_deleted_is_missed_once() -> None:
    # Catches training that goes on without a single update, and says nothing.
    model, optimizer = _released()
    batch = tokens(1)[0]
    del optimizer
    with pytest.raises(RuntimeError, match="was deleted: keep it"):
        loss_of(model, batch).backward()
    model.zero_grad()
    loss_of(model, batch).backward()
    other = fusedopt.SGD(model.parameters(), lr=0.1)
    before = model.gain.detach().clone()
    other.step()
    assert not torch.equal(model.gain, before)


@pytest.mark.parametrize("how", ["copied", "pickled", "saved"])
def test_copies_come_without(how) -> None:
    def again(x: Any) -> Any:
        if how == "copied":
            return copy.deepcopy(x)
        if how == "pickled":
            return pickle.loads(pickle.dumps(x))
        memory = io.BytesIO()
        torch.save(x, memory)
        memory.seek(0)
        return torch.load(memory, weights_only=False)

    model, optimizer = _released()
    pair = again((model, optimizer))
    twin, other = pair
    assert other.gradient_release is None
    batch = tokens(2)[1]
    loss_of(twin, batch).backward()
    assert twin.gain.grad is not None
    other.step()
    loss_of(model, batch).backward()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert optimizer.state[model.gain]["step"] == other.state[twin.gain]["step"] == 2
