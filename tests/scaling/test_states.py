"""rescale_ in the middle of a run: what an optimizer has gathered follows the batch size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning')

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def make(module, name: str, count: int = 2, **options):
    """Return an optimizer in float64, on the backend that computes in it at full speed."""
    params = [Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(count)]
    if module is fusedopt:
        options["backend"] = "reference"
    return getattr(module, name)(params, **options)


def parameters(optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer, gradient: float | torch.Tensor) -> torch.Tensor:
    """Take a step; return how far the first parameter has moved."""
    params = parameters(optimizer)
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.zeros_like(p) + gradient
    optimizer.step()
    return params[0].detach() - before


def states(optimizer) -> list[dict]:
    return [optimizer.state[p] for p in parameters(optimizer)]


# Displacement per sample

# Slow enough that one step does not show, and eps that does.
NOISY_ADAM = {"lr": 1e-3, "betas": (0.8, 1 - 1e-9), "eps": 0.5}
NOISY_RMSPROP = {"lr": 1e-3, "alpha": 1 - 1e-9, "eps": 0.5}
MOMENTUM = {"lr": 1e-3, "momentum": 0.8}
FAST_RMSPROP = {"lr": 1e-3, "alpha": 0.8}
FAST_ADAM = {"lr": 1e-3, "betas": (0.7, 0.8), "weight_decay": 0.0}
SLOPES = [
    (torch.optim, "SGD", MOMENTUM),
    (torch.optim, "SGD", {**MOMENTUM, "dampening": 0.3}),
    (torch.optim, "RMSprop", {**MOMENTUM, **FAST_RMSPROP}),
    (torch.optim, "Adam", {**FAST_ADAM, "amsgrad": True}),
    (fusedopt, "SGD", {"lr": 1e-3}),
    *[
        (fusedopt, "SGD", {**MOMENTUM, "momentum_form": form, "nesterov": nesterov})
        for form in ("torch", "velocity", "ema")
        for nesterov in (False, True)
    ],
    (fusedopt, "RMSprop", {**MOMENTUM, **FAST_RMSPROP, "bias_correction": True}),
    (fusedopt, "RMSprop", {**MOMENTUM, **FAST_RMSPROP, "denominator": "variance"}),
    (fusedopt, "RMSprop", FAST_RMSPROP),
    *[
        (fusedopt, "AdamW", {**FAST_ADAM, "bias_correction": correction})
        for correction in ("adam", "running_mean", None)
    ],
]


@pytest.mark.parametrize("to_batch", [32, 2])
@pytest.mark.parametrize("rule", ["decoupled", "linear"])
@pytest.mark.parametrize(("module", "name", "options"), SLOPES)
def test_steps_per_sample_do_not_jump(module, name, options, rule, to_batch) -> None:
    """On a slope of gradients that stay, the step per sample is the same after the switch."""
    # Catches a momentum buffer left as it was: with a batch four times as large, the first step
    # after the switch is 1.8 times too long (torch's form), or 0.7 of its length (velocity).
    optimizer = make(module, name, **options)
    for _ in range(120):
        moved = step(optimizer, 0.7)
    scaling.rescale_(optimizer, 8, to_batch, rule)
    for _ in range(3):
        torch.testing.assert_close(step(optimizer, 0.7) / to_batch, moved / 8, rtol=1e-9, atol=0)


@pytest.mark.parametrize("to_batch", [32, 2])
@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (torch.optim, "RMSprop", NOISY_RMSPROP),
        (torch.optim, "RMSprop", {**NOISY_RMSPROP, "momentum": 0.8}),
        (torch.optim, "RMSprop", {**NOISY_RMSPROP, "momentum": 0.8, "centered": True}),
        (fusedopt, "RMSprop", {**NOISY_RMSPROP, "momentum": 0.8, "centered": True}),
        (torch.optim, "Adam", NOISY_ADAM),
        (torch.optim, "AdamW", {**NOISY_ADAM, "amsgrad": True, "weight_decay": 0.0}),
        (fusedopt, "AdamW", {**NOISY_ADAM, "weight_decay": 0.0}),
    ],
)
def test_steps_per_sample_do_not_jump_where_noise_dominates(
    module, name, options, to_batch
) -> None:
    """With "sqrt", second moments of 1, nearly all noise, and a mean gradient of 0.01."""
    # Catches second moments that are left alone or divided by sqrt(kappa), an RMSprop buffer that
    # is scaled as SGD's, and a centred variance from which the mean is subtracted kappa times.
    optimizer = make(module, name, **options)
    step(optimizer, 0.01)
    for state in states(optimizer):
        state["step"].fill_(1e11)
        for moment in SECOND_MOMENTS:
            if moment in state:
                state[moment].fill_(1.0)
        if "grad_avg" in state:
            state["grad_avg"].fill_(0.01)
    for _ in range(120):
        moved = step(optimizer, 0.01)
    scaling.rescale_(optimizer, 8, to_batch, "sqrt")
    for _ in range(3):
        torch.testing.assert_close(step(optimizer, 0.01) / to_batch, moved / 8, rtol=1e-5, atol=0)


def test_centred_variance_stays_positive() -> None:
    """Signal dominates: the variance, not the second moment, is what a larger batch divides."""
    # Catches square_avg / kappa, which is less than the mean's square: torch's parameter is nan.
    optimizer = make(torch.optim, "RMSprop", alpha=0.9, centered=True, lr=1e-3)
    for i in range(50):
        step(optimizer, 1.0 + 0.01 * (-1) ** i)
    (before, _), params = states(optimizer), parameters(optimizer)
    variance = before["square_avg"] - before["grad_avg"] ** 2
    mean = before["grad_avg"].clone()
    scaling.rescale_(optimizer, 8, 32, "sqrt")
    after = optimizer.state[params[0]]
    torch.testing.assert_close(after["grad_avg"], mean, rtol=0, atol=0)
    torch.testing.assert_close(after["square_avg"] - mean**2, variance / 4, rtol=1e-9, atol=0)
    step(optimizer, 1.0)
    assert params[0].isfinite().all()


def test_centred_variance_of_complex_numbers() -> None:
    # Catches the square of a complex mean in place of the squares of its parts.
    p = Parameter(torch.zeros(2, dtype=torch.complex128))
    optimizer = torch.optim.RMSprop([p], alpha=0.9, centered=True)
    for gradient in (1.0 + 0.5j, 1.2 - 0.1j):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()

    def variance() -> torch.Tensor:
        state = optimizer.state[p]
        square, mean = (torch.view_as_real(state[name]) for name in ("square_avg", "grad_avg"))
        return square - mean**2

    before = variance()
    scaling.rescale_(optimizer, 8, 32, "sqrt", beta_form="power")
    torch.testing.assert_close(variance(), before / 4, rtol=1e-9, atol=0)


# Against a run at the new batch size from the beginning

FROM_THE_BEGINNING = [
    (torch.optim, "SGD", MOMENTUM),
    (torch.optim, "Adam", {"lr": 1e-3, "amsgrad": True}),
    (torch.optim, "AdamW", {"lr": 1e-3}),
    (fusedopt, "SGD", {**MOMENTUM, "momentum_form": "torch"}),
    (fusedopt, "SGD", {**MOMENTUM, "momentum_form": "velocity"}),
    (fusedopt, "SGD", {**MOMENTUM, "momentum_form": "ema", "nesterov": True}),
    (fusedopt, "RMSprop", {**MOMENTUM, "bias_correction": True}),
    (fusedopt, "Adam", {"lr": 1e-3}),
    (fusedopt, "AdamW", {"lr": 1e-3, "capturable": True}),
    (fusedopt, "AdamW", {"lr": 1e-3, "bias_correction": "running_mean"}),
]


@pytest.mark.parametrize(("module", "name", "options"), FROM_THE_BEGINNING)
def test_equals_a_run_at_the_new_batch_from_the_beginning(module, name, options) -> None:
    """With decays beta ** kappa the state after 12 steps on a slope is that of 3 large ones."""
    # Catches step counts that are left alone: Adam's first step after the switch then is 1.7 times
    # too long, and a running mean's new value has a weight of 1/13 in place of 1/4.
    switched = make(module, name, **options)
    for _ in range(12):
        step(switched, 0.7)
    scaling.rescale_(switched, 8, 32, "decoupled")
    large = make(module, name, **options)
    scaling.rescale_(large, 8, 32, "decoupled")
    for _ in range(3):
        step(large, 0.7)
    with torch.no_grad():
        for p, q in zip(parameters(switched), parameters(large), strict=True):
            p.copy_(q)
    for _ in range(4):
        gradient = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(
            step(switched, gradient), step(large, gradient), rtol=2e-6, atol=1e-12
        )
    for ours, theirs in zip(states(switched), states(large), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=2e-6, atol=1e-12, msg=key)


# Step counts


@pytest.mark.parametrize(
    ("module", "capturable"), [(torch.optim, False), (fusedopt, False), (fusedopt, True)]
)
@pytest.mark.parametrize(
    ("rule", "expected"),
    [("decoupled", 1.25), ("sqrt", 1.25), ("linear", 5.0), ("constant", 5.0)],
)
def test_step_counts(module, rule, expected, capturable) -> None:
    """Where decays change, 5 steps are 1.25 of the new; counts are written where they are."""
    # Catches the shared buffer of all counts being scaled once for each of its views, counts that
    # are replaced (a graph reads the old ones), and a rule that keeps decays but not counts.
    optimizer = make(module, "AdamW", count=5, capturable=capturable, betas=(0.5, 0.9))
    for _ in range(5):
        step(optimizer, 0.7)
    counts = [state["step"] for state in states(optimizer)]
    scaling.rescale_(optimizer, 8, 32, rule, **({"beta_form": "power"} if rule == "sqrt" else {}))
    assert [count.item() for count in counts] == [expected] * 5
    assert all(s["step"] is count for s, count in zip(states(optimizer), counts, strict=True))
    step(optimizer, 0.7)
    assert [state["step"].item() for state in states(optimizer)] == [expected + 1] * 5


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host", "live"])
@pytest.mark.parametrize("rule", scaling.RULES)
def test_plan_takes_the_change_in(rule, options) -> None:
    """After the same rescale_, ours goes on as torch does, with counts on the host and live."""
    # Catches coefficients or step counts that the plan keeps from before the change.
    runs = []
    for module, backend in ((torch.optim, {}), (fusedopt, {"backend": "triton"})):
        torch.manual_seed(1)
        params = [Parameter(torch.randn(n)) for n in (3, 70, 5)]
        settings = {"lr": 0.05, "betas": (0.9, 0.95), **(options if backend else {}), **backend}
        optimizer = module.AdamW(params, **settings)
        for i in range(8):
            if i == 4:
                scaling.rescale_(optimizer, 8, 24, rule)
            if i == 6:
                scaling.rescale_(optimizer, 24, 12, rule)
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(runs[1], runs[0], rtol=3e-5, atol=3e-6)


def test_shared_count_is_scaled_once() -> None:
    # Catches a loop over parameters that divides one tensor twice: torch.save keeps sharing.
    optimizer = make(torch.optim, "Adam")
    step(optimizer, 0.7)
    first, second = states(optimizer)
    second["step"] = first["step"]
    scaling.rescale_(optimizer, 8, 16, "decoupled")
    assert first["step"].item() == 0.5
    assert second["step"] is first["step"]


def test_parameter_listed_twice_is_scaled_once() -> None:
    # Catches a loop over group["params"], which divides such a parameter's moments twice.
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedopt.RMSprop([p, p], alpha=0.9, momentum=0.5, backend="reference")
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[p])
    scaling.rescale_(optimizer, 8, 16, "sqrt", beta_form="power")
    after = optimizer.state[p]
    torch.testing.assert_close(after["square_avg"], before["square_avg"] / 2)
    factor = math.sqrt(2) * 0.5 / (1 - 0.5**2)
    torch.testing.assert_close(after["momentum_buffer"], before["momentum_buffer"] * factor)


def test_counts_that_are_numbers() -> None:
    # Catches an in-place division of what is no tensor: states of old checkpoints, edited by hand.
    optimizer = make(torch.optim, "Adam")
    step(optimizer, 0.7)
    for state in states(optimizer):
        state["step"] = 3
    scaling.rescale_(optimizer, 8, 16, "decoupled")
    assert [state["step"] for state in states(optimizer)] == [1.5, 1.5]


# There and back, groups, errors


@pytest.mark.parametrize("rule", scaling.RULES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.8}),
        ("SGD", {"momentum": 0.8, "momentum_form": "velocity"}),
        ("RMSprop", {"momentum": 0.8, "centered": True, "alpha": 0.9}),
        ("Adam", {"amsgrad": True, "betas": (0.6, 0.9)}),
    ],
)
def test_there_and_back(name, options, rule) -> None:
    # Catches a factor that is not the inverse of that of the way back, as 1/kappa for a state whose
    # hyper-parameter goes with sqrt(kappa), and the old momentum used for the new.
    optimizer = make(fusedopt, name, **options)
    for _ in range(6):
        step(optimizer, torch.randn(3, dtype=torch.float64))
    before = copy.deepcopy(optimizer.state_dict())
    scaling.rescale_(optimizer, 8, 16, rule)
    scaling.rescale_(optimizer, 16, 8, rule)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=1e-6, atol=0)
    assert after["param_groups"][0]["lr"] == pytest.approx(before["param_groups"][0]["lr"])


def test_each_group_has_its_own_momentum() -> None:
    # Catches the factor of the first group used for all, and buffers of groups without momentum.
    params = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [p], "momentum": m} for p, m in zip(params, (0.5, 0.9, 0.0), strict=True)]
    optimizer = fusedopt.SGD(groups, lr=0.1, backend="reference")
    step(optimizer, 1.0)
    scaling.rescale_(optimizer, 8, 16, "decoupled")
    buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
    assert buffers[0].item() == pytest.approx(0.5 / 0.75)
    assert buffers[1].item() == pytest.approx(0.1 / 0.19)
    assert buffers[2] is None


def test_buffer_of_gradients_has_their_unit() -> None:
    # Catches RMSprop's factor sqrt(kappa), which is that of ratios, in SGD's sum of gradients.
    optimizer = make(torch.optim, "SGD", lr=0.1, momentum=0.5)
    step(optimizer, 1.0)
    scaling.rescale_(optimizer, 8, 16, "sqrt", beta_form="power")
    assert states(optimizer)[0]["momentum_buffer"].tolist() == pytest.approx([0.5 / 0.75] * 3)


def test_velocity_follows_lr_even_from_zero() -> None:
    # Catches lr'/lr, which is nan where a warm-up starts at lr = 0.
    optimizer = make(fusedopt, "SGD", lr=0.1, momentum=0.9, momentum_form="velocity")
    step(optimizer, 1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    scaling.rescale_(optimizer, 8, 16, "linear")
    assert states(optimizer)[0]["momentum_buffer"].tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("tensor", [False, True])
def test_initial_lr_follows_lr(tensor) -> None:
    # Catches a scheduler made afterwards that starts from the old learning rate.
    optimizer = make(torch.optim, "AdamW", lr=torch.tensor(1e-3) if tensor else 1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    group = optimizer.param_groups[0]
    initial = group["initial_lr"]
    scaling.rescale_(optimizer, 8, 32, "decoupled")
    assert float(group["lr"]) == pytest.approx(2e-3)
    assert float(group["initial_lr"]) == pytest.approx(4e-3)
    assert not tensor or group["initial_lr"] is initial


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sum", torch.ones(3), "Adam has a state 'sum' of which it is not known how"),
        ("step", torch.tensor(3), "Adam has a state 'step' of type torch.int64"),
    ],
)
def test_unknown_state_is_an_error_that_changes_nothing(name, value, message) -> None:
    # Catches a check that comes after the first group or the first parameter has been written.
    optimizer = make(torch.optim, "Adam", lr=torch.tensor(1e-3))
    step(optimizer, 0.7)
    states(optimizer)[1][name] = value
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        scaling.rescale_(optimizer, 8, 16, "decoupled")
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    # Where decays stay, so does whatever else there is.
    scaling.rescale_(optimizer, 8, 16, "linear")
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(2e-3)


def test_checkpoint_after_a_switch() -> None:
    """A run that switches, is saved and loaded goes on to the bit, also in torch's class."""
    # Catches something numerical that is kept beside groups and state.
    settings = {"lr": 0.01, "betas": (0.8, 0.9)}
    first = make(fusedopt, "AdamW", **settings)
    for _ in range(5):
        step(first, 0.7)
    scaling.rescale_(first, 8, 32, "sqrt", beta_form="power")
    step(first, 0.3)
    second, third = make(fusedopt, "AdamW"), make(torch.optim, "AdamW", foreach=False)
    for other in (second, third):
        other.load_state_dict(copy.deepcopy(first.state_dict()))
        with torch.no_grad():
            for p, q in zip(parameters(other), parameters(first), strict=True):
                p.copy_(q)
    for gradient in (0.2, -0.4, 1.0):
        moved = step(first, gradient)
        torch.testing.assert_close(step(second, gradient), moved, rtol=0, atol=0)
        torch.testing.assert_close(step(third, gradient), moved, rtol=1e-9, atol=0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_states() -> None:
    # Catches an operation that DTensors do not have, or that needs a plain tensor beside them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = torch.ones(4, 3, dtype=torch.float64)
        p = Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        options = {"momentum": 0.5, "centered": True, "alpha": 0.9}
        optimizer = fusedopt.RMSprop([p], **options, backend="reference")
        for scale in (1.0, 3.0):
            p.grad = distribute_tensor(scale * values, mesh, [Shard(0)])
            optimizer.step()
        state = optimizer.state[p]
        before = {name: state[name].full_tensor().clone() for name in ("square_avg", "grad_avg")}
        scaling.rescale_(optimizer, 8, 16, "sqrt", beta_form="power")
        assert isinstance(state["square_avg"], DTensor)
        signal = before["grad_avg"] ** 2
        expected = signal + (before["square_avg"] - signal) / 2
        torch.testing.assert_close(state["square_avg"].full_tensor(), expected)
        optimizer.step()
    finally:
        dist.destroy_process_group()


def test_names_do_not_make_a_state_known() -> None:
    # Catches Muon's average, called momentum_buffer, taken for a sum.
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.Muon([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="Muon"):
        scaling.rescale_(optimizer, 8, 16, "decoupled")
    assert optimizer.param_groups[0]["lr"] == before["param_groups"][0]["lr"]


@pytest.mark.filterwarnings("error")
def test_moment_of_the_batch_is_warned_of() -> None:
    # Catches "decoupled" on an optimizer whose second moment is not, in silence.
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="depend on the batch"):
        scaling.rescale_(fusedopt.AdamW([p]), 8, 16, "decoupled")
    scaling.rescale_(fusedopt.SGD([p]), 8, 16, "decoupled")
    samples = fusedopt.GradSampleSquares()
    scaling.rescale_(fusedopt.BatchDecoupledAdam([p], statistics=samples), 8, 16, "decoupled")


def test_bound_of_the_norm_falls_with_the_noise() -> None:
    # Catches a bound that clips noise at one batch size and does not at another.
    p = torch.nn.Parameter(torch.ones(3))
    for rule, expected in (("sqrt", 0.5), ("decoupled", 1.0)):
        optimizer = fusedopt.AdamW([p], betas=(0.9, 0.99), clip=fusedopt.GlobalNorm(1.0))
        scaling.rescale_(optimizer, 8, 32, rule)
        assert optimizer.clip.max_norm == expected


@pytest.mark.parametrize("module", [torch.optim, fusedopt], ids=["torch", "fusedopt"])
def test_decoupled_decay_per_sample_stays(module) -> None:
    # Catches weights that AdamW shrinks less over an epoch of larger batches, and a coupled decay,
    # which is part of the gradient, that follows.
    p = torch.nn.Parameter(torch.ones(3))
    adamw, adam = (
        cls([p], betas=(0.9, 0.99), weight_decay=0.1) for cls in (module.AdamW, module.Adam)
    )
    for optimizer in (adamw, adam):
        scaling.rescale_(optimizer, 8, 32, "sqrt")
    assert adamw.param_groups[0]["weight_decay"] == pytest.approx(0.2)
    assert adam.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["AdamC", "Lion", "ScheduleFreeAdamW"])
def test_optimizers_without_a_rule_are_refused(name: str) -> None:
    # Catches lr scaled without max_lr, and a sign's step scaled like a gradient's, before the first
    # step as after it.
    optimizer = make(fusedopt, name)
    for _ in range(2):
        before = copy.deepcopy(optimizer.state_dict())
        for rule in ("sqrt", "linear"):
            with pytest.raises(ValueError, match=f"no rule for the batch size is known for {name}"):
                scaling.rescale_(optimizer, 8, 16, rule)
        assert str(optimizer.state_dict()) == str(before)
        step(optimizer, 1.0)
