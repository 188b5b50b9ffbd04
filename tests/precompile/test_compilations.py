"""Compilations are counted, and their keys depend on nothing that came before."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from precompiling import needs_compiler, needs_gcc, precompile_json, run_python

from fusedopt.compilations import compilations
from fusedopt.kernels import lang

pytestmark = needs_compiler

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
    result = run_python("-c", LISTENING, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    name = "clip_factor"
    rows, heard, put_back = json.loads(result.stdout)
    assert rows == [[1, 1, True, [name]], [1, 0, True, [name]], [0, 1, False, []]]
    assert heard == [False, True] and put_back


KEYS = """
import json, os, sys
from fusedopt.kernels.launch import settle
from fusedopt.kernels import multi_tensor
from fusedopt.kernels.per_sample import materialised, rows

kernels = [multi_tensor.update_tensors, materialised.update_from_samples, rows.linear_rows]
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
    result = run_python("-W", "ignore", "-c", KEYS)
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
    precompile_json("--cache", cache, "--rule", "AdamW", "--types", "fp32")
    for directory, compiled in ((str(tmp_path / "empty"), 3), (cache, 0)):
        calls.unlink(missing_ok=True)
        result = run_python("-c", ON_GPU, TRITON_CACHE_DIR=directory, CC=str(compiler))
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == [compiled, 3 - compiled, True]
        built = calls.exists()
        # AMD's module is built at the first launch: its source holds a path of the machine.
        assert built is (compiled > 0) or torch.version.hip is not None
