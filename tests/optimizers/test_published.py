"""Lion, schedule-free AdamW and AdamC against loops in float64, written from their papers."""

from __future__ import annotations

import inspect
import io
import math
import tokenize
from typing import Any

import pytest
import torch
from marks import both_backends, numpy_may_warn
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.kernels.rules import adam_c, lion, schedule_free

STEPS = 7
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def _start(device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(37, generator=generator, dtype=torch.float64).to(device)


def _gradients(device: torch.device) -> list[Tensor]:
    # Of other sizes at each step: averages of equal gradients are those gradients.
    return [_start(device, 10 + step) * (1 + step % 3) for step in range(STEPS)]


def _lr(step: int) -> float:
    """A schedule that rises and falls."""
    return 0.1 * math.sin(0.4 * (step + 1))


def _sign(x: float) -> float:
    return (x > 0) - (x < 0)


def _run(optimizer: Any, p: Parameter, gradients: list[Tensor], lrs: list[float]) -> None:
    for gradient, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient.clone()
        optimizer.step()


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
def test_lion(backend: str, capturable: bool, device: torch.device) -> None:
    # Catches beta1 and beta2 exchanged, a momentum that is renewed before the step, and decay
    # without lr.
    p = Parameter(_start(device))
    ours = fusedopt.Lion(
        [p], betas=(0.7, 0.95), weight_decay=0.3, backend=backend, capturable=capturable
    )
    gradients, lrs = _gradients(device), [_lr(step) for step in range(STEPS)]
    _run(ours, p, gradients, lrs)
    for i, x in enumerate(_start(device).tolist()):
        m = 0.0
        for gradient, lr in zip(gradients, lrs, strict=True):
            g = gradient[i].item()
            c = 0.7 * m + 0.3 * g
            x = x - lr * (_sign(c) + 0.3 * x)
            m = 0.95 * m + 0.05 * g
        assert p[i].item() == pytest.approx(x, rel=1e-12, abs=1e-13)
        assert ours.state[p]["exp_avg"][i].item() == pytest.approx(m, rel=1e-12, abs=1e-13)


@numpy_may_warn
@both_backends
def test_lion_shows_a_nan(backend: str, device: torch.device) -> None:
    # Catches torch.sign's 0 in the place of a nan: a parameter that stands still in silence.
    p = Parameter(torch.ones(4, device=device))
    p.grad = torch.tensor([1.0, torch.nan, torch.inf, 0.0], device=device)
    fusedopt.Lion([p], lr=0.5, backend=backend).step()
    assert p.isnan().tolist() == [False, True, False, False]
    assert p[[0, 2, 3]].tolist() == [0.5, 0.5, 1.0]


def _published_average(
    start: Tensor, gradients: list[Tensor], warmup: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y and z of algorithm 1, which keeps all three and adds up the weights."""
    beta1, beta2, eps, decay = 0.85, 0.9, 1e-3, 0.2
    x, z, v, weights = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for t, g in enumerate(gradients, 1):
        y = (1 - beta1) * z + beta1 * x
        v = beta2 * v + (1 - beta2) * g**2
        now = lr * min(1.0, t / warmup) if warmup else lr
        z = z - now * g / ((v / (1 - beta2**t)).sqrt() + eps) - now * decay * y
        weights += now**2
        c = now**2 / weights
        x = (1 - c) * x + c * z
    return x, (1 - beta1) * z + beta1 * x, z


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3, STEPS, 20])
def test_schedule_free(backend: str, capturable: bool, warmup: int, device: torch.device) -> None:
    # Catches a sum of weights that is wrong in the warm-up, after it, or where both meet; a decay
    # at z in the place of y; and any other point than y or x in the parameter.
    p, gradients = Parameter(_start(device)), _gradients(device)
    ours = fusedopt.ScheduleFreeAdamW(
        [p], lr=0.3, betas=(0.85, 0.9), eps=1e-3, weight_decay=0.2, warmup_steps=warmup,
        backend=backend, capturable=capturable,
    )  # fmt: skip
    _run(ours, p, gradients, [0.3] * STEPS)
    x, y, z = _published_average(_start(device), gradients, warmup, 0.3)
    torch.testing.assert_close(p.detach(), y, **CLOSE)
    torch.testing.assert_close(ours.state[p]["z_minus_x"], z - x, **CLOSE)
    ours.eval()
    torch.testing.assert_close(p.detach(), x, **CLOSE)
    assert (x - y).abs().min() > 1e-6 and (z - x).abs().min() > 1e-6


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
def test_adam_c(backend: str, capturable: bool, device: torch.device) -> None:
    # Catches lr / max_lr the other way round, or applied to the step; and a max_lr that follows lr.
    p, gradients = Parameter(_start(device)), _gradients(device)
    lrs = [_lr(step) for step in range(STEPS)]
    ours = fusedopt.AdamC(
        [p], lr=0.125, betas=(0.6, 0.8), eps=1e-3, weight_decay=0.5, backend=backend,
        capturable=capturable,
    )  # fmt: skip
    assert ours.param_groups[0]["max_lr"] == 0.125
    _run(ours, p, gradients, lrs)
    x, m, v = _start(device), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g**2
        step = (m / (1 - 0.6**t)) / ((v / (1 - 0.8**t)) ** 0.5 + 1e-3)
        x = x - lr * step - lr**2 / 0.125 * 0.5 * x
    torch.testing.assert_close(p.detach(), x, **CLOSE)


@both_backends
def test_groups_without_correction_are_adamw_to_the_bit(backend: str, device: torch.device) -> None:
    # Catches a correction where no normalisation follows.
    params = [Parameter(_start(device).float()) for _ in range(3)]
    common: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "backend": backend}
    corrected = {"params": params[:1]}
    plain = {"params": params[1:2], "corrected_decay": False}
    ours = fusedopt.AdamC([corrected, plain], max_lr=0.2, **common)
    theirs = fusedopt.AdamW(params[2:], **common)
    for gradient in _gradients(device):
        for p in params:
            p.grad = gradient.float()
        ours.step()
        theirs.step()
    assert torch.equal(params[1], params[2])
    assert not torch.equal(params[0], params[2])


@pytest.mark.parametrize("lr", [0.02, 0.01, 0.001])
def test_weights_settle_at_one_size(lr: float, device: torch.device) -> None:
    # What the paper is about: where |u|^2 / |p|^2 is 2 wd / max_lr, steps at right angles and decay
    # balance at every lr, and AdamW's at one. Catches a correction by another power of lr.
    grown = []
    for name, more in (("AdamC", {"max_lr": 0.02}), ("AdamW", {})):
        p = Parameter(torch.ones(6, dtype=torch.float64, device=device))
        p.grad = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64, device=device)
        options = {"lr": lr, "betas": (0.0, 0.5), "eps": 1e-30, "weight_decay": 0.01, **more}
        getattr(fusedopt, name)([p], **options).step()
        grown.append(float(p.detach().square().sum()) / 6 - 1)
    assert abs(grown[0]) < 1e-3 * lr**2
    assert grown[1] == pytest.approx(lr**2 - 0.02 * lr, rel=1e-3, abs=1e-7)


def test_max_lr_is_that_of_the_group_and_of_the_scheduler() -> None:
    # Catches the constructor's lr for a group of its own, a max_lr that a checkpoint loses, and a
    # division by zero where training starts from lr 0.
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:2], "max_lr": 0.7}]
    ours = fusedopt.AdamC(groups, lr=0.1)
    ours.add_param_group({"params": params[2:], "lr": 0.25})
    assert [group["max_lr"] for group in ours.param_groups] == [0.5, 0.7, 0.25]
    other = fusedopt.AdamC([{"params": [p]} for p in params], lr=0.01)
    other.load_state_dict(ours.state_dict())
    assert [group["max_lr"] for group in other.param_groups] == [0.5, 0.7, 0.25]
    torch.optim.lr_scheduler.OneCycleLR(ours, max_lr=0.9, total_steps=10, cycle_momentum=False)
    assert [group["max_lr"] for group in ours.param_groups] == [0.9] * 3
    with pytest.raises(ValueError, match="max_lr must be above 0, got 0"):
        fusedopt.AdamC(params, lr=0.0)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("Lion", {"lr": -1.0}, "lr must be at least 0"),
        ("Lion", {"betas": (0.9, 1.0)}, r"betas\[1\] must be in"),
        ("Lion", {"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ("ScheduleFreeAdamW", {"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ("ScheduleFreeAdamW", {"betas": (1.0, 0.9)}, r"betas\[0\] must be in"),
        ("ScheduleFreeAdamW", {"eps": -1.0}, "eps must be at least 0"),
        ("AdamC", {"corrected_decay": 1}, "corrected_decay must be one of True, False"),
        ("AdamC", {"max_lr": -0.1}, "max_lr must be above 0"),
    ],
)
def test_bad_arguments_are_named(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fusedopt, name)([Parameter(torch.ones(2))], **wrong)


def test_adamws_state_goes_on_in_adam_c() -> None:
    # Catches options that a checkpoint of torch's is asked for.
    p = Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.ones(3)
    theirs.step()
    ours = fusedopt.AdamC([p], lr=0.2, max_lr=0.4)
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["max_lr"], group["corrected_decay"]) == (0.1, 0.4, True)
    ours.step()
    assert ours.state[p]["step"] == 2


@pytest.mark.parametrize("module", [lion, schedule_free, adam_c], ids=lambda m: m.__name__[23:])
def test_a_rule_takes_under_sixty_lines(module: Any) -> None:
    # Of code: what the vocabulary carries has to be said in few words.
    source = inspect.getsource(module)
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.STRING, tokenize.ENCODING}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    rows = {token.start[0] for token in tokens if token.type not in quiet and token.string.strip()}
    assert 20 < len(rows) < 60
