"""The benchmark of optimizer steps: nothing is timed that is not right, and bytes are counted."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SETTINGS = {"device": "cpu", "rounds": 2, "seconds": 0.01}


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.step.{name}")


def workload(
    rule: str = "AdamW", types: str = "fp32", shapes: Any = ((40_000,), (3, 5), ()), **case: Any
) -> Any:
    case = module("models").Case("test", "", shapes, **case)
    codec, row = module("codecs").CODECS[types], module("rules").RULES[rule]
    return module("workload").Workload(case, codec, row, CPU)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("gpt2", 148, 124_439_808),
        ("llama-3.2-1b", 146, 1_235_814_400),
        ("llama-3-8b-shard", 291, 8_030_261_248 // 8),
        ("conv", 161, 25_557_032),
    ],
)
def test_models_have_the_published_sizes(name: str, tensors: int, parameters: int) -> None:
    case = module("models").case(name)
    assert (len(case.shapes), case.parameters) == (tensors, parameters) and case.source


def test_the_other_cases_are_what_they_are_for() -> None:
    models = module("models")
    many = models.case("many").shapes
    assert len(many) == 10_000 and (min(many), max(many)) == ((1,), (63_931,))
    assert models.case("many") == models.case("many"), "a fixed seed"
    assert 2**31 < models.case("huge").parameters < 2**31 + 2**16
    assert models.case("huge").parameters % 2, "with a tail"
    assert models.case("odd").shift == models.tiny("odd").shift == 1
    for types in ("fp32", "bf16"):
        odd = workload(types=types, shapes=((7,), (300,), (5, 3)), shift=1)
        addresses = [t.data_ptr() % 16 for p in odd.params for t in (p, p.grad)]
        assert 0 not in addresses
    last = workload(shapes=((4, 3, 2, 2), (5,)), channels_last=True)
    for tensor in (last.params[0], last.params[0].grad, last.states["exp_avg"].views[0]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize(
    ("rule", "types", "contender", "clip", "scaler", "expected"),
    [
        ("AdamW", "fp32", "fusedopt", False, False, 28),
        ("AdamW", "fp32", "fusedopt", True, False, 32),
        ("AdamW", "fp32", "torch-fused", False, False, 28),
        # Clipping reads for the norm, and reads and writes for the factor.
        ("AdamW", "fp32", "torch-fused", True, False, 40),
        # The search for an overflow reads and writes; the kernel writes the unscaled gradient.
        ("AdamW", "fp32", "torch-fused", False, True, 40),
        ("AdamW", "fp32", "fusedopt", False, True, 36),
        # p  m  v  v  d  d  d  p of 2, 3, 2, 4, 2, 2, 2, 4 operands.
        ("AdamW", "fp32", "torch-foreach", False, False, 84),
        ("AdamW", "fp32", "torch-for-loop", False, False, 84),
        ("AdamW", "fp32", "torch-compiled", True, False, 40),
        ("AdamW", "fp32", "torchao", False, False, 28),
        ("AdamW", "bf16", "fusedopt", False, False, 14),
        ("AdamW", "bf16", "torch-foreach", False, False, 42),
        ("AdamW", "bf16+fp32-states", "fusedopt", False, False, 22),
        ("AdamW", "fp32+bf16-gradients", "fusedopt", True, False, 28),
        ("AMSGrad", "fp32", "torch-fused", False, False, 36),
        # The maximum is written over the old one, which is read once.
        ("AMSGrad", "fp32", "torch-for-loop", False, False, 96),
        ("SGD", "fp32", "fusedopt", False, False, 12),
        ("SGD", "fp32", "torch-foreach", False, False, 12),
        ("SGD-momentum", "fp32", "fusedopt", False, False, 20),
        ("SGD-momentum", "fp32", "torch-fused", False, False, 20),
        ("SGD-momentum", "fp32", "torch-foreach", False, False, 32),
        ("RMSprop", "fp32", "fusedopt", False, False, 20),
        ("RMSprop-momentum", "fp32", "fusedopt", False, False, 28),
        ("BatchDecoupledAdam", "fp32", "fusedopt", False, False, 32),
        ("BatchDecoupledAdam", "fp32", "fusedopt", True, False, 36),
    ],
)
def test_bytes_a_parameter(
    rule: str, types: str, contender: str, clip: bool, scaler: bool, expected: float
) -> None:
    count = module("contenders").CONTENDERS[contender].bytes_per_parameter
    assert count(workload(rule, types), clip, scaler) == expected


def test_our_bytes_are_the_budgets_of_the_compiled_kernels() -> None:
    from fusedopt.kernels.aot.update import update_tensors

    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    names |= {torch.float16: "fp16", torch.float64: "fp64"}
    for rule, row in module("rules").RULES.items():
        for types, codec in module("codecs").CODECS.items():
            own = workload(rule, types)
            more = ["fp32"] * row.takes_squares + [names[codec.gradient]] * row.takes_pairs
            states = [names[codec.state]] * len(own.states)
            dtypes = (names[codec.param], names[codec.gradient], *more, *states)
            options = (False,) * len(row.rule.option_names)
            budget = update_tensors(row.rule, options, dtypes).budget.bytes_per_element
            assert module("bytes_moved").ours(own, False, False) == budget, (rule, types)


def nothing(x: Any, _: Any, step: Callable[[], Any]) -> None:
    """Leave everything as it is."""


def all_but_the_tail(x: Any, optimizer: Any, step: Callable[[], Any]) -> None:
    # A few elements: in bfloat16 a single one may have a small step.
    tail = x.params[0].detach()[-8:].clone()
    step()
    x.params[0].data[-8:] = tail


def all_but_a_chunk(x: Any, optimizer: Any, step: Callable[[], Any]) -> None:
    """Skip elements that are not compared one by one."""
    seen = set(x._checked.tolist())
    start = next(i for i in range(0, 40_000, 256) if not seen & set(range(i, i + 256)))
    chunk = x.params[0].detach()[start : start + 256].clone()
    step()
    x.params[0].data[start : start + 256] = chunk


def one_not_a_number(x: Any, optimizer: Any, step: Callable[[], Any]) -> None:
    step()
    x.params[0].data[-1] = math.nan


def wrong(name: str, value: Any) -> Callable[..., None]:
    """Return a step with another coefficient."""

    def run(x: Any, optimizer: Any, step: Callable[[], Any]) -> None:
        for group in optimizer.param_groups:
            group[name] = value
        step()

    return run


def without_gradients(x: Any, optimizer: Any, step: Callable[[], Any]) -> None:
    step()
    optimizer.zero_grad()


def replace(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., None], of: str | None = None
) -> None:
    """Break a contender's step."""
    contenders = module("contenders").CONTENDERS
    make = contenders[of or name].make

    def make_broken(x: Any, clip: bool, scale: float | None) -> Any:
        timed = make(x, clip, scale)
        step = timed.step
        return dataclasses.replace(timed, step=lambda: broken(x, timed.optimizer, step))

    changed = dataclasses.replace(contenders[name], make=make_broken)
    monkeypatch.setitem(contenders, name, changed)


