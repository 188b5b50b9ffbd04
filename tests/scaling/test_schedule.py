"""Learning-rate schedules over samples, against torch's schedulers over steps."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs

import fusedopt
from fusedopt import scaling

# What is tested is the arithmetic, of torch's optimizers, too.
pytestmark = pytest.mark.filterwarnings('ignore:rule="decoupled" is for:UserWarning')

FACTORIES = {
    "lambda": lambda o: lrs.LambdaLR(o, [lambda t: 0.93**t, lambda t: 1 / (1 + t)]),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.93),
    "step": lambda o: lrs.StepLR(o, 5, gamma=0.3),
    "multistep": lambda o: lrs.MultiStepLR(o, [3, 11, 12], gamma=0.3),
    "linear": lambda o: lrs.LinearLR(o, 0.1, total_iters=7),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=25, power=2.0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=30, eta_min=1e-4),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2),
    "sequential": lambda o: lrs.SequentialLR(
        o,
        [lrs.LinearLR(o, 0.01, total_iters=8), lrs.CosineAnnealingLR(o, T_max=22)],
        milestones=[8],
    ),
    "chained": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "cyclic": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, step_size_up=6, cycle_momentum=False),
    "onecycle": lambda o: lrs.OneCycleLR(o, [0.3, 0.1], total_steps=40, cycle_momentum=False),
}
STEPS = 30  # of the base schedule
BASE = 48  # samples; not a power of two, so that a quotient by it rounds
every_scheduler = pytest.mark.parametrize("factory", FACTORIES.values(), ids=list(FACTORIES))


def make(tensor: bool = False):
    groups = [{"params": [Parameter(torch.zeros(2))], "lr": lr} for lr in (0.1, 0.037)]
    if tensor:
        groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
    return fusedopt.SGD(groups, momentum=0.9, backend="reference")


def rates(optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def base_run(factory, tensor: bool = False, steps: int = STEPS) -> list[list[float]]:
    """Return torch's learning rates of each step and group."""
    optimizer = make(tensor)
    scheduler = factory(optimizer)
    curve = []
    for _ in range(steps):
        curve.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return curve


def followed(factory, batches: list[int], tensor: bool = False) -> list[list[float]]:
    """Return the learning rates of steps with these batches."""
    optimizer = make(tensor)
    schedule = scaling.samples_schedule(factory, optimizer, BASE, batches[0])
    curve = []
    for i, _ in enumerate(batches, 1):
        curve.append(rates(optimizer))
        optimizer.step()
        schedule.step(batches[i] if i < len(batches) else None)
    assert schedule.samples == sum(batches)
    return curve


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@every_scheduler
def test_torchs_learning_rates_at_the_base_batch(factory, tensor) -> None:
    """With batches of from_batch every lr is that of torch's scheduler, to the bit."""
    # Catches a curve that is one step off, a stand-in of lr 1 (absolute rates as eta_min and max_lr
    # then are wrong), and means that are formed as sum / B, which rounds.
    assert followed(factory, [BASE] * STEPS, tensor) == base_run(factory, tensor)


