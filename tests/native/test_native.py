"""libfusedopt: built without a GPU, and run on a driver that stands in for one."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from ctypes import c_double, c_int64, c_uint32
from itertools import product
from pathlib import Path

import checkout  # noqa: F401  # native.generate is imported from it
import native_library as native
import numpy
import pytest
import torch

import fusedopt
from fusedopt.kernels import lang
from fusedopt.testing import TRAJECTORY, distance
from native.generate import images
from native.generate.table import LIBRARY, TYPES, rows

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {entry.name: entry for entry in LIBRARY}
MISSING = [tool for tool in ("cmake", "ctest", "cc") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.skipif(lang.triton is None, reason="needs Triton"),
    pytest.mark.skipif(sys.platform != "linux", reason="the library is for Linux"),
]


def compiling():
    """The environment without the interpreter, which this process has turned on."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What makes the sources is part of the checkout, and of no installation.
    return {**kept, "PYTHONPATH": str(ROOT)}


def run(*command, **more):
    done = subprocess.run(
        [str(word) for word in command], env=compiling(), capture_output=True, text=True, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    directory = tmp_path_factory.mktemp("native") / "build"
    run(
        "cmake", "-S", ROOT, "-B", directory, "-DFUSEDOPT_TARGETS=cuda:90", "-DFUSEDOPT_WERROR=ON",
        f"-DPython3_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    run("cmake", "--build", directory, "--parallel", "2")
    return directory


@pytest.fixture(scope="session")
def manifest(build):
    return json.loads((build / "native" / "generated" / "manifest.json").read_text())


@pytest.fixture
def device(build, monkeypatch):
    path = build / "native" / "tests" / "libcuda_standin.so"
    monkeypatch.setenv("FUSEDOPT_DRIVER", str(path))
    return native.Device(path)


@pytest.fixture
def library(build, device):
    library = native.Library(build / "native" / "libfusedopt.so")
    yield library
    library.close()


def test_its_own_tests(build):
    output = run("ctest", "--test-dir", build, "-LE", "codegen", "--output-on-failure")
    tests = "library arguments driver architectures step_on_standin queue_on_standin"
    for name in tests.split():
        assert re.search(rf"Test +#\d+: {name} \.+ +Passed", output), output
    # With a C++ compiler, too.
    if shutil.which("c++"):
        for name in ("install", "example_without_driver", "example_on_standin"):
            assert re.search(rf"Test +#\d+: {name} \.+ +Passed", output), output


def test_nothing_is_built_twice(build):
    """Unchanged inputs compile no kernel and link no library."""
    library = build / "native" / "libfusedopt.so"
    before = library.stat().st_mtime_ns
    run("cmake", "-S", ROOT, "-B", build)
    output = run("cmake", "--build", build)
    assert "compiled" not in output and "Linking" not in output, output
    assert library.stat().st_mtime_ns == before


def test_exports_its_interface_and_needs_no_driver(build):
    library = build / "native" / "libfusedopt.so"
    symbols = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    header = (ROOT / "native" / "include" / "fusedopt.h").read_text()
    declared = set(re.findall(r"FUSEDOPT_API [^(;]*?\b(fusedopt_\w+)\(", header))
    assert symbols == declared
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", library))
    assert not [name for name in needed if "cuda" in name or "python" in name], needed


def test_every_row_of_the_table_is_in_the_manifest(build, manifest):
    found = {kernel["name"]: kernel for kernel in manifest["kernels"]}
    assert list(found) == [row.variant.name for row in rows("cuda:90")]
    assert manifest["triton"] == lang.triton.__version__
    assert manifest["fusedopt"] == fusedopt.__version__
    for kernel in found.values():
        assert kernel["stack"] == 0, kernel
        image = build / "native" / "generated" / "images" / f"{kernel['sha256']}.cubin"
        assert image.stat().st_size == kernel["bytes"]
    # Parameter, gradient and states, for each alignment.
    adam = [tuple(k["types"]) for k in found.values() if k["rule"] == "Adam" and k["aligned"]]
    assert sorted(adam) == sorted(TYPES * 2)


def test_code_for_hopper_is_for_that_capability_alone(build, manifest):
    """The assembler marks what runs on no other minor version: bit 11 of the flags of its ELF."""
    for kernel in manifest["kernels"]:
        assert kernel["machine"] == "sm_90a"
        cubin = build / "native" / "generated" / "images" / f"{kernel['sha256']}.cubin"
        flags = struct.unpack_from("<I", cubin.read_bytes(), 48)[0]
        assert flags & 0xFF == 90 and flags & 1 << 11, hex(flags)


ONE = """
import sys
from native.generate.images import compile_one
for row in map(int, sys.argv[2:]):
    print(compile_one((sys.argv[1], row)).sha256)
"""


def test_the_same_source_gives_the_same_bytes(manifest, tmp_path, monkeypatch):
    """Elsewhere, without a cache, from another directory's name for the same files."""
    (tmp_path / "fusedopt").symlink_to(ROOT / "fusedopt")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    chosen = [0, 3, len(manifest["kernels"]) - 1]
    output = run(sys.executable, "-c", ONE, "cuda:90", *chosen, cwd=tmp_path)
    assert output.split() == [manifest["kernels"][row]["sha256"] for row in chosen]


def _checked(*targets):
    command = [sys.executable, "-m", "native.generate", "--check"]
    for target in targets:
        command += ["--target", target]
    return subprocess.run(command, env=compiling(), cwd=ROOT, capture_output=True, text=True)


def test_a_target_that_nothing_compiles_for_is_one_line():
    done = _checked("cuda:90", "cuda:20")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("cuda:20: Triton .* compute capability 2.0 .*sm_20.*\n", done.stderr)


@pytest.mark.parametrize(
    ("target", "words"),
    [("cuda:9o", "got 'cuda:9o'"), ("hip:gfx942", "hip:gfx942: the library is for NVIDIA GPUs")],
)
def test_a_target_of_another_kind_is_named(target, words):
    with pytest.raises(images.TargetError, match=words):
        images.check_targets([target])


NUMBERS = {
    "lr": (0.0, 1e-3, 0.3),
    "beta1": (0.0, 0.9, 1 - 2**-53),
    "beta2": (0.5, 0.999),
    "alpha": (0.0, 0.99, 1.5),
    "eps": (0.0, 1e-8),
    "weight_decay": (0.0, 0.1),
    "momentum": (0.0, 0.9),
    "dampening": (0.0, -0.3),
}
STEPS = (1, 2, 3, 10, 1000, 10**6, 10**9)


@pytest.mark.parametrize("name", ENTRIES)
def test_scalars_are_those_of_the_rule_to_the_bit(build, name):
    """What C forms, against the Python function, for every flag and a grid of numbers."""
    rules = ctypes.CDLL(str(build / "native" / "tests" / "libfusedopt_rules.so"))
    rules.rules_coefficients.restype = ctypes.c_size_t
    entry = ENTRIES[name]
    row = (c_double * entry.rule.n_coefficients)()
    seen = set()
    grid = [NUMBERS[field] for field in entry.fields] + [(False, True)] * len(entry.flags)
    for values in product(*grid):
        named = dict(zip((*entry.fields, *entry.flags), values, strict=True))
        group = {**entry.fixed, **{flag: named[flag] for flag in entry.flags}}
        for key, fields in entry.hyper.items():
            numbers = tuple(named[field] for field in fields)
            group[key] = numbers[0] if len(numbers) == 1 else numbers
        for step in STEPS if entry.counts_steps else (1,):
            hyper = native.GROUPS[name](**named, **({"step": step} if entry.counts_steps else {}))
            count = rules.rules_coefficients(name.encode(), ctypes.byref(hyper), row)
            expected = [float(value) for value in entry.rule.coefficients(group, step)]
            assert count == len(expected)
            assert [x.hex() for x in row] == [x.hex() for x in expected], (named, step)
            seen.add(tuple(expected))
        options = rules.rules_options(name.encode(), ctypes.byref(hyper))
        wanted = entry.rule.options(group)
        assert options == sum(int(on) << place for place, on in enumerate(wanted)), named
    assert len(seen) > 30


CASES = [
    ("adam", fusedopt.Adam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    ("adamw", fusedopt.AdamW, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "amsgrad": True}),
    ("sgd", fusedopt.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    ("sgd", fusedopt.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("sgd", fusedopt.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("rmsprop", fusedopt.RMSprop, {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1}),
    ("rmsprop", fusedopt.RMSprop, {"lr": 0.1, "eps": 1e-2, "centered": True, "momentum": 0.5}),
]
SIZES = (1024, 3, 513, 2049)


@pytest.mark.parametrize(("name", "optimizer_class", "options"), CASES)
def test_trajectory_is_that_of_the_reference_backend(
    library, device, name, optimizer_class, options
):
    generator = torch.Generator().manual_seed(5)
    params = [torch.randn(n, generator=generator, requires_grad=True) for n in SIZES]
    groups = [
        {"params": params[:2]},
        {"params": params[2:], "lr": 0.05},
    ]
    optimizer = optimizer_class(groups, **options, clip=fusedopt.GlobalNorm(20.0))
    ours = [p.detach().numpy().copy() for p in params]
    start = [p.copy() for p in ours]
    memory = [device.put(p) for p in ours]
    states = [[device.put(numpy.zeros_like(p)) for p in ours] for _ in range(3)]
    norm = device.put(numpy.zeros(1, numpy.float32))
    c_groups = [_c_group(name, optimizer.param_groups[i]) for i in range(2)]
    scale = [p.abs().double().detach() for p in params]
    for step in range(1, 31):
        gradients = [torch.randn(n, generator=generator) for n in SIZES]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        for group in c_groups:
            if hasattr(group, "step"):
                group.step = step
        # Gradients are elsewhere each time, as after zero_grad(set_to_none=True).
        tensors = native.Tensors(
            len(ours), (c_int64 * 4)(*SIZES), native.addresses(memory),
            native.addresses([device.put(g.numpy()) for g in gradients]),
            (ctypes.POINTER(ctypes.c_void_p) * 3)(*map(native.addresses, states)),
            (c_uint32 * 4)(0, 0, 1, 1), *[native.FLOAT32] * 3,
        )  # fmt: skip
        library.step(name, tensors, c_groups, native.Control(max_norm=20.0, norm=norm))
        scale = [torch.maximum(s, p.abs().double()) for s, p in zip(scale, params, strict=True)]
        found = device.get(norm, numpy.zeros(1, numpy.float32))[0]
        assert found == pytest.approx(optimizer.clip.last.item(), rel=1e-6)
    for p, address, largest, before in zip(params, memory, scale, start, strict=True):
        result = torch.from_numpy(device.get(address, before))
        far = distance(result, p.detach(), largest).max().item()
        assert far <= TRAJECTORY[torch.float32].ulps
        assert (result - torch.from_numpy(before)).abs().min() > 1e-6


def _c_group(name, group):
    entry = ENTRIES[name]
    values = {flag: int(group[flag]) for flag in entry.flags}
    for key, fields in entry.hyper.items():
        numbers = group[key] if isinstance(group[key], tuple) else (group[key],)
        values |= dict(zip(fields, numbers, strict=True))
    return native.GROUPS[name](**values)


def test_a_broken_kernel_fails_the_build(tmp_path, monkeypatch, capsys):
    from native.generate import __main__ as command

    good = images.Image("cuda:90", 0, b"", "sm_90a", "8.7", 2, None, ())
    bad = images.Image("cuda:90", 1, b"", "sm_90a", "8.7", 2, None, ("8 bytes of stack",))
    monkeypatch.setattr(images, "compile_all", lambda *_: iter([good, bad]))
    options = type("Options", (), {"jobs": 1, "output": tmp_path / "out"})
    assert command._build(["cuda:90"], options) == 1
    assert "Adam (amsgrad) fp32: 8 bytes of stack" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