def run_group(rule: str, types: str, *keys: Any, shapes: Any = ((40_000,), (3, 5))) -> list[Any]:
    measure = module("measure")
    case = module("models").Case("test", "", shapes)
    group = measure.Group(case, rule, types, tuple(measure.Key(*key) for key in keys))
    return measure.measure(group, SETTINGS, 10.0)


@pytest.mark.parametrize(
    ("broken", "types", "reason"),
    [
        (nothing, "fp32", "ulps"),
        (nothing, "bf16", "ulps"),
        (nothing, "fp16", "ulps"),
        (all_but_the_tail, "fp32", "ulps"),
        (all_but_the_tail, "bf16", "ulps"),
        (all_but_a_chunk, "fp32", "1 runs of elements have not moved"),
        (all_but_the_tail, "fp16", "ulps"),
        (all_but_a_chunk, "bf16", "1 runs of elements have not moved"),
        (one_not_a_number, "fp32", "inf ulps"),
        (wrong("betas", (0.9, 0.951)), "fp32", "ulps"),
        (wrong("betas", (0.901, 0.95)), "fp32", "ulps"),
        (wrong("betas", (0.9, 0.95 + 1e-9)), "fp64", "ulps"),
        (wrong("weight_decay", 0.0), "bf16", "ulps"),
        (wrong("weight_decay", 0.0), "fp16", "ulps"),
        (wrong("lr", 0.1001), "fp32", "ulps"),
        (without_gradients, "fp32", "takes gradients away"),
    ],
)
@pytest.mark.parametrize("contender", ["fusedopt", "torch-for-loop"])
def test_a_wrong_step_has_no_time(
    contender: str,
    broken: Callable[..., None],
    types: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(monkeypatch, contender, broken)
    other = "torch-foreach"
    bad, good = run_group("AdamW", types, (contender,), (other,))
    assert bad["status"] == "failed" and reason in bad["reason"]
    assert bad["device_ms"] is bad["gbps"] is bad["ratio_to_ours"] is None
    assert good["status"] == "measured" and good["device_ms"]["median"] > 0


@pytest.mark.parametrize("types", ["fp32", "bf16", "fp32+bf16-gradients"])
@pytest.mark.parametrize("contender", ["fusedopt", "torch-for-loop"])
def test_a_step_that_does_not_clip_is_seen(
    contender: str, types: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's update does not change with the size of the gradient, but with its changes."""
    contenders = module("contenders").CONTENDERS
    rule = "SGD-momentum" if types == "fp32+bf16-gradients" else "AdamW"
    for name in (rule, "SGD"):
        make = contenders[contender].make
        broken = dataclasses.replace(
            contenders[contender], make=lambda x, _, scale, make=make: make(x, False, scale)
        )
        with monkeypatch.context() as patch:
            patch.setitem(contenders, contender, broken)
            assert run_group(name, types, (contender, True))[0]["status"] == "failed", name
        assert run_group(name, types, (contender, True))[0]["status"] == "measured", name


def test_a_loss_scale_that_stays_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = module("contenders").CONTENDERS
    make = contenders["torch-foreach"].make
    broken = dataclasses.replace(
        contenders["torch-foreach"], make=lambda x, clip, _: make(x, clip, None)
    )
    monkeypatch.setitem(contenders, "torch-foreach", broken)
    bad, good = run_group("SGD", "fp32", ("torch-foreach", False, True), ("fusedopt", False, True))
    assert (bad["status"], good["status"]) == ("failed", "measured")


def test_squares_that_are_not_read_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import fusedopt

    rules = module("rules")
    row = rules.RULES["BatchDecoupledAdam"]
    assert run_group("BatchDecoupledAdam", "fp32", ("fusedopt", True))[0]["status"] == "measured"
    make = module("contenders").CONTENDERS["fusedopt"].make

    class Deaf(fusedopt.BatchDecoupledAdam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # A batch of the virtual size is plain Adam.
            super().__init__(*args, **kwargs, virtual_batch_size=module("workload").SAMPLES)

    deaf = dataclasses.replace(row, ours=Deaf)

    def make_deaf(x: Any, clip: bool, scale: float | None) -> Any:
        x.row = deaf
        return make(x, clip, scale)

    contenders = module("contenders").CONTENDERS
    changed = dataclasses.replace(contenders["fusedopt"], make=make_deaf)
    monkeypatch.setitem(contenders, "fusedopt", changed)
    assert run_group("BatchDecoupledAdam", "fp32", ("fusedopt",))[0]["status"] == "failed"


def test_every_rule_in_all_types() -> None:
    for rule, row in module("rules").RULES.items():
        keys = [("fusedopt", False, False), ("fusedopt", not row.takes_pairs, True)]
        for types in module("codecs").CODECS:
            rows = run_group(rule, types, *keys, shapes=((600,), (3, 5)))
            assert [row["status"] for row in rows] == ["measured"] * 2, (rule, types, rows)
            for row in rows:
                assert row["ratio_to_ours"] == 1.0 and row["launches"] is None
                assert row["error"]["ulps"] <= row["error"]["bound_ulps"]
                bandwidth = row["bytes_per_parameter"] * 615 / (1e6 * row["device_ms"]["median"])
                assert row["gbps"] == pytest.approx(bandwidth)
                assert row["percent_of_copy"] == pytest.approx(10 * bandwidth)


@pytest.mark.parametrize("rule", ["RMSprop-centered", "AdamW"])
def test_half_precision_leaves_torch_something_to_divide_by(rule: str) -> None:
    """Of a gradient near zero, square and eps are both zero in float16: torch makes it a nan."""
    names = ("fusedopt", "torch-for-loop", "torch-foreach")
    keys = [(name, clip, False) for name in names for clip in (False, True)]
    rows = run_group(rule, "fp16", *keys)
    assert [row["status"] for row in rows] == ["measured"] * len(keys), rows
    own = workload(rule, "fp16")
    # Of some millions drawn in half precision, one is zero.
    own.gradients.drawn(1)[:2] = torch.tensor([0.0, -0.0])
    own.new_gradients(1, 8.0)
    magnitudes = own.checked(own.gradients).abs()
    assert 0.79 < magnitudes.min() < 0.82 and magnitudes.max() > 8


@pytest.mark.parametrize("rule", ["SVAG-SGD", "SVAG-RMSprop", "SVAG-AdamW"])
def test_svag_without_its_first_gradient_is_seen(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, clipped, scaled = run_group(
        rule, "fp32", ("fusedopt",), ("fusedopt", True, False), ("fusedopt", False, True)
    )
    assert plain["status"] == scaled["status"] == "measured"
    assert clipped["reason"] == "SVAG does not cover clipping"
    assert plain["bytes_per_parameter"] == module("bytes_moved").ideal(workload(rule))
    # The second one twice; then another ell.
    found = module("workload").Workload
    with monkeypatch.context() as patch:
        patch.setattr(found, "attach_held", found.attach_gradients)
        assert run_group(rule, "fp32", ("fusedopt",))[0]["status"] == "failed"
    paired = module("contenders")._paired

    def other(timed: Any, optimizer: Any, ell: float, x: Any) -> Any:
        return paired(timed, optimizer, 1.01 * ell, x)

    monkeypatch.setattr(module("contenders"), "_paired", other)
    assert run_group(rule, "fp32", ("fusedopt",))[0]["status"] == "failed"


def test_what_torch_rounds_in_a_gradient_is_no_failure() -> None:
    """Nesterov's foreach adds the momentum to a bfloat16 gradient in place."""
    names = ("torch-for-loop", "torch-foreach")
    keys = [(name, clip, False) for name in names for clip in (False, True)]
    rows = run_group("SGD-nesterov", "fp32+bf16-gradients", *keys, shapes=((700_000,),))
    assert [row["status"] for row in rows] == ["measured"] * len(keys), rows
    codec = module("codecs").CODECS["fp32+bf16-gradients"]
    assert codec.bound_of(True, True, CPU) == codec.bound_of(True, False, CPU) == 256


def test_torchs_scaler_refuses_float16() -> None:
    scaled = [("fusedopt", True, True), ("torch-fused", False, True), ("torch-fused", True, True)]
    rows = run_group("AdamW", "fp16", *scaled, ("torch-foreach", False, True))
    assert [row["status"] for row in rows] == ["measured", "measured", "skipped", "skipped"]
    assert "GradScaler does not unscale float16" in rows[2]["reason"]


def test_launches_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Memcpy HtoD (Pinned -> Device)", "update_tensors", "Memset (Device)", "partial_norms"]
    kinds = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")
    plain = {"is_user_annotation": False}
    events = [SimpleNamespace(name=name, device_type=kinds[0], **plain) for name in names]
    events.append(SimpleNamespace(name="cudaLaunchKernel", device_type=kinds[1], **plain))
    for name in ("Optimizer.step#AdamW.step", "## Call CompiledFxGraph"):
        event = SimpleNamespace(name=name, device_type=kinds[0], is_user_annotation=True)
        events.append(event)
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = module("launches").launches(lambda: None, torch.device("cuda"))
    assert found == {"launches": 2, "copies": 2}
    events.clear()
    nothing = {"launches": None, "copies": None}
    assert module("launches").launches(lambda: None, torch.device("cuda")) == nothing


def test_steps_too_small_to_tell_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = module("rules")
    row = rules.RULES["AdamW"]
    still = dataclasses.replace(row, arguments={**row.arguments, "lr": 1e-4})
    monkeypatch.setitem(rules.RULES, "AdamW", still)
    monkeypatch.setitem(module("measure").RULES, "AdamW", still)
    (found,) = run_group("AdamW", "bf16", ("fusedopt",))
    assert found["status"] == "failed" and "nothing could be told" in found["reason"]
