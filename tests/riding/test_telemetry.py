"""``telemetry=Telemetry``: norms against loops in float64, and the same bits with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoupled_by_hand import ADAM, ByHand
from marks import both_backends, numpy_may_warn
from norms_by_hand import bits, check, every_layout, give, norm, rows, same, whole
from torch import Tensor, nn

import fusedopt
from fusedopt import Telemetry

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
COMPLEX = {F32: torch.complex64, F64: torch.complex128}
STEPS = 3


class LionByHand(torch.optim.Optimizer):
    """Lion's two lines, in the type of the parameters."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                sign = (beta1 * m + (1 - beta1) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
                m.mul_(beta2).add_((1 - beta2) * p.grad)


ADAMW = {"lr": 0.03, "betas": (0.6, 0.8), "weight_decay": 0.3}
RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (fusedopt.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1}),
    "AdamW": (fusedopt.AdamW, torch.optim.AdamW, ADAMW),
    "RMSprop": (fusedopt.RMSprop, torch.optim.RMSprop, {"lr": 0.03, "centered": True}),
    "Lion": (fusedopt.Lion, LionByHand, {**ADAMW, "betas": (0.7, 0.9)}),
}


def by_hand(kind: str, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
    """The same optimizer in float64, and its parameters."""
    wide = [
        nn.Parameter(p.detach().to(torch.complex128 if p.is_complex() else F64, copy=True))
        for p in params
    ]
    _, control, options = RULES[kind]
    return control(wide, **options), wide


@both_backends
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", RULES)
def test_by_hand(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Catches a chunk left out, memory beside a tensor, a norm of before the step."""
    params = every_layout(dtype)
    if kind != "Lion":
        params.append(nn.Parameter(torch.randn(5, 7, dtype=COMPLEX[dtype]).t()))
    control, wide = by_hand(kind, params)
    telemetry = Telemetry()
    optimizer = RULES[kind][0](params, telemetry=telemetry, backend=backend, **RULES[kind][2])
    for step in range(STEPS):
        give(params, step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.to(q.dtype)
        before = [q.detach().clone() for q in wide]
        control.step()
        optimizer.step()
        # RMSprop divides by the root of a difference that nearly cancels, where float32 loses.
        near = 1e-6 if dtype == F64 else 1e-3 if kind == "RMSprop" else 2e-6
        check(telemetry.norms, rows([p.grad for p in params], before, wide), near)


# Of the parameter, options, and whether rows of groups of codes are walked.
FORMATS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (F32, {}),
    (F32, {"state_dtype": BF16}),
    (F32, {"state_dtype": "int8"}),
    (BF16, {}),
    (BF16, {"rounding": "stochastic"}),
    (BF16, {"rounding": "kahan"}),
    (BF16, {"master": "remainder"}),
    (BF16, {"master": "remainder8", "rounding": "stochastic", "state_dtype": "int8"}),
    (BF16, {"master": "float32", "state_dtype": "fp8"}),
    (F16, {"master": "float32", "state_dtype": F32}),
)


def formatted(dtype: torch.dtype) -> list[nn.Parameter]:
    """Small, so that updates of about 1 have all their digits; with rows that end in a group."""
    drawn = torch.Generator().manual_seed(5)
    shapes = ((3, 200), (137,))
    return [nn.Parameter((torch.randn(s, generator=drawn) / 64).to(dtype)) for s in shapes]


@both_backends
@pytest.mark.parametrize(("dtype", "options"), FORMATS)
def test_formats(dtype: torch.dtype, options: dict[str, Any], backend: str) -> None:
    """Bits are those without, on steps that are measured and others; norms those of the update.

    Catches elements counted twice where rows are walked, rounding or draws that change with it, and
    a parameter read without its master.
    """
    runs = []
    # Of 16 bits without a master the norms are those before rounding: test_before_rounding has the
    # digits.
    master = options.get("master")
    kept = {"remainder8": 2.0**-14, None: 2.0**-7 if dtype == BF16 else 2.0**-22}
    unit = kept.get(master, 2.0**-22)
    for telemetry in (None, Telemetry(every=2)):
        params = formatted(dtype)
        optimizer = fusedopt.AdamW(
            params, lr=0.5, betas=(0.6, 0.8), weight_decay=0.5, telemetry=telemetry,
            backend=backend, **options,
        )  # fmt: skip
        found = []
        for step in range(3):
            give(params, step)
            before = [whole(optimizer, p, master) for p in params]
            optimizer.step()
            after = [whole(optimizer, p, master) for p in params]
            found.append(bits(optimizer, params))
            if telemetry is not None and telemetry.measured:
                wanted = rows([p.grad for p in params], before, after)
                check(telemetry.norms, wanted, max(unit, 2e-6), unit)
                check(telemetry.norms[:, [0] * 3], wanted[:, [0] * 3], 1e-6)
        runs.append(found)
    assert all(map(same, *runs))


@both_backends
@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
def test_before_rounding(rounding: str | None, backend: str) -> None:
    """An update of which bfloat16 keeps nothing is there: catches norms of what was stored."""
    p = nn.Parameter(torch.full((2500,), 1.0, dtype=BF16))
    p.grad = torch.full((2500,), 2.0**-4, dtype=BF16)
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(
        [p], lr=2.0**-7, rounding=rounding, telemetry=telemetry, backend=backend
    )
    optimizer.step()
    if rounding is None:
        assert torch.equal(p, torch.ones_like(p))
    root = 2500**0.5
    wanted = torch.tensor([[2.0**-4 * root, (1 - 2.0**-11) * root, 2.0**-11 * root]], dtype=F64)
    check(telemetry.norms, wanted, 1e-7, 0.0)
    if rounding != "stochastic":
        # What Kahan's compensation has kept is no part of this step's update.
        optimizer.step()
        if rounding == "kahan":
            wanted[0, 1] = (1 - 2.0**-10) * root
        check(telemetry.norms, wanted, 1e-7, 0.0)


@both_backends
@pytest.mark.parametrize("capturable", [False, True])
def test_samples(backend: str, capturable: bool) -> None:
    """The kernel that reduces samples and updates: the gradient is the samples' mean."""
    shapes = ((2051,), (3, 20), (), (0,))
    runs = []
    for telemetry in (None, Telemetry(every=2)):
        params = [
            nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s)) for s in shapes
        ]
        hand = ByHand(params, 1, **ADAM)
        optimizer = fusedopt.BatchDecoupledAdam(
            params, statistics=fusedopt.GradSampleSquares(), telemetry=telemetry, backend=backend,
            capturable=capturable, **ADAM,
        )  # fmt: skip
        for step in range(3):
            drawn = torch.Generator().manual_seed(step)
            samples = [torch.randn(4, *s, generator=drawn) for s in shapes]
            for p, g in zip(params, samples, strict=True):
                p.grad_sample = g
            before = [p.clone() for p in hand.params]
            hand.adam(samples)
            optimizer.step()
            if telemetry is not None and step % telemetry.every == 0:
                gradients = [g.double().mean(0) for g in samples]
                check(telemetry.norms, rows(gradients, before, hand.params), 1e-5)
        runs.append(bits(optimizer, params))
    assert same(*runs)


