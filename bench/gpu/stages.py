"""What is run on the machine, in which order, and for how long at most."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.harness.places import ROOT

from . import findings
from .processes import Command, Outcome


@dataclass(frozen=True)
class Setting:
    """What the stages' commands depend on.

    Attributes:
        out: the folder of the results.
        work: a folder for what nobody keeps.
        target: what Triton compiles for, ``cuda:90``.
        tests: ``gpu`` for the tests that need one, ``all`` for the whole suite.
        bench: further arguments of the benchmark.
        begun: when the run began; older results are another's.
    """

    out: Path
    work: Path
    target: str
    tests: str = "gpu"
    bench: str = ""
    begun: datetime | None = None


class LeftOut(Exception):
    """A stage cannot be run here, and that is no failure; the message says why."""


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: what ``--stages`` calls it.
        limit: seconds at most.
        commands: one after the other; raises LeftOut.
        read: key figures from what the commands printed and wrote. Raises ``findings.Bad`` where
            they say that something is wrong; any other exception means that they cannot be read.
        kept: whether stages before it leave it time; otherwise it has what is left.
    """

    name: str
    limit: float
    commands: Callable[[Setting], Sequence[Command]]
    read: Callable[[Setting, Sequence[Outcome]], dict[str, Any]]
    kept: bool = True


def python(*arguments: str) -> tuple[str, ...]:
    """Return a command line of this Python."""
    return (sys.executable, *arguments)


def fusedopt(*arguments: str) -> tuple[str, ...]:
    """Return a command line of the package."""
    return python("-m", "fusedopt", *arguments)


def _info(setting: Setting) -> list[Command]:
    commands = [Command("info", fusedopt("info", "--json"))]
    for tool in ("nvidia-smi", "rocm-smi"):
        if shutil.which(tool):
            commands.append(Command(tool, (tool,), required=False))
    if shutil.which("nvidia-smi"):
        # What the figures depend on: how fast it may run, and how fast it does at rest.
        fields = "name,driver_version,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        query = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
        commands.append(Command("clocks", query, required=False))
    # A launch that is broken shows here, before anything is waited for.
    launch = python("-m", "bench.gpu.small_step", "--device", "cuda", "first")
    return [*commands, Command("launch", launch)]


def _precompile(setting: Setting) -> list[Command]:
    return [Command("precompile", fusedopt("precompile", "--target", setting.target, "--json"))]


def _tests(setting: Setting) -> list[Command]:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    # A file that cannot be imported is an error, and keeps the others from nothing.
    arguments += ["--continue-on-collection-errors"]
    # Builds for CUDA warn of what others do not.
    arguments += ["-W", "default"]
    if importlib.util.find_spec("xdist"):
        # Each worker has a context on the GPU: more of them would wait for each other.
        workers = "4" if setting.tests == "gpu" else "8"
        arguments += ["-n", workers, "--dist", "loadgroup"]
    arguments += [f"--junitxml={setting.out / 'junit.xml'}", *_files(setting)]
    return [Command("pytest", python(*arguments), {"FUSEDOPT_TEST_DEVICE": "cuda"})]


# Whole files: few of their tests are marked as in need of a GPU, and all run on one.
TESTS = ("optimizers/test_trajectories", "step/test_clip", "memory/test_layouts")
TESTS += ("kernels/test_per_sample_linear", "kernels/test_per_sample_vectors")
TESTS += ("kernels/test_per_sample_embedding", "kernels/test_per_sample_convolution")
TESTS += ("step/test_capture",)


def _files(setting: Setting) -> list[str]:
    return ["tests"] if setting.tests == "all" else [f"tests/{name}.py" for name in TESTS]


def _verify(setting: Setting) -> list[Command]:
    return [Command("verify", fusedopt("verify", "--device", "cuda", "--json"))]


def _bench(setting: Setting) -> list[Command]:
    further = shlex.split(setting.bench)
    # What stages before have not measured, beside torch's fused step.
    cases = [f"--case={name}" for name in ("gpt2", "llama-3.2-1b", "odd", "conv", "huge")]
    some = [*cases, "--contender", "fusedopt", "--contender", "torch-fused"]
    core = fusedopt("bench", "step", "--core", *some, "--out", str(setting.out), *further)
    return [Command("bench", core)]


def _step(setting: Setting) -> list[Command]:
    streams = str(setting.work / "streams" / "streams.json")
    some = ["--case", "llama-3-8b-shard", "--case", "many", "--rule", "AdamW", "--types", "fp32"]
    some += ["--contender", "fusedopt", "--contender", "torch-fused"]
    folder = ["--out", str(setting.work / "step")]
    return [
        Command("step", fusedopt("bench", "step", "--core", *some, *folder)),
        # Whatever became of the step, what memory can do is a figure.
        Command("streams", python("-m", "bench.gpu.streams", "--out", streams), required=False),
    ]


SHAPES = ("32x512x4096x4096", "8x2048x4096x11008", "64x197x768x3072", "32x1x4096x4096")


