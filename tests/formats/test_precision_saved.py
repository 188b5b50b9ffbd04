"""Checkpoints, pickles and copies of optimizers that keep few bytes: exact, or an error."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from contract import assert_unchanged, snapshot
from dyadic import Dyadic
from format_cases import PARAMETERS, assert_same_bits_of, bits_of, params_of
from formats_by_hand import HALF_UNIT, is_code, joined, levels, read, spread
from lockstep import TINY
from torch import Tensor

import fusedopt

SHAPES = ((2, 150), (5,), ())
HYPER = {"lr": 0.05, "betas": (0.75, 0.9), "weight_decay": 0.1}
FORMATS = {
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "mixed": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": torch.float32}},
    "float32": {"state_dtype": torch.float32},
    "float16": {"state_dtype": torch.float16},
    "stochastic": {"state_dtype": "int8", "rounding": "stochastic", "rounding_seed": -5},
    "kahan": {"state_dtype": torch.float32, "rounding": "kahan"},
    "remainder": {"state_dtype": "fp8", "master": "remainder"},
    "remainder8": {"state_dtype": "int8", "master": "remainder8", "rounding": "stochastic"},
    "master": {"state_dtype": torch.float32, "master": "float32"},
}
each_format = pytest.mark.parametrize("name", FORMATS)


def draw(seed: int, shape: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def new(
    name: str | None, params: list[Tensor] | None = None, cls: Any = fusedopt.AdamW, **more: Any
) -> Any:
    """An optimizer in a format, over new parameters or copies of the values of others."""
    values = params or [draw(i, s) for i, s in enumerate(SHAPES)]
    made = [torch.nn.Parameter(p.detach().clone()) for p in values]
    formats = {} if name is None else FORMATS[name]
    return cls(made, **HYPER, **formats, **more)


def steps(optimizers: list[Any], first: int, count: int) -> None:
    for seed in range(first, first + count):
        for optimizer in optimizers:
            for i, p in enumerate(params_of(optimizer)):
                p.grad = draw(100 * seed + i, p.shape, p.dtype)
            optimizer.step()


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_file(optimizer: Any, name: str, backend: str) -> Any:
    other = new(name, params_of(optimizer), backend=backend)
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


def into_a_plain_one(optimizer: Any, name: str, backend: str) -> Any:
    # The file says how its states are kept, as it says lr.
    other = new(None, params_of(optimizer), backend=backend)
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


def into_another_format(optimizer: Any, name: str, backend: str) -> Any:
    names = list(FORMATS)
    other = new(names[names.index(name) - 1], params_of(optimizer), backend=backend)
    steps([other], 50, 1)
    for p, q in zip(params_of(other), params_of(optimizer), strict=True):
        p.data.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def by_pickle(optimizer: Any, name: str, backend: str) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def by_deepcopy(optimizer: Any, name: str, backend: str) -> Any:
    return copy.deepcopy(optimizer)


def whole_by_file(optimizer: Any, name: str, backend: str) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [by_file, into_a_plain_one, into_another_format, by_pickle, by_deepcopy, whole_by_file]


# What is saved is the host's part: the kernel goes on from two of them.
SAVED = [("reference", name) for name in FORMATS]
SAVED += [("triton", name) for name in ("stochastic", "remainder8")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("backend", "name"), SAVED)
def test_what_comes_back_goes_on_to_the_bit(backend: str, name: str, way: Any) -> None:
    # Catches codes, scales, masters or float32 states that are cast to the parameter's type, and
    # a seed, a parameter's number or a step count that is lost.
    ours = new(name, backend=backend)
    steps([ours], 0, 2)
    held = bits_of(ours)
    back = way(ours, name, backend)
    assert_same_bits_of(held, back)
    steps([ours, back], 10, 2)
    assert_same_bits_of(ours, back)
    for option in ("state_dtype", "rounding", "master", "rounding_seed"):
        assert back.param_groups[0][option] == ours.param_groups[0][option]
    moved = zip(params_of(ours), held, strict=True)
    assert all(not torch.equal(p.view(torch.int16), bits) for p, (bits, _) in moved)


def torchs(params: list[Tensor], count: int, wide: bool = True) -> Any:
    made = [torch.nn.Parameter(p.detach().float() if wide else p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(made, **HYPER, foreach=False)
    steps([theirs], 0, count)
    return theirs


@each_format
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "bfloat16"])
def test_a_checkpoint_of_torch_loads_into_each(wide: bool, name: str) -> None:
    # Catches states that are rounded to the parameter's type on their way, and codes of no scale.
    theirs = torchs([draw(i, s) for i, s in enumerate(SHAPES)], 3, wide)
    ours = new(name, [q.bfloat16() for q in params_of(theirs)], backend="reference")
    ours.load_state_dict(through_file(theirs.state_dict()))
    assert ours.param_groups[0]["state_dtype"] == FORMATS[name]["state_dtype"]
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        state = ours.state[p]
        assert state["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            exact = theirs.state[q][key].double()
            close(state, key, exact)
    before = [p.detach().clone() for p in params_of(ours)]
    steps([ours, theirs], 20, 1)
    for p, q, old in zip(params_of(ours), params_of(theirs), before, strict=True):
        assert ours.state[p]["step"] == 4
        way = (q.double() - old.double()).abs()
        off = (joined(p, ours.state[p]) - q.double()).abs()
        # In bfloat16, torch rounds the decayed parameter as well.
        assert (off <= 2.0**-6 * q.double().abs() + 0.2 * way.max()).all()


def close(state: Any, key: str, exact: Tensor) -> None:
    """A state that was converted is next to its value: no threshold, the nearer of two codes."""
    kept = state[key]
    if not is_code(kept):
        bound = HALF_UNIT[kept.dtype] * exact.abs() + TINY[kept.dtype]
        assert ((kept.double() - exact).abs() <= bound).all()
        return
    table = levels(kept.dtype)
    scale = spread(state[f"{key}_scale"], kept.shape)
    places = torch.searchsorted(table, (exact.abs() / scale).clamp(max=1.0))
    gap = table[places] - table[(places - 1).clamp(min=0)]
    off = (read(state, key) - exact).abs() / scale
    # Half of a gap in the code's own measure, between two levels: never all of it.
    assert (off <= 0.75 * gap + 1e-6).all()


@each_format
def test_each_exports_to_torch(name: str) -> None:
    # Catches entries that torch does not know, types it does not take, and tensors that are shared.
    ours = new(name, backend="reference")
    steps([ours], 0, 3)
    exported = fusedopt.export_state_dict(ours)
    values = [joined(p, ours.state[p]).float() for p in params_of(ours)]
    made = [torch.nn.Parameter(v) for v in values]
    theirs = torch.optim.AdamW(made, lr=1.0, foreach=False)
    theirs.load_state_dict(through_file(exported))
    assert theirs.param_groups[0]["betas"] == HYPER["betas"]
    assert theirs.param_groups[0].keys() == torch.optim.AdamW(made).param_groups[0].keys()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert theirs.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            kept = theirs.state[q][key]
            assert kept.dtype == torch.float32
            exact = read(ours.state[p], key)
            assert ((kept.double() - exact).abs() <= 2.0**-22 * exact.abs()).all()
    held = bits_of(ours)
    for state in exported["state"].values():
        for value in state.values():
            value.fill_(7)
            assert value.untyped_storage().nbytes() == value.nbytes
    assert_same_bits_of(held, ours)
    steps([ours, theirs], 20, 1)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        size = q.double().abs() + 1
        assert ((joined(p, ours.state[p]) - q.double()).abs() <= 2.0**-7 * size).all()


@each_format
def test_there_and_back_by_torch(name: str) -> None:
    # Catches codes that move when what they stand for is encoded again.
    ours = new(name, backend="reference")
    steps([ours], 0, 3)
    back = new(name, params_of(ours), backend="reference")
    back.load_state_dict(fusedopt.export_state_dict(ours))
    for p, q in zip(params_of(ours), params_of(back), strict=True):
        for key, value in ours.state[p].items():
            if key not in ("master", "compensation"):
                other = back.state[q][key]
                assert torch.equal(value.float(), other.float()), key
                # Not a view of the groups that it was encoded in, which are longer.
                assert other.stride() == value.stride()
                assert key == "step" or other.untyped_storage().nbytes() == other.nbytes


def test_other_rules_export_too() -> None:
    ours = fusedopt.SGD(
        [torch.nn.Parameter(draw(0, (200,)))], lr=0.1, momentum=0.9, state_dtype="int8",
        rounding="stochastic",
    )  # fmt: skip
    steps([ours], 0, 2)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(200))], lr=0.1, momentum=0.9)
    theirs.load_state_dict(fusedopt.export_state_dict(ours))
    (state,) = theirs.state.values()
    assert state.keys() == {"momentum_buffer"}
    steps([theirs], 5, 1)
    own = Dyadic([torch.nn.Parameter(draw(0, (200,)))], state_dtype="int8", rounding="stochastic")
    steps([own], 0, 2)
    (state,) = fusedopt.export_state_dict(own)["state"].values()
    assert state.keys() == {"mean", "size"}
    form = fusedopt.SGD([torch.nn.Parameter(draw(0, (3,)))], lr=0.1, momentum=0.9,
                        momentum_form="ema")  # fmt: skip
    with pytest.raises(ValueError, match="momentum_form"):
        fusedopt.export_state_dict(form)


AS_TORCH: dict[str, dict[str, Any]] = {
    "torch": {}, "remainder": {"master": "remainder"}, "kahan": {"rounding": "kahan"},
    "stochastic": {"rounding": "stochastic"}, "other states": {"state_dtype": {"exp_avg": "int8"}},
    "bfloat16 once": {"state_dtype": torch.bfloat16}, "int8 once": {"state_dtype": "int8"},
}  # fmt: skip


@pytest.mark.parametrize("name", AS_TORCH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_loads_for_no_type_takes_the_parameters(dtype: torch.dtype, name: str) -> None:
    # Catches states that stay in float32 beside a bfloat16 master, or in a type that an option
    # asked for which is gone.
    options = {**HYPER, **AS_TORCH[name], "backend": "reference"}
    if dtype == torch.float32:
        options |= {"rounding": None, "master": None}
    if name.endswith("once"):
        ours = fusedopt.AdamW([torch.nn.Parameter(draw(0, (2, 150), dtype))], **options)
        steps([ours], 0, 2)
        saved = ours.state_dict()
        for group in saved["param_groups"]:
            group["state_dtype"] = None
        options["state_dtype"] = None
    else:
        saved = fusedopt.export_state_dict(torchs_like(dtype))
    back = fusedopt.AdamW([torch.nn.Parameter(draw(0, (2, 150), dtype))], **options)
    back.load_state_dict(through_file(saved))
    (state,) = back.state.values()
    assert state["exp_avg_sq"].dtype == dtype and state["step"].dtype == torch.float32
    assert is_code(state["exp_avg"]) or state["exp_avg"].dtype == dtype
    steps([back], 5, 1)
    assert state["exp_avg_sq"].dtype == dtype


def torchs_like(dtype: torch.dtype) -> Any:
    optimizer = fusedopt.AdamW([torch.nn.Parameter(draw(0, (2, 150), dtype))], **HYPER)
    steps([optimizer], 0, 2)
    return optimizer


def test_a_live_state_keeps_its_type_where_no_type_is_asked_for() -> None:
    # Catches what is lost by a change of the option alone: a file is where types are taken.
    p = torch.nn.Parameter(draw(0, (2, 150)))
    ours = fusedopt.AdamW([p], **HYPER, state_dtype=torch.float32, master="remainder")
    steps([ours], 0, 2)
    held = bits_of(ours)
    ours.param_groups[0]["state_dtype"] = None
    assert_same_bits_of(held, copy.deepcopy(ours))
    steps([ours], 2, 1)
    assert ours.state[p]["exp_avg"].dtype == torch.float32
    ours.load_state_dict(ours.state_dict())
    assert ours.state[p]["exp_avg"].dtype == torch.bfloat16


def _no_scale(state: Any, saved: Any) -> None:
    del state["exp_avg_scale"]


def _no_codes(state: Any, saved: Any) -> None:
    del state["exp_avg_sq"]


def _short_scale(state: Any, saved: Any) -> None:
    state["exp_avg_sq_scale"] = state["exp_avg_sq_scale"][:1]


def _half_scale(state: Any, saved: Any) -> None:
    state["exp_avg_sq_scale"] = state["exp_avg_sq_scale"].half()


def _other_codes(state: Any, saved: Any) -> None:
    state["exp_avg"] = state["exp_avg"].view(torch.uint8).long()


def _swapped_codes(state: Any, saved: Any) -> None:
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def _short_codes(state: Any, saved: Any) -> None:
    state["exp_avg"] = state["exp_avg"][:, :140]


def _short_master(state: Any, saved: Any) -> None:
    state["master"] = state["master"][:1]


def _long_master(state: Any, saved: Any) -> None:
    state["master"] = state["master"].long()


def _no_step(state: Any, saved: Any) -> None:
    del state["step"]


def _bad_option(state: Any, saved: Any) -> None:
    saved["param_groups"][0]["state_dtype"] = "int4"


def _unsound(state: Any, saved: Any) -> None:
    saved["param_groups"][0]["master"] = "remainder"


CUTS = [
    _no_scale, _no_codes, _short_scale, _half_scale, _other_codes, _swapped_codes, _short_codes,
    _short_master, _long_master, _no_step, _bad_option, _unsound,
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_file_that_is_cut_changes_nothing(cut: Any) -> None:
    # Catches what would be found at the next step only, or not at all.
    ours = new("remainder8", backend="reference")
    steps([ours], 0, 2)
    saved = copy.deepcopy(ours.state_dict())
    cut(saved["state"][0], saved)
    other = new("remainder8", params_of(ours), backend="reference")
    steps([other], 5, 1)
    before, bits = snapshot(other), bits_of(other)
    with pytest.raises((ValueError, KeyError)):
        other.load_state_dict(saved)
    assert_unchanged(other, before)
    assert_same_bits_of(bits, other)
    steps([other], 6, 1)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_file_of_every_parameter(parameter: str) -> None:
    dtype, formats = PARAMETERS[parameter]
    options = {**HYPER, **formats, "state_dtype": "int8", "backend": "reference"}
    ours = fusedopt.AdamW([torch.nn.Parameter(draw(0, (200,), dtype))], **options)
    steps([ours], 0, 2)
    values = params_of(ours)[0].detach().clone()
    other = fusedopt.AdamW([torch.nn.Parameter(values)], **HYPER, backend="reference")
    other.load_state_dict(through_file(ours.state_dict()))
    steps([ours, other], 5, 2)
    assert_same_bits_of(ours, other)


def test_a_master_for_another_type_of_parameter_is_refused() -> None:
    # Catches options of a file that do not fit, found at the next step, when all is replaced.
    ours = new("remainder", backend="reference")
    steps([ours], 0, 2)
    other = fusedopt.AdamW([torch.nn.Parameter(p.float()) for p in params_of(ours)], **HYPER)
    steps([other], 0, 1)
    before = snapshot(other)
    with pytest.raises(ValueError, match="master='remainder'.*float32"):
        other.load_state_dict(ours.state_dict())
    assert_unchanged(other, before)