@both_backends
def test_samples_in_8_bits_and_16(backend: str) -> None:
    runs = []
    for telemetry in (None, Telemetry()):
        params = formatted(BF16)
        optimizer = fusedopt.BatchDecoupledAdam(
            params, lr=0.5, statistics=fusedopt.GradSampleSquares(), telemetry=telemetry,
            backend=backend, state_dtype="int8", master="remainder",
        )  # fmt: skip
        for step in range(2):
            drawn = torch.Generator().manual_seed(step)
            for p in params:
                p.grad_sample = torch.randn(3, *p.shape, generator=drawn).to(BF16)
            before = [whole(optimizer, p, "remainder") for p in params]
            optimizer.step()
            if telemetry is not None:
                after = [whole(optimizer, p, "remainder") for p in params]
                gradients = [p.grad_sample.double().mean(0) for p in params]
                check(telemetry.norms, rows(gradients, before, after), 1e-5)
        runs.append(bits(optimizer, params))
    assert same(*runs)


@both_backends
def test_squares_of_a_model(backend: str) -> None:
    """``PerSampleSquares``: the gradient is p.grad, and bits are the same."""
    runs = []
    for telemetry in (None, Telemetry()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        params = list(model.parameters())
        optimizer = fusedopt.BatchDecoupledAdam(
            params, lr=0.5, statistics=fusedopt.PerSampleSquares(model), telemetry=telemetry,
            backend=backend, virtual_batch_size=2,
        )  # fmt: skip
        for _ in range(2):
            model(torch.randn(4, 3)).square().sum(1).mean().backward()
            before: list[Tensor] = [p.detach().clone() for p in params]
            optimizer.step()
            if telemetry is not None:
                check(telemetry.norms, rows([p.grad for p in params], before, params), 1e-5)
            optimizer.zero_grad()
        runs.append(bits(optimizer, params))
    assert same(*runs)


@both_backends
@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping(clip: float, backend: str) -> None:
    """The gradient is that before clipping: catches the factor in it."""
    params = every_layout()
    telemetry = Telemetry()
    norm_of_all = fusedopt.GlobalNorm(clip)
    optimizer = fusedopt.SGD(params, lr=1.0, clip=norm_of_all, telemetry=telemetry, backend=backend)
    give(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    wanted = rows([p.grad for p in params], before, params)
    total = wanted[:, 0].square().sum().sqrt()
    assert norm_of_all.last is not None
    torch.testing.assert_close(norm_of_all.last.double(), total, rtol=1e-6, atol=0)
    # What is added is lr times the clipped gradient, in all its digits.
    factor = min(1.0, clip / (total.item() + 1e-6))
    wanted[:, 2] = factor * wanted[:, 0]
    check(telemetry.norms, wanted)


@both_backends
def test_maximize_and_infinities(backend: str) -> None:
    """A gradient that is inf, or nan, has such a norm, and no other parameter has."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2050))]
    telemetry = Telemetry()
    optimizer = fusedopt.SGD(params, lr=0.5, maximize=True, telemetry=telemetry, backend=backend)
    params[0].grad = torch.tensor([1.0, float("-inf"), 2.0])
    params[1].grad = torch.full((2050,), 2.0)
    optimizer.step()
    first, second = telemetry.norms.double()
    assert torch.equal(first, torch.full((3,), float("inf"), dtype=F64))
    root = 2050**0.5
    check(second[None].float(), torch.tensor([[2 * root, 2 * root, root]], dtype=F64))
    assert norm(params[1]) == pytest.approx(2 * root)


@numpy_may_warn
@both_backends
def test_nothing_behind_the_end(backend: str) -> None:
    """Catches what a rule makes of no element: 0 / 0, where eps is 0."""
    p = nn.Parameter(torch.ones(2051))
    p.grad = torch.ones(2051)
    telemetry = Telemetry()
    optimizer = fusedopt.AdamW(
        [p], lr=0.5, eps=0.0, weight_decay=0.0, telemetry=telemetry, backend=backend
    )
    optimizer.step()
    root = 2051**0.5
    check(telemetry.norms, torch.tensor([[root, root / 2, root / 2]], dtype=F64))
