"""Training in processes of their own, with compiled kernels and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedopt.kernels import lang

TRAINING = """
import json, sys
import torch, triton, fusedopt
from fusedopt import backends
from fusedopt.compilations import compilations
from fusedopt.kernels import launch as launching
from triton.backends.compiler import GPUTarget

class Utilities:
    def get_device_properties(self, device): return {"max_shared_mem": 1 << 20}
    def load_binary(self, *a): return None, None, 0, 0, 1024

class Launcher:
    def __init__(self, source, metadata):
        if real and triton.runtime.driver.active.target.backend == "cuda":
            real.CudaLauncher(source, metadata)  # builds what it needs
    def __call__(self, *arguments): pass

class Driver:
    launcher_cls = Launcher
    def __init__(self, target):
        self.target, self.utils = target, Utilities()
        if real:
            loaded = real.CudaUtils()
            for name in ("launch", "build_signature_metadata"):
                setattr(self.utils, name, getattr(loaded, name, None))
    def get_current_target(self): return self.target
    def get_current_device(self): return str(self.target)
    def get_current_stream(self, device): return 0

def fake_driver(name):
    kind, _, architecture = name.partition(":")
    if kind == "cuda":
        target = GPUTarget("cuda", int(architecture), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    triton.runtime.driver.set_active(Driver(target))
    launching.warp_size = lambda device: target.warp_size
    launching.compiler = lambda device: target.backend

backends._triton_runs_on = lambda device: (True, "a fake driver")
real = None
if sys.argv[1] == "with modules":
    from triton.backends.nvidia import driver as real

def parameters(dtype):
    # Whole chunks and ragged ones, rows that end within a group, a scalar, none at all, and one
    # that is not aligned.
    sizes = [(4096,), (2500,), (3, 150), (), (0,)]
    own = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in sizes]
    return own + [torch.nn.Parameter(torch.zeros(65, dtype=dtype)[1:])]

def train(optimizer="AdamW", dtype="float32", clip=None, samples=False, scaled=False, **options):
    own = parameters(getattr(torch, dtype))
    if clip is not None:
        options["clip"] = fusedopt.GlobalNorm(1.0, norm_type=float(clip))
    if samples:
        options["statistics"] = fusedopt.GradSampleSquares()
    if "telemetry" in options:
        options["telemetry"] = fusedopt.Telemetry(options["telemetry"])
    groups = [{"params": own[:3]}, {"params": own[3:], "lr": 0.5}]
    o = getattr(fusedopt, optimizer)(groups, backend="triton", **options)
    for _ in range(2):
        for p in own:
            p.grad = torch.ones_like(p)
            if samples:
                p.grad_sample = torch.ones(4, *p.shape, dtype=p.dtype)
        if scaled:
            o.grad_scale, o.found_inf = torch.full((1,), 8.0), torch.zeros(1)
        o.step()
    if o.telemetry is not None:
        o.telemetry.norms
"""

FP32: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "plain SGD, norm 2": {"optimizer": "SGD", "lr": 0.1, "clip": "2"},
    "RMSprop": {"optimizer": "RMSprop", "centered": True, "momentum": 0.9},
    # Options that no example group of the rule has together.
    "RMSprop, variance": {
        "optimizer": "RMSprop", "centered": True, "momentum": 0.9, "denominator": "variance",
    },
    "Adam": {"optimizer": "Adam", "amsgrad": True, "scaled": True},
    "AdamW, capturable": {"capturable": True, "clip": "inf"},
    "samples": {"optimizer": "BatchDecoupledAdam", "samples": True},
    "samples, norm 2": {"optimizer": "BatchDecoupledAdam", "samples": True, "clip": "2"},
}  # fmt: skip

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or lang.triton is None, reason="needs Triton's compiler"
)

needs_gcc = pytest.mark.skipif(
    not os.environ.get("CC") and not any(Path(d, "gcc").exists() for d in os.get_exec_path()),
    reason="needs gcc",
)


def run_python(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "160", **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def precompile_json(*arguments: str, **variables: str) -> dict[str, Any]:
    result = run_python("-m", "fusedopt", "precompile", "--json", *arguments, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)
