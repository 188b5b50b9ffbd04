"""A warm cache: what ``precompile`` has compiled, a training step does not compile again.

The steps run in processes of their own, under a driver that is written down here a second time: one
that the command shares with its test could agree with itself and with no GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedopt import __main__ as cli
from fusedopt.compilations import compilations
from fusedopt.kernels import lang

# What is compiled for real: as much as there is time for. What is launched by every class, in
# every type and for every target is compared below without compiling.
FILLS = (
    ("--target", "cuda:90", "--rule", "SGD", "--rule", "AdamW",
     "--rule", "BatchDecoupledAdam", "--types", "fp32"),
    ("--target", "cuda:90", "--target", "hip:gfx942", "--rule", "Adam", "--types", "bf16"),
)  # fmt: skip

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

backends._triton_runs_on = lambda device: (True, "a fake driver")
real = None
if sys.argv[1] == "with modules":
    from triton.backends.nvidia import driver as real

def parameters(dtype):
    # Whole chunks and ragged ones, a scalar, none at all, and one that is not aligned.
    sizes = [(4096,), (2500,), (3, 5), (), (0,)]
    own = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in sizes]
    return own + [torch.nn.Parameter(torch.zeros(65, dtype=dtype)[1:])]

def train(optimizer="AdamW", dtype="float32", clip=None, samples=False, scaled=False, **options):
    own = parameters(getattr(torch, dtype))
    if clip is not None:
        options["clip"] = fusedopt.GlobalNorm(1.0, norm_type=float(clip))
    if samples:
        options["statistics"] = fusedopt.GradSampleSquares()
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
"""

COUNT = """
counts = {}
for target, cases in json.loads(sys.argv[2]).items():
    fake_driver(target)
    for name, options in cases.items():
        with compilations() as seen:
            train(**options)
        counts[f"{target} {name}"] = [seen.compiled, seen.cached]
print(json.dumps(counts))
"""

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
BF16: dict[str, dict[str, Any]] = {
    "AdamW": {"dtype": "bfloat16"},
    "AdamW, norm 2": {"dtype": "bfloat16", "clip": "2"},
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or lang.triton is None, reason="needs Triton's compiler"
)
needs_gcc = pytest.mark.skipif(
    not os.environ.get("CC") and not any(Path(d, "gcc").exists() for d in os.get_exec_path()),
    reason="needs gcc",
)


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "160", **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def _precompile(*arguments: str, **variables: str) -> dict[str, Any]:
    result = _run("-m", "fusedopt", "precompile", "--json", *arguments, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


class Warm:
    """A cache that was filled, and processes that train with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = directory / "cache"
        self.filled = [_precompile("--cache", str(self.cache), *fill) for fill in FILLS]
        self.libraries = _driver_library(directory, self.cache)
        self.calls = directory / "compiler calls"
        self.compiler = directory / "cc"
        self.compiler.write_text(f'#!/bin/sh\necho >> "{self.calls}"\nexec gcc "$@"\n')
        self.compiler.chmod(self.compiler.stat().st_mode | stat.S_IXUSR)

    def train(
        self, cases: dict[str, Any], cache: Path | None = None, **variables: str
    ) -> tuple[dict[str, list[int]], int]:
        """Run cases by target.

        Returns:
            What each compiled and what it found, and how often the C compiler ran.
        """
        self.calls.unlink(missing_ok=True)
        variables = {**variables, **self.libraries, "CC": str(self.compiler)}
        variables["TRITON_CACHE_DIR"] = str(cache or self.cache)
        result = _run("-c", TRAINING + COUNT, "with modules", json.dumps(cases), **variables)
        assert result.returncode == 0, result.stderr
        calls = self.calls.read_text().count("\n") if self.calls.exists() else 0
        return json.loads(result.stdout), calls


def _driver_library(directory: Path, cache: Path) -> dict[str, str]:
    """Make a library of NVIDIA's driver in which every call fails, where there is none."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return {}
    except OSError:
        pass
    symbols = set()
    for module in cache.glob("*/*.so"):
        command = ["nm", "-D", "--undefined-only", str(module)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        symbols |= {line.split()[-1] for line in listed.splitlines() if " cu" in line}
    source = directory / "driver.c"
    source.write_text("".join(f"int {s}(void) {{ return 100; }}\n" for s in sorted(symbols)))
    library = directory / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-fno-builtin", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", str(source), *options, "-o", str(library)], check=True)
    return {"LD_LIBRARY_PATH": str(directory), "TRITON_LIBCUDA_PATH": str(directory)}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    return Warm(tmp_path_factory.mktemp("precompile"))


