"""What users do between steps: nothing that a step prepared may outlive what it was made for."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from contract import (
    BACKENDS,
    CASES,
    DEVICE,
    PLAIN,
    Case,
    Pair,
    assert_same_bits,
    assert_same_state,
    gradient_like,
    groups_of,
    ids,
    new_params,
    on_backends,
    set_gradients,
    snapshot,
)
from torch.optim import Optimizer

import fusedopt

SGD, RMSPROP, ADAM, ADAMW = PLAIN
WITH_STEP = (RMSPROP, ADAM, ADAMW)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_case_on_backends = on_backends(CASES)
each_class_on_backends = on_backends(PLAIN)
counting_on_backends = on_backends(WITH_STEP)
each_class = pytest.mark.parametrize("case", PLAIN, ids=ids)
each_case = pytest.mark.parametrize("case", CASES, ids=ids)


def _states(optimizer: Optimizer, place: int = 0) -> dict[str, Any]:
    return optimizer.state[groups_of(optimizer)[place]]


# Gradients that come and go


@each_case_on_backends
def test_gradients_that_come_late_and_disappear(case: Case, backend: str) -> None:
    """A parameter without a gradient keeps values, states and step count; the others go on.

    Catches a shared step count, a table row taken from a neighbour, and for SGD a first
    momentum that is dampened, or a later one that is not.
    """
    pair = Pair(case, backend=backend)
    absent = {1: (0, 3), 2: (0, 3), 3: (0,), 4: (0, 1, 2, 3), 6: (2,), 7: (0, 1)}
    for step in range(1, 10):
        pair.backward()
        for optimizer in pair.both:
            for place in absent.get(step, ()):
                groups_of(optimizer)[place].grad = None
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@each_case_on_backends
def test_a_step_without_any_gradient_changes_nothing(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    for _ in range(2):
        pair.each(lambda o: o.zero_grad())
        before = snapshot(pair.ours)
        pair.each(lambda o: o.step())
        assert_same_bits(snapshot(pair.ours), before)
        pair.step()
    pair.check()


@each_class_on_backends
def test_gradients_at_new_and_at_old_addresses(case: Case, backend: str) -> None:
    """Catches addresses of gradients kept from an earlier step."""
    pair = Pair(case, backend=backend)
    kept = [[p.grad for p in groups_of(o)] for o in pair.both]
    for step in range(6):
        pair.backward()
        if step == 2:
            kept = [[p.grad for p in groups_of(o)] for o in pair.both]
        if step in (3, 5):  # the same tensors as before, holding new values
            for optimizer, tensors in zip(pair.both, kept, strict=True):
                for p, tensor in zip(groups_of(optimizer), tensors, strict=True):
                    tensor.copy_(p.grad)
                    p.grad = tensor
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)


@each_class_on_backends
def test_gradients_of_changing_layout(case: Case, backend: str) -> None:
    """Contiguous, transposed, expanded, and a view at an odd address, in turn."""
    shape = (8, 6)

    def lay_out(value: torch.Tensor, kind: int) -> torch.Tensor:
        if kind == 1:
            return value.t().contiguous().t()
        if kind == 2:
            return value[:1].expand(shape)
        if kind == 3:
            buffer = torch.zeros(value.numel() + 1, dtype=value.dtype, device=value.device)
            buffer[1:] = value.flatten()
            return buffer[1:].view(shape)
        return value

    pair = Pair(case, shapes=[shape], backend=backend)
    for kind in (0, 1, 0, 2, 3, 2, 1, 3, 0):
        pair.backward()
        for optimizer in pair.both:
            (p,) = groups_of(optimizer)
            p.grad = lay_out(p.grad, kind)
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@both_backends
@pytest.mark.parametrize("case", [SGD, ADAM], ids=ids)
def test_a_gradient_replaced_by_its_lazy_conjugate(case: Case, backend: str) -> None:
    """``conj()`` is a flag on a view: same address, same strides, other values."""
    pair = Pair(case, shapes=[(5,)], dtype=torch.complex64, backend=backend)
    for step in range(4):
        if step % 2 == 0:
            pair.backward()
        else:
            for optimizer in pair.both:
                (p,) = groups_of(optimizer)
                p.grad = p.grad.conj()
        pair.each(lambda o: o.step())
        assert_same_state(pair.ours, pair.theirs)


@each_class_on_backends
def test_gradients_are_never_written(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend, ours_only={"clip": fusedopt.GlobalNorm(0.1)})
    for _ in range(2):
        pair.backward()
        before = [p.grad.clone() for p in groups_of(pair.ours)]
        pair.ours.step()
        assert_same_bits([p.grad for p in groups_of(pair.ours)], before)


@each_class_on_backends
def test_dropped_gradients_are_freed(case: Case, backend: str) -> None:
    """Catches a plan that holds the last gradients, so that peak memory is theirs more."""
    (p,) = new_params([(2000,)])
    optimizer = case.ours([p], **case.options, backend=backend)
    for seed in range(3):
        p.grad = gradient_like(p, seed)
        last = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert last() is None, f"gradient of step {seed} is still held"


@each_class
def test_zero_grad_both_ways(case: Case) -> None:
    pair = Pair(case)
    for to_none in (True, False):
        pair.step()
        pair.each(lambda o, to_none=to_none: o.zero_grad(set_to_none=to_none))
        gradients = [p.grad for p in groups_of(pair.ours)]
        assert all(g is None if to_none else bool((g == 0).all()) for g in gradients)
        pair.each(lambda o: o.step())  # gradients of zero still decay, average and move
    pair.check()


@each_class
def test_gradients_with_a_history_of_their_own(case: Case) -> None:
    """``backward(create_graph=True)`` leaves gradients that require gradients."""
    (p,), (q,) = new_params([(4,)]), new_params([(4,)])
    ours = case.ours([p], **case.options, backend="reference")
    theirs = case.theirs([q], **case.options, foreach=False)
    for optimizer in (ours, theirs):
        for _ in range(2):
            (x,) = groups_of(optimizer)
            (x.grad,) = torch.autograd.grad((x**3).sum(), [x], create_graph=True)
            optimizer.step()
    assert_same_state(ours, theirs)
    assert p.requires_grad and p.is_leaf


# Parameters: groups, ties, frozen ones --------------------------------------------------------


@each_case_on_backends
def test_add_param_group_after_steps(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    pair.step(3)
    extra, twins = new_params(seed=7), new_params(seed=7)
    pair.ours.add_param_group({"params": extra, "lr": 0.02})
    pair.theirs.add_param_group({"params": twins, "lr": 0.02})
    pair.step(3)
    assert_same_state(pair.ours, pair.theirs)


@each_class
def test_groups_taken_away_and_parameters_replaced(case: Case) -> None:
    """Trainers that freeze by stage edit ``param_groups`` itself."""
    pair = Pair(case, groups=({}, {"lr": 0.01}))
    pair.step(2)
    removed = [o.param_groups.pop(0) for o in pair.both]
    before = [p.detach().clone() for p in removed[0]["params"]]
    pair.step(2)
    assert_same_bits([p.detach() for p in removed[0]["params"]], before)
    fresh = [new_params(seed=9), new_params(seed=9)]
    for optimizer, params, group in zip(pair.both, fresh, removed, strict=True):
        optimizer.param_groups.append(group)
        optimizer.param_groups[0]["params"] = params
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)


@each_class_on_backends
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_is_updated_once(case: Case, backend: str) -> None:
    """The documented difference: torch's for-loop updates it twice, one launch would race."""
    (p, other), (q, rest) = new_params([(5,), (3,)]), new_params([(5,), (3,)])
    ours = case.ours([p, other, p], **case.options, backend=backend)
    theirs = case.theirs([q, rest], **case.options, foreach=False)
    for seed in range(1, 4):
        for params in ((p, other), (q, rest)):
            set_gradients(params, seed)
        ours.step()
        theirs.step()
    torch.testing.assert_close([p, other], [q, rest], rtol=3e-5, atol=3e-6)
    assert ours.state[p].get("step", torch.tensor(3.0)).item() == 3


