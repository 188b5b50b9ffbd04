"""torchtitan's container of optimizers, with its own factory, keys, schedules and hooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import batches, loss_of, network
from torch import nn
from torch.distributed import checkpoint as dcp

import fusedopt

pytest.importorskip("torchtitan")
from torchtitan.components.optimizer import (  # noqa: E402
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Fused(OptimizersContainer):
    """As docs/trainers.md has it."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The class that build() makes is the one that this stands in."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return getattr(fusedopt, name)


ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _config(cls: Any, name: str = "AdamW", **more: Any) -> Any:
    own = {"backend": "reference"} if cls is Fused else {}
    return cls.Config(
        param_groups=[
            ParamGroupConfig(
                pattern="bias",
                optimizer_name=name,
                optimizer_kwargs={"lr": 0.03, "weight_decay": 0.0, **more},
            ),
            ParamGroupConfig(
                pattern=".*", optimizer_name="AdamW", optimizer_kwargs={**ADAMW, **more}
            ),
        ],
        implementation="fused",
        optimizer_factory_kwargs_by_name={"AdamW": own, name: own},
    )


def _build(cls: Any, seed: int = 0, name: str = "AdamW", **more: Any) -> tuple[nn.Module, Any]:
    model = network(seed)
    return model, _config(cls, name, **more).build(model_parts=[model])


def _train(model: nn.Module, optimizers: Any, schedulers: Any, seed: int, steps: int = 3) -> None:
    for x, y in batches(steps, 8, seed):
        optimizers.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        if schedulers is not None:
            schedulers.step()


def _bits(model: nn.Module, optimizers: Any) -> list[torch.Tensor]:
    states = [
        x
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        for _, x in sorted(optimizer.state[p].items())
    ]
    return [x.detach().clone().float() for x in [*model.parameters(), *states]]


def _same(one: Any, other: Any, **close: Any) -> None:
    close = close or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(_bits(*one), _bits(*other), **close)


def test_as_torchs_under_schedule_and_hooks() -> None:
    # Catches entries of torch's groups that are not taken, names of parameters that a group loses,
    # and a lr that the scheduler does not reach. torch's fused AdamW rounds otherwise.
    runs, calls = [], []
    for cls in (OptimizersContainer, Fused):
        model, optimizers = _build(cls)
        config = LRSchedulersContainer.Config(warmup_steps=2, total_steps=6)
        schedulers = config.build(optimizers=optimizers, training_steps=6)
        optimizers.register_step_pre_hook(lambda *_, cls=cls: calls.append(cls))
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda *_, cls=cls: calls.append(cls))
        _train(model, optimizers, schedulers, seed=1)
        runs.append((model, optimizers))
    _same(*runs, rtol=2e-6, atol=2e-7)
    assert calls.count(Fused) == calls.count(OptimizersContainer) == 6
    (group, *_) = runs[1][1].optimizers[0].param_groups
    assert group["fused"] is True and group["param_names"] == ["0.bias", "1.bias", "3.bias"]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(Fused, Fused), (Fused, OptimizersContainer), (OptimizersContainer, Fused)],
    ids=["ours", "into torch", "from torch"],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_flat_checkpoints(saved: Any, loaded: Any, stepped: bool, tmp_path: Path) -> None:
    # Catches a key that either side asks for and the other has not, with states and without.
    model, optimizers = _build(saved)
    _train(model, optimizers, None, seed=1)
    dcp.save({"model": model, "optim": optimizers}, checkpoint_id=tmp_path)
    other, theirs = _build(loaded, seed=3)
    if stepped:
        _train(other, theirs, None, seed=5)
    dcp.load({"model": other, "optim": theirs}, checkpoint_id=tmp_path)
    _same((other, theirs), (model, optimizers))
    for m, o in ((model, optimizers), (other, theirs)):
        _train(m, o, None, seed=7)
    close = {} if saved is loaded else {"rtol": 2e-6, "atol": 2e-7}
    _same((other, theirs), (model, optimizers), **close)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Lion", {}),
        ("ScheduleFreeAdamW", {}),
        ("AdamC", {"max_lr": 0.05}),
        ("AdamW", {"state_dtype": "int8"}),
        ("AdamW", {"state_dtype": torch.bfloat16}),
    ],
)
def test_optimizers_and_formats_of_ours_alone(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    # Catches options that are put aside and not found again, by name and by file.
    def made(seed: int) -> tuple[nn.Module, Any]:
        own = {} if name == "AdamC" else more
        model = network(seed)
        config = _config(Fused, name, **own)
        if name == "AdamC":
            config.param_groups[0].optimizer_kwargs |= more
        return model, config.build(model_parts=[model])

    model, optimizers = made(0)
    assert {type(o).__name__ for o in optimizers} == {name, "AdamW"}
    _train(model, optimizers, None, seed=1)
    dcp.save({"model": model, "optim": optimizers}, checkpoint_id=tmp_path)
    other, theirs = made(3)
    dcp.load({"model": other, "optim": theirs}, checkpoint_id=tmp_path)
    for m, o in ((model, optimizers), (other, theirs)):
        _train(m, o, None, seed=7)
    _same((other, theirs), (model, optimizers))


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    # Catches codes that are read as numbers.
    model, optimizers = _build(Fused, state_dtype="int8")
    _train(model, optimizers, None, seed=1)
    dcp.save({"optim": optimizers}, checkpoint_id=tmp_path)
    _, theirs = _build(Fused)
    with pytest.raises(dcp.CheckpointException, match="Missing key"):
        dcp.load({"optim": theirs}, checkpoint_id=tmp_path)


def test_clipping_in_the_step() -> None:
    # What is one for an optimizer goes through the factory's keywords.
    clip = fusedopt.GlobalNorm(0.5)
    config = Fused.Config(
        param_groups=[
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=ADAMW)
        ],
        optimizer_factory_kwargs_by_name={"AdamW": {"clip": clip}},
    )
    model = network()
    optimizers = config.build(model_parts=[model])
    ((x, y),) = batches(1, 8)
    loss_of(model, x, y).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizers.step()
    torch.testing.assert_close(clip.last, expected)
