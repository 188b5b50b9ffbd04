"""``PerSampleSquares`` taken away: what it leaves behind, in the model, its copies and memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from marks import both_backends
from observed import Everything, adam_of, pass_of
from per_sample import (
    DEVICE,
    DTYPES,
    Expected,
    assert_near,
    check_squares,
    gather,
    mlp,
    randint,
    randn,
    squared_error,
    to,
)
from torch import Tensor, nn

from fusedopt import PerSampleSquares

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def _anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have changed: classes, attributes, hooks, parameters."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        found[name, "forward"] = getattr(module.forward, "__func__", module.forward)
        found[name, "attributes"] = sorted(module.__dict__)
        found[name, "hooks"] = [len(getattr(module, hook)) for hook in HOOKS]
        found[name, "own"] = [id(p) for p in module.parameters(recurse=False)]
        found[name, "buffers"] = sorted(n for n, _ in module.named_buffers())
    for name, p in model.named_parameters():
        found[name, "parameter"] = (type(p), sorted(p.__dict__), len(p._backward_hooks or ()))
        found[name, "accumulated"] = len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
    return found


@both_backends
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_remove_leaves_the_model_as_it_was(used: bool, backend: str) -> None:
    model = to(DTYPES[backend], Everything())[0]
    ids = randint(7, 3, 4)
    before = _anatomy(model)
    names = list(model.state_dict())
    statistics = PerSampleSquares(model, backend=backend)
    assert list(model.state_dict()) == names, "attaching may not change what a checkpoint holds"
    if used:
        pass_of(model, ids)
        model.zero_grad()
    statistics.remove()
    assert _anatomy(model) == before
    # The graph is torch's own again.
    plain = copy.deepcopy(model)
    for m in (model, plain):
        m.zero_grad()
        pass_of(m, ids)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    statistics.remove()  # again: nothing happens


def test_remove_keeps_hooks_of_others() -> None:
    """And does not run them in another order, nor twice."""
    model = mlp().to(DEVICE)
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append("first"))
    statistics = PerSampleSquares(model)
    model[0].register_forward_hook(lambda *a: calls.append("second"))
    pass_of(model, randn(3, 4))
    assert calls == ["first", "second"]
    statistics.remove()
    pass_of(model, randn(3, 4))
    assert calls == ["first", "second"] * 2


def test_attach_again_after_removal() -> None:
    (model,) = to(torch.float64, Everything())
    PerSampleSquares(model).remove()
    gather(model, randint(7, 3, 4))


def test_attached_twice_is_refused_or_right() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    expected = Expected.of(copy.deepcopy(model), [(x,)], squared_error())
    first = PerSampleSquares(model)
    try:
        second = PerSampleSquares(model)
    except (RuntimeError, ValueError):
        return
    pass_of(model, x)
    check_squares(first, model, expected)
    check_squares(second, model, expected)


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False, map_location=DEVICE),
    }


@pytest.mark.parametrize("when", ["attached", "forward", "backward"])
def test_copies_are_plain_models(when: str) -> None:
    """No statistics in a copy: it trains by autograd and adds nothing to the original's squares."""
    (model,) = to(torch.float64, Everything())
    ids = randint(7, 3, 4)
    before = _anatomy(model)
    expected = Expected.of(copy.deepcopy(model), [(ids,)], squared_error())
    statistics = PerSampleSquares(model)
    if when == "forward":
        out = model(ids)
        for name, twin in _copies(model).items():
            _check_plain(name, twin, before, ids, expected)
        squared_error()(out).sum().backward()
    else:
        if when == "backward":
            pass_of(model, ids)
        for name, twin in _copies(model).items():
            twin.zero_grad()
            _check_plain(name, twin, before, ids, expected)
        if when == "attached":
            pass_of(model, ids)
    check_squares(statistics, model, expected)


def _check_plain(name: str, twin: nn.Module, before: Any, ids: Tensor, expected: Expected) -> None:
    anatomy = _anatomy(twin)
    for key in before:
        if key[1] in ("class", "hooks", "attributes", "buffers"):
            assert anatomy[key] == before[key], f"{name}: {key}"
    pass_of(twin, ids)
    for key, p in twin.named_parameters():
        assert_near(p.grad, expected.rows[key].sum(0), 1e-11, f"{name}: {key}")
    assert twin.head.weight is twin.embedding.weight
    with pytest.raises(RuntimeError):  # and can be attached to, once its mode allows
        PerSampleSquares(nn.Sequential(twin, nn.BatchNorm1d(4)))
    PerSampleSquares(twin).remove()


def test_statistics_of_a_copy() -> None:
    model, x = to(torch.float64, mlp(), randn(3, 4))
    PerSampleSquares(model)
    gather(copy.deepcopy(model), x)


def test_ema_of_the_weights() -> None:
    """AveragedModel deep-copies at construction and reads the model at every update."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = adam_of(model, statistics)
    for _ in range(2):
        pass_of(model, x)
        optimizer.step()
        averaged.update_parameters(model)
        optimizer.zero_grad()
        with torch.no_grad():
            averaged(x)


def test_garbage_is_collected() -> None:
    """A model that nobody holds goes, with its statistics: no global table keeps it."""
    model, x = to(torch.float64, mlp(), randn(3, 4))
    statistics = PerSampleSquares(model)
    pass_of(model, x)
    alive = [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(statistics)]
    del model, statistics
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@both_backends
def test_activations_are_freed(backend: str) -> None:
    """After backward nothing holds inputs or errors of a layer; without backward neither."""
    (model,) = to(DTYPES[backend], mlp())
    statistics = PerSampleSquares(model, backend=backend)
    x = randn(3, 4, dtype=DTYPES[backend])
    alive = weakref.ref(x)
    pass_of(model, x)
    del x
    gc.collect()
    assert alive() is None
    x = randn(3, 4, dtype=DTYPES[backend], seed=5)
    alive = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert alive() is None, "a forward without a backward keeps its input"
    assert statistics.samples in (3, 6)