slow_fixture = pytest.mark.xdist_group("precompile")


@needs_gcc
@slow_fixture
def test_steps_compile_nothing_on_a_warm_cache(warm: Warm) -> None:
    """Neither kernels nor, for NVIDIA, the C modules of Triton, which are loaded here."""
    filled = {name: case for name, case in FP32.items() if case.get("optimizer") != "RMSprop"}
    counts, calls = warm.train({"cuda:90": {**filled, **BF16}, "hip:gfx942": BF16})
    assert {name: compiled for name, (compiled, _) in counts.items() if compiled} == {}
    for target in ("cuda:90", "hip:gfx942"):
        assert counts[f"{target} AdamW, norm 2"][1] >= 2
    assert calls == 0


@needs_gcc
@slow_fixture
def test_the_counts_see_an_empty_cache(warm: Warm, tmp_path: Path) -> None:
    """Otherwise the test above would pass for nothing."""
    cases = {"cuda:90": {"SGD": {"optimizer": "SGD", "lr": 0.1}}}
    counts, calls = warm.train(cases, cache=tmp_path / "empty")
    # Aligned tensors, and one that is not.
    assert counts == {"cuda:90 SGD": [2, 0]}
    assert calls >= 1


@needs_gcc
@slow_fixture
@pytest.mark.parametrize(
    ("targets", "variables"),
    [(("cuda:80", "hip:gfx90a"), {}), (("cuda:90",), {"DISABLE_LLVM_OPT": "1"})],
    ids=["target", "variable"],
)
def test_what_changes_the_key_misses(
    warm: Warm, targets: tuple[str, ...], variables: dict[str, str]
) -> None:
    """An entry that served another target, or other options, would be wrong code."""
    one = {"one": BF16["AdamW"]}
    counts, _ = warm.train(dict.fromkeys(targets, one), **variables)
    assert counts == {f"{target} one": [2, 0] for target in targets}


@needs_gcc
@slow_fixture
def test_the_record_says_what_the_cache_is_good_for(warm: Warm) -> None:
    """The second run adds to what the first wrote, for its target and for another."""
    record = json.loads((warm.cache / "fusedopt.json").read_text())
    assert record["cache"] == str(warm.cache)
    assert set(record["targets"]) == {"cuda:90", "hip:gfx942"}
    versions = record["targets"]["cuda:90"]["versions"]
    assert versions["triton"] == lang.triton.__version__ and versions["torch"] == torch.__version__
    assert versions["ptxas"].startswith("V")
    kinds = {name.split(" step ")[0] for name in record["targets"]["cuda:90"]["variants"]}
    assert {"SGD (momentum, nesterov)", "Adam (amsgrad)", "BatchDecoupledAdam"} <= kinds
    assert any(" bf16: " in name for name in record["targets"]["cuda:90"]["variants"])
    first, second = warm.filled
    assert first["environment"] == {"TRITON_CACHE_DIR": str(warm.cache)}
    assert first["targets"][0]["compiled"] > 20 and first["targets"][0]["failed"] == 0
    assert first["c_modules"]["built"] >= 1 and not first["c_modules"]["problem"]
    # Counted when the disk was asked: kernels of the first run, that no rule or type decides.
    assert second["targets"][0]["there"] >= 2 and second["targets"][1]["there"] == 0


# Without compiling


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
    result = _run(*command)
    assert result.returncode == 0, result.stderr
    return {name: (n, missing) for name, (n, missing) in json.loads(result.stdout).items()}


@pytest.mark.xdist_group("precompile-keys")
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_nothing_is_launched_that_is_not_compiled(
    target: str, compared: dict[str, tuple[int, list[str]]]
) -> None:
    launched, missing = compared[target]
    assert launched > 60 and missing == []


@pytest.mark.xdist_group("precompile-keys")
def test_a_model_of_usual_layers_launches_nothing_else(
    compared: dict[str, tuple[int, list[str]]],
) -> None:
    """With ``--statistics``: linear layers, normalisations and embeddings, accumulated."""
    launched, missing = compared["model"]
    assert launched >= 8 and missing == []


