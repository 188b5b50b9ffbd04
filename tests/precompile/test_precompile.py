"""A warm cache: what ``precompile`` has compiled, a training step does not compile again.

The steps run in processes of their own, under a driver that is written down here a second time: one
that the command shares with its test could agree with itself and with no GPU.
"""

from __future__ import annotations

import ctypes
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from precompiling import FP32, TRAINING, needs_compiler, needs_gcc, precompile_json, run_python

from fusedopt.kernels import lang

pytestmark = needs_compiler

# What is compiled for real: as much as there is time for. What is launched by every class, in
# every type and for every target is compared below without compiling.
FILLS = (
    ("--target", "cuda:90", "--rule", "SGD", "--rule", "AdamW",
     "--rule", "BatchDecoupledAdam", "--types", "fp32"),
    ("--target", "cuda:90", "--target", "hip:gfx942", "--rule", "Adam", "--types", "bf16"),
)  # fmt: skip

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

BF16: dict[str, dict[str, Any]] = {
    "AdamW": {"dtype": "bfloat16"},
    "AdamW, norm 2": {"dtype": "bfloat16", "clip": "2"},
}


class Warm:
    """A cache that was filled, and processes that train with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = directory / "cache"
        self.filled = [precompile_json("--cache", str(self.cache), *fill) for fill in FILLS]
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
        result = run_python("-c", TRAINING + COUNT, "with modules", json.dumps(cases), **variables)
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


@needs_gcc
def test_steps_compile_nothing_on_a_warm_cache(warm: Warm) -> None:
    """Neither kernels nor, for NVIDIA, the C modules of Triton, which are loaded here."""
    filled = {name: case for name, case in FP32.items() if case.get("optimizer") != "RMSprop"}
    counts, calls = warm.train({"cuda:90": {**filled, **BF16}, "hip:gfx942": BF16})
    assert {name: compiled for name, (compiled, _) in counts.items() if compiled} == {}
    for target in ("cuda:90", "hip:gfx942"):
        assert counts[f"{target} AdamW, norm 2"][1] >= 2
    assert calls == 0


@needs_gcc
def test_the_counts_see_an_empty_cache(warm: Warm, tmp_path: Path) -> None:
    """Otherwise the test above would pass for nothing."""
    cases = {"cuda:90": {"SGD": {"optimizer": "SGD", "lr": 0.1}}}
    counts, calls = warm.train(cases, cache=tmp_path / "empty")
    # Aligned tensors, and one that is not.
    assert counts == {"cuda:90 SGD": [2, 0]}
    assert calls >= 1


@needs_gcc
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