RAGGED = [50, 50, 50, 10] * 9
BATCHES = {
    "double": [2 * BASE] * (STEPS // 2),
    "third": [BASE // 3] * (3 * STEPS),
    "odd": [7] * (BASE * STEPS // 7),
    "ratio": [72] * (BASE * STEPS // 72),
    "ragged": RAGGED,
    "huge": [BASE * STEPS],
    "growing": [16] * 10 + [48] * 5 + [100] * 10,
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=list(BATCHES))
@every_scheduler
def test_mean_over_the_samples_of_a_step(factory, batches) -> None:
    """Every lr is the mean of the base run's over the step's samples, and so the sums agree."""
    # Catches the curve's value at the first or last sample of a step, weights that forget a partly
    # covered base step, and one that is passed over where a step ends at its end.
    curve = base_run(factory)
    for group, lr_of_step in enumerate(zip(*curve, strict=True)):
        per_sample = torch.tensor(lr_of_step, dtype=torch.float64).repeat_interleave(BASE)
        pieces = per_sample[: sum(batches)].split(batches)
        expected = [piece.mean().item() for piece in pieces]
        got = [step[group] for step in followed(factory, batches)]
        assert got == pytest.approx(expected, rel=1e-12)
        total = sum(lr * batch for lr, batch in zip(got, batches, strict=True))
        assert total == pytest.approx(per_sample[: sum(batches)].sum().item(), rel=1e-12)


def test_in_place_and_nothing_else() -> None:
    # Catches a tensor that is replaced (a graph reads the old one), a scheduler that reaches the
    # real optimizer, whose step it would wrap, and an initial_lr on the device, read at each step.
    optimizer = make(tensor=True)
    before = [dict(group) for group in optimizer.param_groups]
    tensors = [group["lr"] for group in optimizer.param_groups]
    schedule = scaling.samples_schedule(FACTORIES["cosine"], optimizer, BASE, 2 * BASE)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    for group, old, tensor in zip(optimizer.param_groups, before, tensors, strict=True):
        assert group["lr"] is tensor
        assert isinstance(group["initial_lr"], float)
        assert {k: v for k, v in group.items() if k != "initial_lr"} == old
    assert "step" not in vars(optimizer)
    assert schedule.get_last_lr() == pytest.approx(rates(optimizer))


def test_a_second_schedule_goes_from_the_same_start() -> None:
    # Catches lr taken for the start where an initial_lr is there, as torch's schedulers do not.
    optimizer = make()
    schedule = scaling.samples_schedule(FACTORIES["lambda"], optimizer, BASE)
    for _ in range(5):
        schedule.step()
    again = scaling.samples_schedule(FACTORIES["lambda"], optimizer, BASE)
    assert again.get_last_lr() == [0.1, 0.037]


@every_scheduler
def test_follows_a_rescaled_optimizer(factory) -> None:
    """After rescale_ the whole curve, absolute rates included, is larger by as much as lr."""
    # Catches a base lr that is read once only.
    plain, rescaled = make(), make()
    schedules = [scaling.samples_schedule(factory, o, BASE, 32) for o in (plain, rescaled)]
    for i in range(12):
        if i == 5:
            scaling.rescale_(rescaled, 8, 24, "linear")
        for schedule in schedules:
            schedule.step(100 if i == 5 else None)
        factor = 3 if i >= 5 else 1
        assert rates(rescaled) == pytest.approx([factor * lr for lr in rates(plain)], rel=1e-12)


def test_base_lr_of_zero() -> None:
    # Catches 0/0 in the ratio of the present base lr to the first.
    optimizer = fusedopt.SGD([Parameter(torch.zeros(2))], lr=0.0)
    schedule = scaling.samples_schedule(lambda o: lrs.LambdaLR(o, lambda t: 0.5), optimizer, 8)
    schedule.step()
    assert schedule.get_last_lr() == [0.0]


# The end of a schedule


@pytest.mark.parametrize("last", [BASE, 3 * BASE])
def test_schedule_that_ends(last) -> None:
    """OneCycleLR refuses steps past its total, and torch's training loop steps it once past."""

    # Catches an error at the last schedule.step() of a training that ends where the schedule does,
    # and no error where training goes on.
    def factory(o):
        return lrs.OneCycleLR(o, 0.3, total_steps=8, cycle_momentum=False)

    curve = [lr for lr, _ in base_run(factory, steps=8)]
    optimizer = make()
    schedule = scaling.samples_schedule(factory, optimizer, BASE, 3 * BASE)
    assert rates(optimizer)[0] == pytest.approx(sum(curve[:3]) / 3)
    schedule.step()
    schedule.step(2 * BASE)
    assert rates(optimizer)[0] == pytest.approx(sum(curve[6:]) / 2)
    schedule.step(last)
    # Of these base steps the scheduler gives the first, which torch's loop ends with.
    torchs = make()
    scheduler = factory(torchs)
    for _ in range(8):
        torchs.step()
        scheduler.step()
    assert rates(optimizer) == pytest.approx(rates(torchs))
    before = rates(optimizer), schedule.samples, schedule.batch_size
    with pytest.raises(ValueError, match="Tried to step"):
        schedule.step(BASE)
    assert (rates(optimizer), schedule.samples, schedule.batch_size) == before


# Checkpoints


@pytest.mark.parametrize("schedule_first", [False, True])
@every_scheduler
def test_resume(factory, schedule_first) -> None:
    """A schedule saved between two steps, through torch.save, goes on with the same rates."""
    # Catches recursive schedulers whose stand-in has its first lr again, base rates taken from the
    # optimizer as it was loaded (after a rescale_), and a position within a base step that is lost.
    first = make()
    schedule = scaling.samples_schedule(factory, first, BASE, 32)
    for i in range(9):
        if i == 4:
            scaling.rescale_(first, 8, 16, "linear")
        schedule.step(50 if i == 4 else None)
    file = io.BytesIO()
    torch.save({"schedule": schedule.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = make()
    if not schedule_first:
        second.load_state_dict(saved["optimizer"])
    other = scaling.samples_schedule(factory, second, BASE)
    other.load_state_dict(saved["schedule"])
    if schedule_first:
        second.load_state_dict(saved["optimizer"])
    for _ in range(10):
        assert rates(second) == rates(first)
        assert (other.samples, other.batch_size) == (schedule.samples, 50)
        schedule.step()
        other.step()


def test_state_is_a_copy() -> None:
    # Catches a state dict that moves on with the schedule: it is kept while training goes on.
    schedule = scaling.samples_schedule(FACTORIES["sequential"], make(tensor=True), BASE)
    state = schedule.state_dict()
    before = copy.deepcopy(state)
    other = scaling.samples_schedule(FACTORIES["sequential"], make(tensor=True), BASE)
    other.load_state_dict(state)
    for _ in range(12):
        schedule.step()
        other.step()
    assert state == before


def test_memory_does_not_grow() -> None:
    # Catches a list of the factors of all base steps.
    def size() -> int:
        return len(pickle.dumps(schedule.state_dict()))

    schedule = scaling.samples_schedule(FACTORIES["cosine"], make(), 1, 50)
    before = size()
    for _ in range(20):
        schedule.step()
    assert size() < before + 50


# Errors


def momentum_cycle(o):
    return lrs.OneCycleLR(o, 0.3, total_steps=40)


def same_momentum(o):
    return lrs.OneCycleLR(o, 0.3, total_steps=40, base_momentum=0.9, max_momentum=0.9)


def betas_cycle(o):
    return lrs.CyclicLR(o, 0.1, 0.3, mode="triangular2", base_momentum=0.8, max_momentum=0.9)


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("factory", [momentum_cycle, same_momentum, betas_cycle])
def test_schedules_of_momentum_are_refused(factory, optimizer_name) -> None:
    # Catches a momentum that changes in the stand-in alone, without a word.
    optimizer = getattr(torch.optim, optimizer_name)([Parameter(torch.zeros(2))], lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="also changes .*momentum.*pass cycle_momentum=False"):
        scaling.samples_schedule(factory, optimizer, BASE)
    assert optimizer.state_dict() == before


class LateDecay(lrs.LRScheduler):
    """Changes the weight decay from its third step on."""

    def get_lr(self):
        if self.last_epoch >= 3:
            self.optimizer.param_groups[0]["weight_decay"] = 0.5
        return self.base_lrs


def test_change_that_comes_later_is_refused() -> None:
    # Catches a check at construction only.
    schedule = scaling.samples_schedule(LateDecay, make(), BASE)
    schedule.step()
    schedule.step()
    with pytest.raises(ValueError, match="LateDecay also changes weight_decay"):
        schedule.step()
    # Within a step, where a schedule may end, too.
    with pytest.raises(ValueError, match="LateDecay also changes weight_decay"):
        scaling.samples_schedule(LateDecay, make(), BASE, 9 * BASE)


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (lambda o: lrs.ReduceLROnPlateau(o), TypeError, "ReduceLROnPlateau follows a metric"),
        (lambda o: None, TypeError, "must return a torch.optim.lr_scheduler.LRScheduler, got None"),
        (lambda o: lrs.ConstantLR(make()), ValueError, "for another optimizer"),
    ],
)
def test_what_is_no_schedule_over_steps(factory, error, message) -> None:
    # Catches an AttributeError somewhere below, or a schedule that never changes anything.
    with pytest.raises(error, match=message):
        scaling.samples_schedule(factory, make(), BASE)


def test_sizes_must_be_positive() -> None:
    # Catches an endless loop, and a mean over no sample.
    for sizes in ((0, 8), (8, 0), (8, float("nan")), (float("inf"), 8)):
        with pytest.raises(ValueError, match="must be positive and finite"):
            scaling.samples_schedule(FACTORIES["cosine"], make(), *sizes)
    schedule = scaling.samples_schedule(FACTORIES["cosine"], make(), 8)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="batch_size must be positive and finite"):
        schedule.step(-3)
    assert schedule.state_dict() == before


def test_groups_added_later() -> None:
    # Catches groups that are passed over in silence.
    optimizer = make()
    schedule = scaling.samples_schedule(FACTORIES["cosine"], optimizer, 8)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    for call in (schedule.step, lambda: schedule.load_state_dict(schedule.state_dict())):
        with pytest.raises(ValueError, match="for 2 parameter groups, and the optimizer has 3"):
            call()
