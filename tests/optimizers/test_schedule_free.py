"""Which of its two points a schedule-free optimizer's parameters hold, and when."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same_bits, assert_unchanged, snapshot
from marks import both_backends
from releasing import loss_of, tokens, various
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Parameter

import fusedopt

BF16, FP32 = torch.bfloat16, torch.float32
WIDE: dict[str, Any] = {"z_minus_x": FP32}
# Type of the parameter, and how it and its states are kept.
KEPT: Mapping[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (FP32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (BF16, {}),
    "complex64": (torch.complex64, {}),
    "float32 states": (BF16, {"state_dtype": FP32}),
    "8-bit squares": (FP32, {"state_dtype": {"exp_avg_sq": "int8"}}),
    "fp8 squares": (BF16, {"state_dtype": {**WIDE, "exp_avg_sq": "fp8"}, "rounding": "stochastic"}),
    "remainder": (BF16, {"master": "remainder", "state_dtype": WIDE}),
    "remainder8": (BF16, {"master": "remainder8", "rounding": "stochastic", "state_dtype": WIDE}),
    "float32 master": (torch.float16, {"master": "float32", "state_dtype": WIDE}),
    "kahan": (torch.float16, {"rounding": "kahan"}),
}
each_format = pytest.mark.parametrize("kept", KEPT)


def _gradients(p: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)


def _steps(optimizer: Any, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for p in group["params"]:
                # Vectors stay without, and have no state.
                p.grad = _gradients(p, step) if p.dim() == 2 else None
        optimizer.step()


def _made(
    kept: str, device: torch.device, steps: int = 4, **more: Any
) -> tuple[Parameter, fusedopt.ScheduleFreeAdamW]:
    dtype, options = KEPT[kept]
    generator = torch.Generator().manual_seed(99)
    p = Parameter(torch.randn(3, 130, generator=generator).to(device, dtype))
    groups = [{"params": [p]}, {"params": [Parameter(torch.ones(2).to(device, dtype))]}]
    optimizer = fusedopt.ScheduleFreeAdamW(groups, lr=0.05, betas=(0.75, 0.9), **options, **more)
    _steps(optimizer, range(steps))
    return p, optimizer


@both_backends
@each_format
def test_there_and_back(kept: str, backend: str, device: torch.device) -> None:
    # Catches a parameter that comes back but for rounding, a master that moved beside it, a state
    # that is left over, and a second call of either that does it again.
    p, ours = _made(kept, device, backend=backend)
    before = snapshot(ours)
    ours.eval()
    average = p.detach().clone()
    assert ours.state[p].keys() == before[1][0].keys() | {"y"}
    ours.eval()
    assert torch.equal(p, average) and not torch.equal(average, before[0][0])
    ours.train()
    assert_unchanged(ours, before)
    ours.train()
    assert_unchanged(ours, before)


@each_format
def test_what_is_evaluated_is_the_average(kept: str, device: torch.device) -> None:
    # x by its definition, from y and z - x as numbers. Catches a master that is not read, codes
    # taken for numbers, and the point on the other side of y.
    p, ours = _made(kept, device, backend="reference")
    wide = torch.complex128 if p.is_complex() else torch.float64
    ahead = ours.state[p]["z_minus_x"].to(wide)
    whole = p.detach().to(wide, copy=True)
    if "master" in kept:
        whole = ours.state[p]["master"].to(wide)
    elif kept == "kahan":
        whole = whole + ours.state[p]["compensation"].to(wide)
    ours.eval()
    expected = whole - 0.25 * ahead
    if kept.startswith("remainder"):
        # Of a whole that is within half a unit of what the parameter was.
        apart = (p.detach().to(wide) - expected).abs()
        assert (apart <= 2**-8 * (whole.abs() + expected.abs())).all()
    else:
        rounding = torch.finfo(p.dtype).eps
        close = {"rtol": 0.51 * rounding + 2**-24, "atol": 1e-6 if p.dtype != wide else 1e-15}
        torch.testing.assert_close(p.detach().to(wide), expected, **close)
    assert (p.detach().to(wide) - whole).abs().max() > 0.01


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_in_eval_mode_is_an_error(
    backend: str, capturable: bool, device: torch.device
) -> None:
    # Catches steps that start from the average, in silence, and one whose plan was made before.
    p, ours = _made("float32", device, backend=backend, capturable=capturable)
    ours.eval()
    p.grad = _gradients(p, 9)
    before = snapshot(ours)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"in eval mode.*call optimizer\.train\(\)"):
            ours.step()
        assert_unchanged(ours, before)
    ours.train()
    ours.step()
    _, other = _made("float32", device, backend=backend, capturable=capturable)
    (q,) = other.param_groups[0]["params"]
    q.grad = _gradients(q, 9)
    other.step()
    assert_same_bits(snapshot(ours), snapshot(other))


def test_gradient_release_in_eval_mode_is_an_error(device: torch.device) -> None:
    # Catches a part of the optimizer that is stepped past the check, by the quick way too.
    model = various(device=device)
    ours = fusedopt.ScheduleFreeAdamW(model.parameters(), lr=0.01)
    fusedopt.gradient_release(model, ours)
    batches = tokens(4, device)
    for batch in batches[:2]:
        loss_of(model, batch).backward()
        ours.step()
    ours.eval()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in eval mode"):
        loss_of(model, batches[2]).backward()
    assert_same_bits([p.detach() for p in model.parameters()], before)


def _copied(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_format
@pytest.mark.parametrize("saved", ["train", "eval"])
@pytest.mark.parametrize("loading", ["train", "eval"])
def test_checkpoints_in_either_mode(
    kept: str, saved: str, loading: str, device: torch.device
) -> None:
    # Catches a mode that stays the loading optimizer's, whose parameters are then the other point.
    p, ours = _made(kept, device, backend="reference")
    q, other = _made(kept, device, steps=2, backend="reference")
    getattr(ours, saved)()
    getattr(other, loading)()
    other.load_state_dict(_copied(ours.state_dict()))
    with torch.no_grad():
        q.copy_(p)
    assert [group["mode"] for group in other.param_groups] == [saved] * 2
    for optimizer in (ours, other):
        optimizer.eval()
        optimizer.train()
        _steps(optimizer, range(7, 9))
    assert_same_bits(snapshot(other), snapshot(ours))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_their_mode(way: Any, device: torch.device) -> None:
    p, ours = _made("float32", device)
    held = p.detach().clone()
    ours.eval()
    twin = way(ours)
    (q,) = twin.param_groups[0]["params"]
    twin.train()
    assert torch.equal(q, held) and ours.param_groups[0]["mode"] == "eval"


@pytest.mark.parametrize("kept", ["float32", "8-bit squares", "bfloat16"])
def test_without_y_it_is_worked_out(kept: str, device: torch.device) -> None:
    # Exact to rounding: y = x + (1 - beta1)(z - x). Catches the average left in the parameter.
    p, ours = _made(kept, device)
    held = p.detach().clone()
    ours.eval()
    del ours.state[p]["y"]
    ours.train()
    unit = torch.finfo(p.dtype).eps
    torch.testing.assert_close(p.detach(), held, rtol=2 * unit, atol=unit / 2)
    assert ours.param_groups[0]["mode"] == "train"


@pytest.mark.parametrize("kept", ["remainder", "float32 master", "kahan"])
def test_a_master_without_y_is_an_error(kept: str, device: torch.device) -> None:
    # Catches a parameter put beside the rest of another.
    p, ours = _made(kept, device)
    ours.eval()
    del ours.state[p]["y"]
    before = snapshot(ours)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\].*no 'y'"):
        ours.train()
    assert_unchanged(ours, before)


@pytest.mark.parametrize("dtype", ["int8", "fp8", {"z_minus_x": "int8"}])
def test_eight_bits_of_the_difference_are_refused(dtype: Any) -> None:
    # Catches steps that are lost one by one: each is far below what 8 bits tell apart.
    with pytest.raises(ValueError, match="too coarse for 'z_minus_x'.*Ask for {'exp_avg_sq'"):
        fusedopt.ScheduleFreeAdamW([Parameter(torch.ones(2))], state_dtype=dtype)


def test_a_group_joins_in_the_mode_of_the_others(device: torch.device) -> None:
    # Catches a group that steps, or is switched, while others wait.
    _, ours = _made("float32", device)
    ours.eval()
    p = Parameter(torch.ones(3, 1, device=device))
    ours.add_param_group({"params": [p]})
    assert ours.param_groups[2]["mode"] == "eval"
    ours.train()
    _steps(ours, range(2))
    assert ours.state[p]["step"] == 2


def test_there_is_nothing_to_switch_before_the_first_step(device: torch.device) -> None:
    # x = y = z. Catches states that a switch makes up.
    p, ours = _made("float32", device, steps=0)
    start = p.detach().clone()
    ours.eval()
    ours.train()
    assert torch.equal(p, start) and not ours.state


@pytest.mark.parametrize("saved", ["train", "eval"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_checkpoint(saved: str, tmp_path: Path) -> None:
    # Its files know nothing of options that are put aside. Catches a mode that is not in them: the
    # average would be trained on.
    def made(seed: int) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(5, 3, bias=False)
        return model, fusedopt.ScheduleFreeAdamW(model.parameters(), lr=0.05)

    model, ours = made(0)
    _steps(ours, range(3))
    getattr(ours, saved)()
    weights, states = get_state_dict(model, ours)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=tmp_path)
    other, theirs = made(1)
    weights, states = get_state_dict(other, theirs)
    dcp.load({"model": weights, "optim": states}, checkpoint_id=tmp_path)
    set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=states)
    assert theirs.param_groups[0]["mode"] == saved
    for optimizer in (ours, theirs):
        optimizer.train()
        _steps(optimizer, range(4, 6))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for p, q in pairs:
        close = {"rtol": 0, "atol": 0} if saved == "train" else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(q, p, **close)


def test_torchs_checkpoint_is_refused(device: torch.device) -> None:
    # Catches AdamW's average of gradients dropped in silence, and z - x begun in the middle.
    p, ours = _made("float32", device)
    theirs = torch.optim.AdamW([{"params": [p]}, {"params": [torch.ones(2, device=device)]}])
    p.grad = _gradients(p, 1)
    theirs.step()
    before = snapshot(ours)
    with pytest.raises((KeyError, ValueError), match="warmup_steps|z_minus_x"):
        ours.load_state_dict(theirs.state_dict())
    assert_unchanged(ours, before)
    with pytest.raises(ValueError, match="states mean something else"):
        fusedopt.export_state_dict(ours)
