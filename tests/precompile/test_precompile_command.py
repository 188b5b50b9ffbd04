"""The command line of ``precompile``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from precompiling import needs_compiler, run_python

from fusedopt import __main__ as cli
from fusedopt.kernels import lang

pytestmark = needs_compiler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tpu:4"], "a target is cuda:"),
        (["--target", "cuda:90", "--rule", "Lamb"], "no rule 'Lamb': there are Adam, AdamC, AdamW"),
        (["--target", "cuda:90", "--types", "fp8"], "no type 'fp8': there are fp32, bf16"),
        (["--target", "cuda:90", "--import", "no_such"], "--import no_such: No module"),
        (["--target", "cuda:90", "--import", "json"], "json registered no rule"),
        (["--target", "cuda:90", "--jobs", "0"], "--jobs must be at least 1"),
        (["--target", "cuda:90", "--states", "int8", "--rule", "SGDX"], "no rule 'SGDX'"),
        (["--target", "cuda:90", "--master", "remainder9"], "master must be one of"),
        (
            ["--target", "cuda:90", "--master", "remainder", "--rounding", "kahan"],
            "does not go with",
        ),
        (["--target", "cuda:90", "--rule", "SGD", "--states", "exp_avg=int8"], "SGD keeps"),
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


def test_telemetry_is_asked_for() -> None:
    """Of two steps one is measured: chunks of the other are as large, and another variant."""
    from fusedopt.cli import precompile

    parser = argparse.ArgumentParser()
    precompile.add_arguments(parser)
    found = [precompile._precision(parser.parse_args(a), ["SGD"]) for a in ([], ["--telemetry"])]
    assert found[0] == {} and found[1].keys() == {"telemetry"}
    assert found[1]["telemetry"].every == 2


MY_RULES = """
import dataclasses
from fusedopt.examples.signum import SIGNUM
from fusedopt.kernels.lang import jit, tl
from fusedopt.kernels.rules import SGD, register

@jit
def update(p, inputs, states, coefficients, OPTIONS: tl.constexpr):
    return no_such_function(p), states

def refuse(group, step):
    raise ValueError("no such step")

register(SIGNUM)
register(dataclasses.replace(SGD, name="Broken", update=update))
register(dataclasses.replace(SGD, name="Refuses", coefficients=refuse))
"""


def test_rules_of_ones_own(tmp_path: Path) -> None:
    """Imported in the compiling processes, too; what fails is told, and the rest compiled.

    The same run has no C compiler that works, which is told and no failure.
    """
    (tmp_path / "my_rules.py").write_text(MY_RULES)
    cache, command = tmp_path / "cache", ("-m", "fusedopt", "precompile", "--jobs", "1")
    rules = [word for name in ("Signum", "Broken", "Refuses") for word in ("--rule", name)]
    result = run_python(
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
    assert "Signum step 0 fp64 unaligned: update_tensors" in done
    # What forms its coefficients is another kernel, and not broken.
    own = [name for name in done if "live_coefficients" not in name]
    assert not [name for name in own if "Broken" in name or "Refuses" in name]