@each_class_on_backends
def test_a_frozen_parameter_with_a_gradient_left_is_updated(case: Case, backend: str) -> None:
    """As in torch: ``.grad`` decides, ``requires_grad`` does not."""
    pair = Pair(case, backend=backend)
    for step in range(4):
        pair.backward()
        for optimizer in pair.both:
            groups_of(optimizer)[0].requires_grad_(step % 2 == 0)
        pair.each(lambda o: o.step())
    pair.check()
    assert pair.ours.state[groups_of(pair.ours)[0]].keys()


@each_class_on_backends
def test_parameters_that_are_views_of_one_buffer(case: Case, backend: str) -> None:
    """Flat buffers: neighbours share storage, at addresses of any alignment."""
    flat, copies = (torch.linspace(-1, 1, 40, device=DEVICE) for _ in range(2))
    cut = (0, 3, 4, 21, 40)
    pairs = list(zip(cut, cut[1:], strict=False))
    mine = [torch.nn.Parameter(flat[a:b]) for a, b in pairs]
    other = [torch.nn.Parameter(copies[a:b]) for a, b in pairs]
    ours = case.ours(mine, **case.options, backend=backend)
    theirs = case.theirs(other, **case.options, foreach=False)
    for seed in range(1, 4):
        for optimizer in (ours, theirs):
            set_gradients(groups_of(optimizer), seed)
            optimizer.step()
    assert_same_state(ours, theirs)
    torch.testing.assert_close(flat, copies, rtol=3e-5, atol=3e-6)


