"""The command line where libraries that it can do without are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedopt
from fusedopt.kernels import lang

COMMANDS = ("info", "verify", "codegen", "precompile", "bench", "demo")


def run_without(modules, *arguments, interpret=False, before=""):
    """Run the command in a process that cannot import some modules, its children neither."""
    script = (
        f"import sys\nfor name in {list(modules)!r}: sys.modules[name] = None\n{before}\n"
        f"from fusedopt.__main__ import main\nsys.exit(main({list(arguments)!r}))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "COLUMNS": "160"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


HELP = """
from fusedopt.__main__ import main
for command in {commands}:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        print(f"[{{command}} {{ended.code}}]")
"""


def test_help_needs_nothing_but_torch():
    before = HELP.format(commands=COMMANDS)
    done = run_without(["rich", "matplotlib", "numpy", "pytest"], "--version", before=before)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        shown, _, done.stdout = done.stdout.partition(f"[{command} 0]")
        assert shown.lstrip().startswith(f"usage: python -m fusedopt {command} "), command
        assert "--json" in shown, command


def test_the_version_is_the_packages():
    done = run_without([], "--version", "info")
    assert (done.returncode, done.stdout.strip()) == (0, f"fusedopt {fusedopt.__version__}")


def test_info_draws_nothing_for_json():
    done = run_without(["rich"], "info", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["torch"] == torch.__version__


@pytest.mark.skipif(lang.triton is None or sys.platform != "linux", reason="needs the compiler")
def test_codegen_draws_nothing_for_json():
    # The first variant alone: children find it by its name among all.
    before = (
        "from fusedopt.kernels import aot\nall_of = aot.variants\n"
        "aot.variants = lambda target: list(all_of(target))[:1]\n"
    )
    done = run_without(["rich"], "codegen", "--target", "cuda:90", "--json", before=before)
    assert done.returncode == 0, done.stderr
    assert [row["target"] for row in json.loads(done.stdout)["variants"]] == ["cuda:90"]


@pytest.mark.skipif(lang.triton is None or sys.platform != "linux", reason="needs the compiler")
def test_precompile_draws_nothing_for_json(tmp_path):
    chosen = ["--target", "cuda:90", "--rule", "SGD", "--types", "fp32", "--jobs", "1"]
    done = run_without(["rich"], "precompile", *chosen, "--cache", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"]


def test_verify_and_demo_draw_nothing_for_json(tmp_path):
    before = (
        "from fusedopt import testing\nfrom fusedopt.cli import verify\n"
        "from fusedopt.kernels.rules import REGISTRY\n"
        "verify.REGISTRY = {'SGD': REGISTRY['SGD']}\ntesting.SHAPES = ((4,),)\n"
        "verify.verify_samples.compare_all = lambda device: iter(())\n"
        "verify.verify_formats.compare_all = lambda device: iter(())\n"
    )
    done = run_without(["rich"], "verify", "--json", interpret=True, before=before)
    assert done.returncode == 0 and json.loads(done.stdout)["failed"] == 0, done.stderr
    steps = ["--size", "tiny", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    done = run_without(["rich", "matplotlib"], "demo", *steps, "--json")
    assert json.loads(done.stdout)["steps"] == 2, done.stderr


@pytest.mark.skipif(lang.triton is None, reason="needs Triton")
def test_verify_names_what_is_missing():
    done = run_without(["numpy"], "verify", "--device", "cpu", interpret=True)
    assert done.returncode == 2 and done.stderr.strip().endswith(": pip install numpy")
    assert "Triton is not installed" not in done.stderr
    done = run_without(["triton"], "verify", "--device", "cpu", interpret=True)
    assert done.returncode == 2 and "Triton is not installed" in done.stderr


def test_a_command_that_draws_names_the_library():
    for command in (["info"], ["demo", "--steps", "1", "--size", "tiny", "--device", "cpu"]):
        done = run_without(["rich", "rich.console"], *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.strip() == f"{command[0]} needs rich: pip install rich"