def _per_sample(setting: Setting) -> list[Command]:
    arguments = ["linear", "--types", "bf16", "--contender", "none", "--seconds", "1"]
    arguments += ["--out", str(setting.work / "per-sample"), "--shapes", *SHAPES]
    # Its exit status is 1 for an aim that is missed, which is a figure here.
    command = python("-m", "bench.per_sample", *arguments)
    return [Command("per-sample", command, required=False)]


def _training(setting: Setting) -> list[Command]:
    arguments = ["training", "--batch", "16", "--repetitions", "10", "--seconds", "6"]
    command = python("-m", "bench.per_sample", *arguments, "--out", str(setting.work / "training"))
    return [Command("training", command, required=False)]


def _tune(setting: Setting) -> list[Command]:
    table = str(setting.work / "tune" / "tune.json")
    # Types are tuned one after the other, each written as it goes on. AdamW is Adam's rule.
    options = ["--rule", "Adam", "--types", "fp32", "--types", "bf16", "--out", table]
    return [Command("tune", python("-m", "bench.tune", *options))]


def _formats(setting: Setting) -> list[Command]:
    table = str(setting.work / "formats" / "formats.json")
    # Whatever it comes to, the formats that were measured are figures.
    return [Command("formats", python("-m", "bench.gpu.formats", "--out", table), required=False)]


def _first_step(setting: Setting) -> list[Command]:
    folder = str(setting.work / "first-step")
    return [Command("first step", fusedopt("bench", "first-step", "--core", "--out", folder))]


def _profile(setting: Setting) -> list[Command]:
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        raise LeftOut("ncu is neither on PATH nor in /usr/local/cuda/bin")
    # The second run of each; counters may be kept from users, which is no failure of ours.
    options = ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats")
    names = ("--kernel-name", "regex:update_tensors|linear_samples|gemm|nvjet|cutlass")
    command = (tool, *options, *names, *python("-m", "bench.gpu.profiled"))
    return [Command("ncu", command, required=False)]


def _memcheck(setting: Setting) -> list[Command]:
    return [c for c in _sanitizer(setting) if c.name != "racecheck"]


def _racecheck(setting: Setting) -> list[Command]:
    return [c for c in _sanitizer(setting) if c.name == "racecheck"]


def _sanitizer(setting: Setting) -> list[Command]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        raise LeftOut("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    # Every tensor is an allocation of its own, of exactly its size.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    step = python("-m", "bench.gpu.small_step", "--device", "cuda")

    def check(name: str, kind: str, *parts: str, least: float = 0.0) -> Command:
        # A process that the program starts is a tool's of Triton's, not a program on the GPU.
        options = ["--tool", kind, "--error-exitcode=99", "--target-processes=application-only"]
        # PyTorch may be imported for longer than the tool waits for a program by itself. And
        # libraries ask the driver for what it may lack, and go on without.
        options += ["--launch-timeout=0", "--report-api-errors=no"]
        return Command(name, (tool, *options, *step, *parts), exact, least=least)

    return [
        check("memcheck", "memcheck", "rules"),
        check("racecheck", "racecheck", "rules", least=20),
        check("memcheck of samples", "memcheck", "samples", least=20),
    ]


def _native(setting: Setting) -> list[Command]:
    missing = [tool for tool in ("cmake", "ctest") if not shutil.which(tool)]
    missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
    if missing:
        raise LeftOut(f"there is no {' and no '.join(missing)}")
    if not setting.target.startswith("cuda:"):
        raise LeftOut(f"the C library is for NVIDIA alone, not for {setting.target}")
    build = str(setting.work / "native")
    configure = [
        "cmake", "-S", str(ROOT), "-B", build, f"-DFUSEDOPT_TARGETS={setting.target}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    # codegen compiles every variant for every target, which no GPU is needed for.
    test = ["ctest", "--test-dir", build, "--output-on-failure", "--exclude-regex", "codegen"]
    return [
        Command("configure", configure),
        Command("build", ("cmake", "--build", build, "--parallel")),
        Command("ctest", test),
    ]


# The most valuable first. Their limits and the probe's seconds are within the deadline; the last
# ones, of which nothing is kept, have what the others leave.
STAGES = (
    Stage("info", 20, _info, findings.info),
    # By all processors; whatever comes behind it finds its kernels compiled.
    Stage("precompile", 50, _precompile, findings.precompile),
    Stage("verify", 40, _verify, findings.verify),
    Stage("step", 45, _step, findings.step),
    Stage("per-sample", 25, _per_sample, findings.per_sample),
    Stage("training", 35, _training, findings.training),
    Stage("tune", 40, _tune, findings.tune),
    Stage("bench", 45, _bench, findings.bench),
    Stage("tests", 70, _tests, findings.tests),
    Stage("sanitizer", 30, _memcheck, findings.sanitizer),
    Stage("formats", 90, _formats, findings.formats, kept=False),
    Stage("first-step", 40, _first_step, findings.first_step, kept=False),
    Stage("racecheck", 40, _racecheck, findings.sanitizer, kept=False),
    Stage("native", 40, _native, findings.native, kept=False),
    Stage("profile", 60, _profile, findings.profile, kept=False),
)
NAMES = tuple(stage.name for stage in STAGES)