# p.data


@each_case_on_backends
def test_swapped_data(case: Case, backend: str) -> None:
    """Catches addresses of parameters kept from an earlier step."""
    pair = Pair(case, backend=backend)
    for step in range(5):
        pair.step()
        for optimizer in pair.both:
            for p in groups_of(optimizer)[step % 2 :: 2]:
                p.data = p.data * 0.5
    pair.step()
    pair.check()


@each_class_on_backends
def test_data_swapped_to_another_layout(case: Case, backend: str) -> None:
    pair = Pair(case, shapes=[(6, 4)], backend=backend)
    pair.step(2)
    for optimizer in pair.both:
        (p,) = groups_of(optimizer)
        p.data = p.data.t().contiguous().t()
    pair.step(2)
    for optimizer in pair.both:
        (p,) = groups_of(optimizer)
        wide = torch.zeros(6, 8, device=p.device)
        wide[:, ::2] = p.data
        p.data = wide[:, ::2]
    pair.step(2)
    pair.check()
    (p,) = groups_of(pair.ours)
    assert p.stride() == (8, 2)


@each_class_on_backends
def test_data_set_aside_and_brought_back(case: Case, backend: str) -> None:
    """Evaluating with averaged weights: swap in, evaluate, swap back, train on."""
    pair = Pair(case, backend=backend)
    pair.step(2)
    for optimizer in pair.both:
        params = groups_of(optimizer)
        aside = [p.data for p in params]
        for p in params:
            p.data = torch.zeros_like(p)
        for p, values in zip(params, aside, strict=True):
            p.data = values
    pair.step(2)
    pair.check()


@each_class_on_backends
@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_model_converted_between_steps(case: Case, backend: str, convert: str) -> None:
    """Parameters change type, states keep theirs.

    torch refuses the mix or computes in the lower type, so the oracle is torch in float64 that
    rounds the parameters to the new type after every step.
    """
    if convert == "half" and case.name == "SGD":
        pytest.skip("torch's own rounding of the buffer differs; other types cover the class")
    dtype = getattr(torch, {"half": "float16", "double": "float64"}.get(convert, convert))
    ours_model, oracle = (torch.nn.Linear(6, 3).to(DEVICE) for _ in range(2))
    oracle.load_state_dict(ours_model.state_dict())
    ours = case.ours(ours_model.parameters(), **case.options, backend=backend)
    theirs = case.theirs(oracle.parameters(), **case.options, foreach=False)
    _step_rounded(ours, theirs, torch.float32, range(1, 3))
    getattr(ours_model, convert)()
    oracle.double()
    for p in oracle.parameters():
        p.data = p.data.to(dtype).double()
        state = theirs.state[p]
        state.update({k: v.double() for k, v in state.items() if k != "step"})
    _step_rounded(ours, theirs, dtype, range(3, 6))
    unit = max(torch.finfo(dtype).eps, 1e-6)
    for p, q in zip(ours_model.parameters(), oracle.parameters(), strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), q.double(), rtol=3 * unit, atol=3 * unit)


def _step_rounded(ours: Optimizer, theirs: Optimizer, dtype: torch.dtype, seeds: range) -> None:
    for seed in seeds:
        set_gradients(groups_of(ours), seed)
        for p, q in zip(groups_of(ours), groups_of(theirs), strict=True):
            q.grad = p.grad.to(q.dtype)
        ours.step()
        theirs.step()
        for q in groups_of(theirs):
            q.data = q.data.to(dtype).to(q.dtype)


