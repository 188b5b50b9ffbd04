"""What steps launch against what ``precompile`` compiles, without compiling."""

from __future__ import annotations

import json
from typing import Any

import pytest
from precompiling import FP32, TRAINING, needs_compiler, run_python

from fusedopt import Telemetry

pytestmark = needs_compiler

# Every launch that nothing in the list of `find` answers to; nothing is compiled.
MISSING = """
from functools import cache
from fusedopt.precompile import work

work.prepare(work.Settings("unused", statistics=True))

@cache
def found_for(target):
    tasks, failed = work.find(target, (), ())
    assert not failed, failed
    return {task.key for task in tasks}

def compare(target, run):
    found, launched = found_for(target), {}
    fake_driver(target)
    with work._compiling_only(lambda key, kernel: bool(launched.setdefault(key, kernel)) and False):
        run()
    return len(launched), [kernel for key, kernel in launched.items() if key not in found]

def train_all():
    for options in json.loads(sys.argv[2]).values():
        train(**options)

result = {target: compare(target, train_all) for target in ("cuda:90", "hip:gfx942")}
observe_on(90)
result["model"] = compare("cuda:90", observe)
print(json.dumps(result))
"""

OBSERVE = """
from fusedopt.statistics.ops import tiles, triton_convolution, triton_linear

def observe_on(capability):
    for module in (tiles, triton_convolution, triton_linear):
        module.capability = lambda device: capability
        module.processors = lambda device: 132
        module.fastest_precision = lambda device: "tf32"

def observe():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Embedding(4096, 1024)
            self.norm = torch.nn.LayerNorm(1024)
            self.up = torch.nn.Linear(1024, 2048)
        def forward(self, ids):
            # Squared: the gradient of a sum is expanded, which few layers see.
            return self.up(self.norm(self.token(ids))).square().sum((1, 2))
    model = Block()
    statistics = fusedopt.PerSampleSquares(model)
    statistics.backend = "triton"
    o = fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics, backend="triton",
                                    virtual_batch_size=2)
    for _ in range(2):
        # Twice without a step between: the second pass adds to the squares of the first.
        for _ in range(2):
            model(torch.zeros(4, 64, dtype=torch.int64)).mean().backward()
        o.step()
        o.zero_grad()
"""


def _all_kinds() -> dict[str, Any]:
    """Every class in every type, clipped and not: more than there is time to compile."""
    cases: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for name, options in {**FP32, "Decoupled RMSprop": DECOUPLED_RMSPROP}.items():
            for clip in (None, "2", "inf"):
                cases[f"{name} {dtype} {clip}"] = {**options, "dtype": dtype, "clip": clip}
    return cases


DECOUPLED_RMSPROP = {
    "optimizer": "BatchDecoupledRMSprop", "samples": True, "centered": True, "momentum": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def compared() -> dict[str, tuple[int, list[str]]]:
    """By target: how many variants were launched, and which of them no case has launched."""
    command = ["-c", TRAINING + OBSERVE + MISSING, "without modules", json.dumps(_all_kinds())]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    return {name: (n, missing) for name, (n, missing) in json.loads(result.stdout).items()}


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_nothing_is_launched_that_is_not_compiled(
    target: str, compared: dict[str, tuple[int, list[str]]]
) -> None:
    launched, missing = compared[target]
    assert launched > 60 and missing == []


def test_a_model_of_usual_layers_launches_nothing_else(
    compared: dict[str, tuple[int, list[str]]],
) -> None:
    """With ``--statistics``: linear layers, normalisations and embeddings, accumulated."""
    launched, missing = compared["model"]
    assert launched >= 8 and missing == []


def test_every_variant_of_codegen_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """``codegen`` lists variants by hand: whatever it has, a step must have launched."""
    from fusedopt.backends import triton as launching
    from fusedopt.backends import triton_accumulate, triton_coefficients, triton_samples
    from fusedopt.kernels.aot import accumulate, coefficients, materialised, norms, update
    from fusedopt.precompile import cases

    seen = set()

    def note(
        kernel: Any, programs: int, threads: int, device: Any, *a: Any,
        registers: Any = None, exact: Any = False, **meta: Any,
    ) -> None:  # fmt: skip
        seen.add((kernel.__name__, threads, _constants(meta)))

    monkeypatch.setattr(launching, "launch", note)
    monkeypatch.setattr(triton_samples, "launch", note)
    monkeypatch.setattr(triton_accumulate, "launch", note)
    monkeypatch.setattr(triton_coefficients, "launch", note)
    telemetry = cases.all_cases({"telemetry": Telemetry()})
    telemetry = [c for c in telemetry if c.name.startswith("SGD step 0 ")]
    for case in (*cases.all_cases(), *telemetry):
        case.run()
    listed = [*update.plain_variants(), *norms.variants(), *accumulate.variants()]
    listed += coefficients.variants()
    # Those of other formats are compared in test_aot.py.
    plain = {"PARAMETER": "cast", "DRAWS": False}
    for v in materialised.variants():
        if all(v.constants.get(name, value) == value for name, value in plain.items()):
            listed.append(v)
    for variant in listed:
        if variant.constants.get("PARTS", 1) == 1:
            wanted = variant.kernel.__name__, variant.threads, _constants(variant.constants)
            assert wanted in seen, variant.name


def _constants(values: Any) -> frozenset[tuple[str, str]]:
    known = {name: value for name, value in values.items() if name != "enable_fp_fusion"}
    return frozenset(
        (name, getattr(value, "__name__", None) or str(value)) for name, value in known.items()
    )


FORMATS: tuple[dict[str, Any], ...] = (
    {"state_dtype": "int8", "master": "remainder8"},
    {"state_dtype": {"exp_avg_sq": "fp8"}, "rounding": "stochastic"},
    {"master": "float32"},
    {"telemetry": 2, "state_dtype": "int8", "master": "remainder8"},
)
FORMAT = """
from fusedopt.precompile import work

precision, other = json.loads(sys.argv[2])
asked = dict(precision)
if "telemetry" in asked:
    asked["telemetry"] = fusedopt.Telemetry(asked["telemetry"])
work.prepare(work.Settings("unused", precision=asked))
found = {}
for target in ("cuda:90", "hip:gfx942"):
    tasks, failed = work.find(target, ("Adam", "SGD"), ("bf16",))
    assert not failed, failed
    known = {task.key for task in tasks}
    for name, options in (("own", precision), ("other", other)):
        launched = {}
        note = lambda key, kernel: bool(launched.setdefault(key, kernel)) and False
        fake_driver(target)
        with work._compiling_only(note):
            train(dtype="bfloat16", clip="2", **options)
        missing = [kernel for key, kernel in launched.items() if key not in known]
        found[f"{target} {name}"] = len(launched), missing
print(json.dumps(found))
"""


@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_steps_in_the_format_that_is_asked_for_are_found(number: int) -> None:
    """Catches a key that lacks the limit of registers, and tensors that are walked row by row."""
    own, other = FORMATS[number], FORMATS[number - 1]
    result = run_python("-c", TRAINING + FORMAT, "without", json.dumps([own, other]))
    assert result.returncode == 0, result.stderr
    for name, (launched, missing) in json.loads(result.stdout).items():
        assert launched >= 4, name
        # What belongs to another format is not among them: the list is not simply everything.
        assert missing == [] if name.endswith("own") else "update_tensors" in missing, name
