"""rescale_ of an optimizer whose state another one has: ZeroRedundancyOptimizer, and others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch.nn import Parameter

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning'),
    # The import of torch.distributed.optim.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

CASES = [
    (fusedopt.AdamW, {"lr": 0.1, "backend": "reference"}, "sqrt"),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}, "sqrt"),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}, "decoupled"),
]


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [Parameter(torch.randn(n, 2, generator=generator)) for n in (4, 3, 5, 1)]


def step(optimizer, params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def sharded(params: list[Parameter], cls, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=cls, **options)


def follow(rank: int, cls, options: dict, rule: str) -> None:
    """Compare with the optimizer that has all of the state, to the bit."""
    runs = []
    for make in (sharded, lambda params, cls, **options: cls(params, **options)):
        params = parameters()
        optimizer = make(params, cls, **options)
        for i in range(8):
            if i == 3:
                scaling.rescale_(optimizer, 8, 16, rule)
            if i == 5:
                scaling.rescale_(optimizer, 16, 4, rule)
            step(optimizer, params, seed=i)
        runs.append([p.detach() for p in params])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "options", "rule"), CASES)
@pytest.mark.usefixtures("group")
def test_state_of_a_sharded_optimizer_follows(cls, options, rule) -> None:
    # Catches the wrapper's own state, which is empty, taken for "before the first step": lr and
    # decays then change, and counts, moments and buffers do not.
    follow(0, cls, options, rule)


def follow_all(rank: int) -> None:
    for case in CASES:
        follow(rank, *case)
    grow(rank)


def test_every_rank_rescales_its_part(tmp_path: Path) -> None:
    # Catches states that are looked for by the parameters of a rank that does not have them.
    in_ranks(2, tmp_path, follow_all)


def grow(rank: int) -> None:
    runs = []
    for make in (sharded, lambda params, cls, **options: cls(params, **options)):
        params = parameters()
        optimizer = make(params, fusedopt.AdamW, lr=0.1, backend="reference")
        warmup = scaling.BatchSizeWarmup(optimizer, {0: 8, 16: 16, 48: 32}, "sqrt")
        for i in range(6):
            step(optimizer, params, seed=i)
            warmup.step()
        runs.append([p.detach() for p in params])
    assert warmup.batch_size == 32
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_batch_grows_around_a_sharded_optimizer() -> None:
    # Catches the same at a milestone.
    grow(0)


@pytest.mark.usefixtures("group")
def test_warm_up_around_a_sharded_optimizer_that_has_stepped() -> None:
    # Catches hyper-parameters of a later batch size checked as those of the first: 0.9, 0.2, -5.
    params = parameters()
    optimizer = sharded(params, fusedopt.AdamW, lr=0.1, backend="reference")
    warmup = scaling.BatchSizeWarmup(optimizer, {0: 8, 8: 64}, "sqrt")
    step(optimizer, params, 0)
    warmup.step()
    again = scaling.BatchSizeWarmup(optimizer, {0: 8, 8: 64}, "sqrt")
    again.load_state_dict(warmup.state_dict())
    assert again.batch_size == 64


@pytest.mark.parametrize("cls", [fusedopt.Adam, torch.optim.Adam])
@pytest.mark.usefixtures("group")
def test_sharded_optimizer_that_was_loaded(cls) -> None:
    """Loading leaves a second state in the wrapper, which no step reads."""
    # Catches that one rescaled in place of the other, or both, where they share their tensors.
    params = parameters()
    optimizer = sharded(params, cls, lr=0.1)
    step(optimizer, params, 0)
    optimizer.consolidate_state_dict()
    loaded = sharded(params, cls, lr=0.1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, loaded):
        scaling.rescale_(o, 8, 16, "sqrt")
    ours, theirs = (o.optim.state[params[0]] for o in (loaded, optimizer))
    assert theirs["step"].item() == 0.5
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_wrapped_groups_are_read_at_once() -> None:
    # Catches an old lr in what a captured graph is refreshed from before the next step.
    optimizer = sharded(parameters(), torch.optim.AdamW, lr=0.1)
    scaling.rescale_(optimizer, 8, 16, "sqrt")
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert optimizer.optim.param_groups[0][name] == optimizer.param_groups[0][name]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 2**0.5)


@pytest.mark.usefixtures("group")
def test_error_in_a_sharded_optimizer_changes_nothing() -> None:
    # Catches names of states that are looked at in the wrapper alone.
    params = parameters()
    optimizer = sharded(params, torch.optim.Adam, lr=0.1)
    step(optimizer, params, 0)
    optimizer.optim.state[params[1]]["sum"] = torch.ones(3)
    before = copy.deepcopy((optimizer.param_groups, optimizer.optim.state_dict()))
    with pytest.raises(ValueError, match="Adam has a state 'sum'"):
        scaling.rescale_(optimizer, 8, 16, "sqrt")
    after = (optimizer.param_groups, optimizer.optim.state_dict())
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.usefixtures("group")
def test_optimizer_that_ddp_has_yet_to_make() -> None:
    # Catches a rescaling that the constructor's arguments overwrite at the first step.
    optimizer = sharded(parameters(), torch.optim.Adam, lr=0.1, overlap_with_ddp=True)
    for call in (
        lambda: scaling.rescale_(optimizer, 8, 16, "sqrt"),
        lambda: scaling.BatchSizeWarmup(optimizer, {0: 8, 8: 16}, "sqrt"),
    ):
        with pytest.raises(ValueError, match="overlap_with_ddp=True cannot be rescaled"):
            call()


# Other wrappers


class Handing(torch.optim.Optimizer):
    """Hands groups and state through, as accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


class Keeping(torch.optim.Optimizer):
    """Has groups of its own, and leaves the state to an optimizer that it holds."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base = optimizer


@pytest.mark.parametrize("cls", [fusedopt.SGD, torch.optim.SGD])
def test_wrapper_that_hands_the_state_through(cls) -> None:
    # Catches the wrapper's class taken for that of an unknown algorithm.
    params = parameters()
    inner = cls(params, lr=0.1, momentum=0.5)
    step(inner, params, 0)
    before = inner.state[params[0]]["momentum_buffer"].clone()
    scaling.rescale_(Handing(inner), 8, 16, "decoupled")
    assert inner.param_groups[0]["momentum"] == 0.25
    buffer = inner.state[params[0]]["momentum_buffer"]
    torch.testing.assert_close(buffer, before * (0.5 / 0.75))


@pytest.mark.parametrize(
    ("options", "rule"), [({}, "decoupled"), ({"momentum_form": "velocity"}, "linear")]
)
def test_wrapper_that_keeps_the_state_elsewhere(options, rule) -> None:
    # Catches an empty state taken for "before the first step".
    params = parameters()
    inner = fusedopt.SGD(params, lr=0.1, momentum=0.5, **options)
    wrapper = Keeping(inner)
    step(inner, params, 0)
    before = copy.deepcopy(inner.state_dict())
    with pytest.raises(ValueError, match="Keeping keeps its state in another optimizer"):
        scaling.rescale_(wrapper, 8, 16, rule)
    after = inner.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert after["param_groups"] == before["param_groups"]
    assert wrapper.param_groups[0]["lr"] == 0.1