# States


@each_case_on_backends
def test_cleared_state_starts_afresh(case: Case, backend: str) -> None:
    """Of all parameters, of one, and by a new dictionary for one."""
    pair = Pair(case, backend=backend)
    pair.step(2)
    pair.each(lambda o: o.state.clear())
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    pair.each(lambda o: o.state.pop(groups_of(o)[0], None))
    pair.step(2)
    assert_same_state(pair.ours, pair.theirs)
    if pair.ours.state:
        pair.each(lambda o: _states(o).clear())
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)
        pair.each(lambda o: o.state.__setitem__(groups_of(o)[0], {}))
    pair.step(2)
    pair.check()


@each_case_on_backends
@pytest.mark.parametrize("how", ["replaced", "written", "data"])
def test_edited_states_are_used(case: Case, backend: str, how: str) -> None:
    """Catches addresses of states kept from an earlier step."""
    pair = Pair(case, backend=backend)
    pair.step(2)
    for optimizer in pair.both:
        for p in groups_of(optimizer):
            for key, value in optimizer.state[p].items() if p in optimizer.state else ():
                edited = value.abs() * 0.5 + 0.25
                if key == "step":
                    continue
                if how == "replaced":
                    optimizer.state[p][key] = edited
                elif how == "written":
                    value.copy_(edited)
                else:
                    value.data = edited
    pair.step(3)
    pair.check()


@counting_on_backends
@pytest.mark.parametrize("how", ["fill_", "assign", "share"])
def test_edited_step_counts_are_used(case: Case, backend: str, how: str) -> None:
    """Written in place, assigned, or one tensor assigned to several parameters."""
    pair = Pair(case, backend=backend)
    pair.step(3)
    for optimizer in pair.both:
        shared = torch.tensor(11.0)
        for place in (0, 3):
            if how == "fill_":
                _states(optimizer, place)["step"].fill_(11)
            elif how == "assign":
                _states(optimizer, place)["step"] = torch.tensor(11.0)
            else:
                _states(optimizer, place)["step"] = shared.clone()
    pair.step(3)
    pair.check()
    counts = [_states(pair.ours, place)["step"].item() for place in range(4)]
    assert counts == [14, 6, 6, 14]


@each_class
def test_states_that_a_user_keeps_beside_ours(case: Case) -> None:
    """An entry of another name, there before the first step, neither stops nor confuses it."""
    pair = Pair(case)
    for p in groups_of(pair.ours):
        pair.ours.state[p]["mine"] = "kept"
    pair.step(3)
    for p, q in zip(groups_of(pair.ours), groups_of(pair.theirs), strict=True):
        assert pair.ours.state[p].pop("mine") == "kept"
        assert set(pair.ours.state[p]) == set(pair.theirs.state[q])
    pair.check()


# Options edited between steps

EDITS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.01}, {"momentum": 0.5}, {"weight_decay": 0}, {"dampening": 0.6},
        {"maximize": True}, {"dampening": 0, "nesterov": True}, {"nesterov": False},
    ],
    "RMSprop": [
        {"lr": 0.01}, {"alpha": 0.5}, {"weight_decay": 0}, {"eps": 0.1}, {"maximize": True},
    ],
    "Adam": [
        {"lr": 0.01}, {"betas": (0.2, 0.5)}, {"weight_decay": 0}, {"eps": 0.1},
        {"maximize": True}, {"decoupled_weight_decay": True, "weight_decay": 0.5},
    ],
}  # fmt: skip
EDITS["AdamW"] = EDITS["Adam"]


@each_class_on_backends
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_edited_options_take_effect(case: Case, backend: str, capturable: bool) -> None:
    """In one group of two, so that the other must not follow."""
    pair = Pair(case, groups=({}, {}), backend=backend, shapes=[(9,), ()])
    if capturable:
        pair.ours.param_groups[0]["capturable"] = True
        pair.ours.param_groups[1]["capturable"] = True
    pair.step(2)
    for edit in EDITS[case.name]:
        pair.each(lambda o, edit=edit: o.param_groups[0].update(edit))
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)
    pair.check()


