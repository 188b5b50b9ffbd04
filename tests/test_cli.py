"""The command line: what it prints, what it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedopt import __main__ as cli
from fusedopt.cli import verify
from fusedopt.kernels.rules import REGISTRY


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "COLUMNS": "160"}
    command = [sys.executable, "-m", "fusedopt", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_info_names_versions_and_the_backend():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "reference")
    table = run("info", interpret=True).stdout
    assert "TRITON_INTERPRET=1 runs the kernels on the CPU" in " ".join(table.split())


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("verify", "--device", "tpu")])
def test_bad_arguments_exit_with_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "usage" in result.stderr


def test_a_missing_library_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err.strip() == "info needs rich: pip install 'fusedopt[bench]'"


def _only(monkeypatch, *names):
    rules = {name: REGISTRY[name] for name in names}
    monkeypatch.setattr(verify, "REGISTRY", rules)
    monkeypatch.setattr(verify, "SHAPES", ((40,), (0,), ()))


def test_verify_passes_on_right_kernels(monkeypatch, capsys):
    _only(monkeypatch, "SGD", "Adam")
    assert cli.main(["verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(row["rule"], row["dtype"]) for row in report["rows"]} == {
        (rule, dtype)
        for rule in ("SGD", "Adam")
        for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    assert cli.main(["verify"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_verify_fails_on_a_wrong_twin(monkeypatch, capsys):
    _only(monkeypatch, "SGD")
    rule = REGISTRY["SGD"]

    def wrong(p, inputs, states, coefficients, options):
        return rule.twin(p, (1.01 * inputs[0],), states, coefficients, options)

    broken = type(rule)(**{**vars(rule), "twin": wrong})
    monkeypatch.setitem(verify.REGISTRY, "SGD", broken)
    assert cli.main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_fails_where_nothing_moves(monkeypatch, capsys):
    """Agreement of two optimizers that both do nothing proves nothing."""
    _only(monkeypatch, "SGD")
    rule = REGISTRY["SGD"]
    still = tuple({**group, "lr": 0.0} for group in rule.example_groups)
    monkeypatch.setitem(
        verify.REGISTRY, "SGD", type(rule)(**{**vars(rule), "example_groups": still})
    )
    assert cli.main(["verify"]) == 1


def test_verify_on_a_missing_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("verify", "--device", "cuda")
    assert result.returncode == 2 and "no CUDA or ROCm device" in result.stderr
