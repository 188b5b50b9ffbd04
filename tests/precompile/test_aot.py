"""What is compiled ahead of time is what a step launches: each constant, type and alignment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fusedopt.kernels import lang

# Every rule takes steps in every type under a fake driver, which notes by what Triton would compile
# each launch. Printed are the variants (of codegen, the C library, tuning) that are none of these.
SCRIPT = """
import json, sys
import torch
from triton.runtime.jit import JITFunction
from fusedopt import Telemetry
from fusedopt.examples.signum import SIGNUM
from fusedopt.kernels import aot
from fusedopt.kernels.aot import accumulate, materialised, norms, update
from fusedopt.kernels.aot.compile import specialization
from fusedopt.kernels.rules import REGISTRY, register
from fusedopt.precompile import cases
from fusedopt.precompile.fake_driver import fake_driver

register(SIGNUM)
target = aot.parse_target("cuda:90")

def text(value):
    return getattr(value, "__name__", None) or str(value)

def key(kernel, warps, registers, signature, constexprs, attrs):
    names = kernel.arg_names
    constants = sorted((names[place], text(value)) for (place,), value in constexprs.items())
    divisible = sorted(names[place] for (place,), facts in attrs.items() if facts)
    types = sorted(signature.items())
    return json.dumps([kernel.__name__, warps, registers, types, constants, divisible])

launched = set()

def note(kernel, _, signature, device, constexprs, options, attrs, warmup):
    launched.add(key(kernel, options.num_warps, options.maxnreg, signature, constexprs, attrs))

JITFunction._do_compile = note
# Each format that is compiled ahead of time, as optimizers are asked for it.
own = {"exp_avg": torch.bfloat16, "exp_avg_sq": "int8"}
parameters = [
    {}, {"rounding": "stochastic"}, {"rounding": "kahan"}, {"master": "remainder"},
    {"master": "remainder8"}, {"master": "remainder8", "rounding": "stochastic"},
    {"master": "float32"},
]
kinds = torch.bfloat16, torch.float16, torch.float32, "int8", "fp8", own
states = [{}, *({"state_dtype": s} for s in kinds)]
# Those that other rules than Adam's are compiled for; one that lacks here is found missing.
some = [
    {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    {"rounding": "kahan", "state_dtype": torch.bfloat16},
    {"master": "remainder", "state_dtype": torch.bfloat16},
    {"master": "float32", "state_dtype": torch.float32},
    {"state_dtype": "int8"},
    {"rounding": "stochastic", "state_dtype": "fp8"},
    {"master": "remainder8", "state_dtype": "int8"},
    {"master": "remainder", "state_dtype": torch.float32},
    {"rounding": "stochastic", "state_dtype": "int8"},
]
averages = [
    {"average_decay": 0.5, "average_start": 0, "average_dtype": dtype, **more}
    for dtype in (torch.float32, torch.bfloat16)
    for more in (
        {}, {"rounding": "stochastic"}, {"master": "remainder", "state_dtype": torch.float32},
        {"master": "remainder8", "state_dtype": "int8"},
    )
]
# With telemetry.
f32 = torch.float32
measured = [
    {"state_dtype": f32}, {"rounding": "stochastic"}, {"master": "remainder", "state_dtype": f32},
    {"state_dtype": "int8"}, {"master": "remainder8", "state_dtype": "int8"},
    {"master": "remainder8", "state_dtype": "fp8"}, {"master": "float32", "state_dtype": f32},
    {"average_decay": 0.5, "average_start": 0, "average_dtype": f32, "master": "remainder8",
     "state_dtype": "int8"},
]
adam, *others = json.loads(sys.argv[1])
with fake_driver(target):
    for average in averages:
        single = average["average_dtype"] is torch.float32
        for case in cases.all_cases(average):
            if case.name.startswith((adam, *others) if single else adam):
                case.run()
    for case in cases.all_cases():
        case.run()
    for kept in ({}, *measured):
        for case in cases.all_cases({**kept, "telemetry": Telemetry(every=2)}):
            chosen = "Adam step 0 " if kept else (adam, *others)
            if case.name.startswith(chosen) and " samples " not in case.name:
                case.run()
    for parameter in parameters:
        for state in states:
            given = {**parameter, **state}
            for case in cases.all_cases(given) if given else ():
                if case.name.startswith((adam, *others) if given in some else adam):
                    case.run()

listed = [*update.variants("cuda:90"), *norms.variants(), *accumulate.variants()]
listed += materialised.variants()
# No case has samples in two tensors, nor a shard that is cut along an inner dimension.
listed = [variant for variant in listed if variant.constants.get("PARTS", 1) == 1]
listed = [v for v in listed if not v.name.endswith("stochastic bf16 states rowwise")]
missing = [
    variant.name
    for variant in listed
    if key(
        variant.kernel, variant.threads // target.warp_size, variant.registers,
        **specialization(variant),
    ) not in launched
]
rules = {v.constants["RULE"].__name__ for v in listed if "RULE" in v.constants}
of_all = {rule.update.__name__ for rule in REGISTRY.values()}
print(json.dumps([len(listed), missing, sorted(of_all - rules)]))
"""


# Whose steps are taken with every format, and with some.
RULES = ("Adam step ", "Adam (amsgrad) ", "SGD (momentum) ", "RMSprop ", "RMSprop (momentum) ",
         "BatchDecoupledAdam ")  # fmt: skip


@pytest.mark.skipif(lang.triton is None or sys.platform != "linux", reason="needs the compiler")
def test_variants_state_what_launches_state():
    # Catches a constant, a type, an alignment or a number of threads that one side changes alone.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(RULES)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    listed, missing, without = json.loads(result.stdout)
    assert listed > 400 and without == []
    assert missing == []
