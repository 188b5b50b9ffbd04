"""What gradient release is not for: an error that says what to do, wherever it can be told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from releasing import loss_of, tokens, various
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt.release import release_of


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def _adamw(model: nn.Module, **options: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(model.parameters(), backend="reference", **options)


CLIP = fusedopt.GlobalNorm(1.0)


@pytest.mark.parametrize(
    ("error", "message", "make", "clip"),
    [
        (TypeError, "must be a torch.nn.Module, got list", lambda m: ([m], _adamw(m)), None),
        (
            TypeError,
            "one of fusedopt's.*got AdamW",
            lambda m: (m, torch.optim.AdamW(m.parameters())),
            None,
        ),
        (TypeError, "one of fusedopt's.*SVAG", lambda m: (m, _svag(m)), None),
        (ValueError, "clip must be None or", lambda m: (m, _adamw(m, clip=CLIP)), True),
        (ValueError, "takes its bound from the optimizer", lambda m: (m, _adamw(m)), "previous"),
        (
            ValueError,
            'norm of all gradients before the first update.*clip="previous"',
            lambda m: (m, _adamw(m, clip=CLIP)),
            None,
        ),
        (
            ValueError,
            "error_if_nonfinite",
            lambda m: (m, _adamw(m, clip=fusedopt.GlobalNorm(1.0, error_if_nonfinite=True))),
            "previous",
        ),
        (ValueError, "no parameter of this model", lambda m: (_model(), _adamw(m)), None),
        (
            ValueError,
            r"param_groups\[0\]\['params'\]\[2\].*is not of this model",
            lambda m: (m[0], _adamw(m, clip=CLIP)),
            "previous",
        ),
        (
            ValueError,
            "MicroBatchSquares need not have.*PerSampleSquares",
            lambda m: (m, _decoupled(m, fusedopt.MicroBatchSquares())),
            None,
        ),
        (ValueError, "GradSampleSquares", lambda m: (m, _grad_sample(m)), None),
        (ValueError, "leave out clip, or statistics", lambda m: (m, _both(m)), "previous"),
        (ValueError, "_Pair need not", lambda m: (m, _svag(m).optimizer), None),
    ],
)
def test_arguments(error, message, make, clip) -> None:
    model, optimizer = make(_model())
    with pytest.raises(error, match=message):
        fusedopt.gradient_release(model, optimizer, clip=clip)
    if isinstance(optimizer, fusedopt.FusedOptimizer):
        assert optimizer.gradient_release is None
    own = [p for p in getattr(model, "parameters", list)()]
    assert not any(map(release_of, own))


def _svag(model: nn.Module) -> fusedopt.SVAG:
    return fusedopt.SVAG(fusedopt.SGD(model.parameters(), lr=0.1), ell=2)


def _decoupled(model: nn.Module, statistics: Any, **options: Any) -> Any:
    return fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics, **options)


def _grad_sample(model: nn.Module) -> Any:
    return _decoupled(model, fusedopt.GradSampleSquares())


def _both(model: nn.Module) -> Any:
    return _decoupled(model, fusedopt.PerSampleSquares(model), clip=CLIP)


def test_released_twice() -> None:
    model = _model()
    optimizer = _adamw(model)
    release = fusedopt.gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match=r"already: call remove\(\)"):
        fusedopt.gradient_release(model, optimizer)
    other = _adamw(model)
    with pytest.raises(RuntimeError, match="by another optimizer"):
        fusedopt.gradient_release(model, other)
    release.remove()
    fusedopt.gradient_release(model, other)


def test_clipping_that_is_set_later() -> None:
    model = various()
    optimizer = _adamw(model)
    fusedopt.gradient_release(model, optimizer)
    optimizer.clip = CLIP
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="norm of all gradients before the first update"):
        loss_of(model, tokens(1)[0]).backward()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scaler(fused, unscale) -> None:
    """Backward has stepped when the scaler is asked: the first time, this is said."""
    model = _model()
    optimizer = _adamw(model, fused=fused)
    fusedopt.gradient_release(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16 needs none"):
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_another_optimizer_in_backward() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = _model()
    _apply_optimizer_in_backward(fusedopt.AdamW, model.parameters(), {"backend": "reference"})
    with pytest.raises(RuntimeError, match="_apply_optimizer_in_backward"):
        fusedopt.gradient_release(model, _adamw(model))


def test_sparse_gradients_name_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    optimizer = _adamw(model)
    fusedopt.gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[2\].*sparse"):
        model[1](torch.tensor([1, 2])).sum().backward()


def test_wrong_options_name_their_group() -> None:
    model = _model()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer = fusedopt.AdamW(groups, backend="reference")
    fusedopt.gradient_release(model, optimizer)
    optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['lr'\]"):
        model(torch.ones(2, 4)).sum().backward()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["before", "inside", "since"])
def test_distributed_data_parallel(one_process, wrapped) -> None:
    """Its reducer would find the gradients gone, and every process have its own weights."""
    model = _model()
    optimizer = _adamw(model)
    before = [p.detach().clone() for p in model.parameters()]
    outer = model if wrapped == "since" else DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel averages.*fully_shard"):
        fusedopt.gradient_release(outer if wrapped == "before" else model, optimizer)
        outer = DistributedDataParallel(model)
        outer(torch.ones(2, 4)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))


def test_flat_parameters() -> None:
    model = _model()
    model[0].weight._fsdp_flattened = True
    with pytest.raises(RuntimeError, match=r"FSDP1.*fully_shard"):
        fusedopt.gradient_release(model, _adamw(model))