def test_every_variant_of_codegen_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """``codegen`` lists variants by hand: whatever it has, a step must have launched."""
    from fusedopt.backends import triton as launching
    from fusedopt.backends import triton_samples
    from fusedopt.kernels.aot import materialised, norms, update
    from fusedopt.precompile import cases

    seen = set()

    def note(kernel: Any, programs: int, threads: int, device: Any, *a: Any, **meta: Any) -> None:
        seen.add((kernel.__name__, threads, _constants(meta)))

    monkeypatch.setattr(launching, "launch", note)
    monkeypatch.setattr(triton_samples, "launch", note)
    for case in cases.all_cases():
        case.run()
    for variant in (*update.variants(), *norms.variants(), *materialised.variants()):
        if variant.constants.get("PARTS", 1) == 1:
            wanted = variant.kernel.__name__, variant.threads, _constants(variant.constants)
            assert wanted in seen, variant.name


def _constants(values: Any) -> frozenset[tuple[str, str]]:
    known = {name: value for name, value in values.items() if name != "enable_fp_fusion"}
    return frozenset(
        (name, getattr(value, "__name__", None) or str(value)) for name, value in known.items()
    )


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tpu:4"], "a target is cuda:"),
        (["--target", "cuda:90", "--rule", "Lamb"], "no rule 'Lamb': there are Adam, AdamW"),
        (["--target", "cuda:90", "--types", "fp8"], "no type 'fp8': there are fp32, bf16"),
        (["--target", "cuda:90", "--import", "no_such"], "--import no_such: No module"),
        (["--target", "cuda:90", "--import", "json"], "json registered no rule"),
        (["--target", "cuda:90", "--jobs", "0"], "--jobs must be at least 1"),
        # A shell's variable that is not set, in place of the folder.
        (["--target", "cuda:90", "--cache", ""], "--cache is empty"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(lang, "INTERPRETED", False)
    cache = tmp_path / "cache"
    assert cli.main(["precompile", "--cache", str(cache), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lang, "INTERPRETED", False)
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    assert cli.main(["precompile", "--target", "cuda:90", "--cache", str(cache)]) == 2
    assert f"cannot write to {cache}: Not a directory" in capsys.readouterr().err


def test_the_interpreter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lang, "INTERPRETED", True)
    assert cli.main(["precompile", "--target", "cuda:90", "--cache", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET=1 replaces the compiler: unset it" in capsys.readouterr().err


def test_without_a_gpu_a_target_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lang, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["precompile", "--cache", str(tmp_path)]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_the_gpus_of_the_machine_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.cli import precompile

    gpus = [(9, 0), (9, 0), (12, 0)]
    names = ["gfx942:sramecc+:xnack-", "gfx942:sramecc+:xnack-", "gfx1100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(gcnArchName=names[i])
    )
    monkeypatch.setattr(torch.version, "hip", None)
    assert precompile._own_targets() == ["cuda:90", "cuda:90", "cuda:120"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert precompile._own_targets() == ["hip:gfx942", "hip:gfx942", "hip:gfx1100"]


MY_RULES = """
import dataclasses
from fusedopt.examples.lion import LION
from fusedopt.kernels.lang import jit, tl
from fusedopt.kernels.rules import SGD, register

@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    return no_such_function(p), states

def refuse(group, step):
    raise ValueError("no such step")

register(LION)
register(dataclasses.replace(SGD, name="Broken", update=update))
register(dataclasses.replace(SGD, name="Refuses", coefficients=refuse))
"""


def test_rules_of_ones_own(tmp_path: Path) -> None:
    """Imported in the compiling processes, too; what fails is told, and the rest compiled.

    The same run has no C compiler that works, which is told and no failure.
    """
    (tmp_path / "my_rules.py").write_text(MY_RULES)
    cache, command = tmp_path / "cache", ("-m", "fusedopt", "precompile", "--jobs", "1")
    rules = [word for name in ("Lion", "Broken", "Refuses") for word in ("--rule", name)]
    result = _run(
        *command, "--target", "cuda:90", "--cache", str(cache), "--import", "my_rules", *rules,
        "--types", "fp64", CC=str(tmp_path / "no compiler"),
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "failed: cuda:90 Broken step 0 fp64: update_tensors: Compil" in result.stdout
    assert "failed: cuda:90 Refuses step 0 fp64: ValueError: no such step" in result.stdout
    assert "C modules built: 0 (the C compiler does not work" in result.stdout
    assert f"export TRITON_CACHE_DIR={cache}" in result.stdout
    done = json.loads((cache / "fusedopt.json").read_text())["targets"]["cuda:90"]["variants"]
    assert "Lion step 0 fp64 unaligned: update_tensors" in done
    assert not [name for name in done if "Broken" in name or "Refuses" in name]


# Counting

LISTENING = """
import json
from triton import knobs
from fusedopt.compilations import compilations
from fusedopt.kernels import aot
from fusedopt.kernels.aot.norms import clip_factor

heard = []
knobs.compilation.listener = outer = lambda **event: heard.append(event["cache_hit"])
target = aot.parse_target("hip:gfx942")
with compilations() as all_of_it:
    with compilations() as first:
        aot.compile_variant(clip_factor(False), target)
    with compilations() as second:
        aot.compile_variant(clip_factor(False), target)
rows = [[c.compiled, c.cached, c.seconds > 0, c.names] for c in (all_of_it, first, second)]
print(json.dumps([rows, heard, knobs.compilation.listener is outer]))
"""


def test_compilations_are_counted(tmp_path: Path) -> None:
    result = _run("-c", LISTENING, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    name = "clip_factor"
    rows, heard, put_back = json.loads(result.stdout)
    assert rows == [[1, 1, True, [name]], [1, 0, True, [name]], [0, 1, False, []]]
    assert heard == [False, True] and put_back


KEYS = """
import json, os, sys
from fusedopt.kernels.launch import settle
from fusedopt.kernels import multi_tensor
from fusedopt.kernels.per_sample import linear, materialised

kernels = [multi_tensor.update_tensors, materialised.update_from_samples, linear.linear_rows]
for order in (kernels, kernels[::-1]):
    # A process of its own: keys are formed once.
    if os.fork() == 0:
        for kernel in order:
            settle(kernel)
            kernel.cache_key
        print(json.dumps([kernel.cache_key for kernel in kernels]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_keys_do_not_depend_on_what_came_before() -> None:
    """Triton's do: kernels that share a device function have several keys without ``settle``."""
    result = _run("-W", "ignore", "-c", KEYS)
    one, other = result.stdout.splitlines()
    assert one == other and len(set(json.loads(one))) == 3


def test_without_triton_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lang, "triton", None)
    with compilations() as seen:
        pass
    assert (seen.compiled, seen.cached, seen.seconds) == (0, 0, 0.0)


ON_GPU = """
import json, torch, fusedopt
from fusedopt.compilations import compilations

sizes = [(4096,), (2500,), (3, 5), ()]
own = [torch.nn.Parameter(torch.zeros(s, device="cuda")) for s in sizes]
o = fusedopt.AdamW(own, backend="triton", clip=fusedopt.GlobalNorm(1.0))
with compilations() as seen:
    for _ in range(2):
        for p in own:
            p.grad = torch.ones_like(p)
        o.step()
torch.cuda.synchronize()
moved = all(bool((p != 0).all()) for p in own)
print(json.dumps([seen.compiled, seen.cached, moved]))
"""


@pytest.mark.gpu
@needs_gcc
def test_the_first_step_on_a_gpu_compiles_nothing(tmp_path: Path) -> None:
    """For its own target, which is the default; the empty cache shows that there is a count."""
    calls, compiler = tmp_path / "calls", tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho >> "{calls}"\nexec gcc "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    cache = str(tmp_path / "cache")
    _precompile("--cache", cache, "--rule", "AdamW", "--types", "fp32")
    for directory, compiled in ((str(tmp_path / "empty"), 3), (cache, 0)):
        calls.unlink(missing_ok=True)
        result = _run("-c", ON_GPU, TRITON_CACHE_DIR=directory, CC=str(compiler))
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == [compiled, 3 - compiled, True]
        built = calls.exists()
        # AMD's module is built at the first launch: its source holds a path of the machine.
        assert built is (compiled > 0) or torch.version.hip is not None