@both_backends
def test_sgd_momentum_switched_on_off_and_on(backend: str) -> None:
    """torch: a buffer that was there before is resumed, one that was not is the gradient."""
    pair = Pair(SGD, backend=backend, momentum=0)
    for momentum in (0, 0.9, 0, 0.9):
        pair.each(lambda o, m=momentum: o.param_groups[0].update(momentum=m))
        pair.step(2)
        torch.testing.assert_close(groups_of(pair.ours), groups_of(pair.theirs))
    pair.check()


@both_backends
@pytest.mark.parametrize(
    ("case", "option", "value", "key"),
    [
        (ADAM, "amsgrad", True, "max_exp_avg_sq"),
        (ADAMW, "amsgrad", True, "max_exp_avg_sq"),
        (RMSPROP, "momentum", 0.5, "momentum_buffer"),
        (RMSPROP, "centered", True, "grad_avg"),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_states_switched_on_later_start_at_zero(
    case: Case, option: str, value: Any, key: str, backend: str
) -> None:
    """torch raises KeyError there; given a state of zeros it goes on, and so do we without."""
    pair = Pair(case, backend=backend, shapes=[(5,), (3, 2)])
    pair.step(2)
    pair.each(lambda o: o.param_groups[0].update({option: value}))
    for p in groups_of(pair.theirs):
        pair.theirs.state[p][key] = torch.zeros_like(p)
    pair.step(1 if key == "grad_avg" else 3)
    assert_same_state(pair.ours, pair.theirs)
    pair.each(lambda o: o.param_groups[0].update({option: type(value)(0)}))
    pair.step(2)
    pair.check()


@each_class_on_backends
def test_backend_switched_between_steps(case: Case, backend: str) -> None:
    pair = Pair(case, backend=backend)
    for name in ("reference", "triton", "reference"):
        pair.ours.backend = name
        pair.step(2)
    pair.check()


# Repetition and launches


@each_class_on_backends
def test_reruns_give_the_same_bits(case: Case, backend: str) -> None:
    runs = []
    for _ in range(2):
        params = new_params()
        clip = fusedopt.GlobalNorm(0.5)
        optimizer = case.ours(params, **case.options, clip=clip, backend=backend)
        for seed in range(1, 5):
            set_gradients(params, seed)
            optimizer.step()
        runs.append([snapshot(optimizer), clip.last.clone()])
    assert_same_bits(*runs)


class _Launches:
    """Stands in for the launch: counts, and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fusedopt.backends import triton

        self.count = 0
        monkeypatch.setattr(triton, "launch", self)

    def __call__(self, *arguments: Any, **meta: Any) -> None:
        self.count += 1

    def of(self, optimizer: Optimizer) -> int:
        self.count = 0
        optimizer.step()
        return self.count


def _many(dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    shapes = [(3,), (2, 5), (1030,), ()]
    params = [
        torch.nn.Parameter(torch.zeros(shapes[i % 4], dtype=dtypes[i % len(dtypes)], device=DEVICE))
        for i in range(1000)
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    cuts = [params[:300], params[300:700], params[700:]]
    return [
        {"params": cut, "lr": lr, "weight_decay": decay}
        for cut, lr, decay in zip(cuts, (0.1, 0.2, 0.3), (0.0, 0.1, 0.2), strict=True)
    ]


@each_case
def test_a_thousand_tensors_in_three_groups_are_one_launch(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = _Launches(monkeypatch)
    optimizer = case.ours(_many((torch.float32,)), **case.options, backend="triton")
    assert [launches.of(optimizer) for _ in range(3)] == [1, 1, 1]
    for p in groups_of(optimizer)[::3]:  # these now are a step behind the others
        p.grad = None
    assert launches.of(optimizer) == 1
    for p in groups_of(optimizer):
        p.grad = torch.ones_like(p)
    assert [launches.of(optimizer) for _ in range(2)] == [1, 1]


@each_class
def test_mixed_types_are_one_launch_each(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = _Launches(monkeypatch)
    types = (torch.float32, torch.bfloat16, torch.float16)
    for count in (2, 3):
        optimizer = case.ours(_many(types[:count]), **case.options, backend="triton")
        assert [launches.of(optimizer) for _ in range(2)] == [count, count]


def test_clipping_adds_one_launch_for_each_type_and_one_for_the_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = _Launches(monkeypatch)
    clip = fusedopt.GlobalNorm(1.0)
    groups = _many((torch.float32, torch.bfloat16))
    optimizer = ADAMW.ours(groups, **ADAMW.options, clip=clip, backend="triton")
    assert launches.of(optimizer) == 2 + 1 + 2
