"""The command line: what it prints, what it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedopt import __main__ as cli
from fusedopt import testing
from fusedopt.cli import bench, progress, verify
from fusedopt.kernels import aot
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
    assert capsys.readouterr().err.strip() == "info needs rich: pip install rich"


def test_all_that_is_missing_is_named_at_once(capsys, monkeypatch):
    # Catches advice that only a checkout understands, and a second error after it was followed.
    for name in ("rich", "rich.console", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["bench", "--quick", "host"]) == 2
    wanted = "bench needs rich and matplotlib: pip install rich matplotlib"
    assert capsys.readouterr().err.strip() == wanted


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["verify", "--quick"], "usage: python -m fusedopt verify [-h] [--device"),
        (["info", "--steps", "3"], "usage: python -m fusedopt info [-h]"),
        (["--quick", "verify"], "usage: python -m fusedopt [-h] [--version] command"),
    ],
)
def test_an_unknown_option_shows_the_usage_of_its_command(arguments, usage, capsys):
    # Catches the usage of the whole, which names no option of the command.
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    error = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and error.startswith(usage)
    assert "unrecognized arguments: --" in error


def _help(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_says_what_an_option_is_and_its_default(capsys):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"in Triton's interpreter ({default})" in _help("verify", capsys)
    for command in ("codegen", "precompile"):
        stated = f"default: one a processor, here {aot.processors()}"
        assert stated in _help(command, capsys), command
    assert "default: cuda:80, cuda:90," in _help("codegen", capsys)


def test_help_of_the_benchmark_without_a_checkout(tmp_path, capsys, monkeypatch):
    # Catches the holes that lists of names leave where there are none.
    assert "part of the source checkout" not in _help("bench", capsys)
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    text = _help("bench", capsys)
    assert "The benchmarks are part of the source checkout" in text
    assert "--case NAME repeatable (of the step part)" in text
    assert "PART a part of the benchmark" in text
    assert cli.main(["bench", "--quick"]) == 2
    assert "bench: the benchmarks are part of the source checkout" in capsys.readouterr().err


def _only(monkeypatch, *names):
    rules = {name: REGISTRY[name] for name in names}
    monkeypatch.setattr(verify, "REGISTRY", rules)
    monkeypatch.setattr(testing, "SHAPES", ((40,), (0,), ()))
    # They have tests of their own.
    monkeypatch.setattr(verify.verify_formats, "compare_all", lambda device: iter(()))


def test_verify_passes_on_right_kernels(monkeypatch, capsys):
    _only(monkeypatch, "SGD", "Adam")
    assert cli.main(["verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(row["rule"], row["dtype"]) for row in report["rows"]} == {
        (rule, dtype)
        for rule in ("SGD", "Adam")
        for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    # Three parameters of 41 elements in all, five steps, seven sets; momentum in five of them.
    counts = {row["rule"]: (row["compared"], row["undecided"]) for row in report["rows"]}
    assert counts["SGD"][0] == 41 * 5 * (7 + 5)
    assert all(0 <= undecided <= compared // 100 for compared, undecided in counts.values())
    assert cli.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and "at most 1% of an option set" in " ".join(printed.split())


def test_verify_fails_on_a_wrong_twin(monkeypatch, capsys):
    _only(monkeypatch, "SGD")
    rule = REGISTRY["SGD"]

    def wrong(p, inputs, states, coefficients, options):
        return rule.twin(p, (1.01 * inputs[0],), states, coefficients, options)

    broken = type(rule)(**{**vars(rule), "twin": wrong})
    monkeypatch.setitem(verify.REGISTRY, "SGD", broken)
    assert cli.main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_fails_where_one_option_set_does(monkeypatch, capsys):
    # Catches a set that is left out, as sets were whose decay is cautious, and a verdict on sums.
    _only(monkeypatch, "SGD")
    rule = REGISTRY["SGD"]

    def wrong(p, inputs, states, coefficients, options):
        cautious = options[2]
        numbers = (coefficients[0], 0.0, *coefficients[2:]) if cautious else coefficients
        return rule.twin(p, inputs, states, numbers, options)

    monkeypatch.setitem(verify.REGISTRY, "SGD", type(rule)(**{**vars(rule), "twin": wrong}))
    assert cli.main(["verify", "--json"]) == 1


def test_verify_fails_where_too_much_is_undecided(monkeypatch, capsys):
    # Catches a verdict by distances alone.
    def undecided(*_):
        return testing.Comparison(0.0, 2, 100, True, 1.0)

    _only(monkeypatch, "SGD")
    monkeypatch.setattr(verify, "compare", undecided)
    monkeypatch.setattr(verify.verify_samples, "compare_all", lambda device: iter(()))
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


def test_verify_keeps_numpys_warnings_to_itself(monkeypatch, capsys):
    """Catches warnings of the interpreter's that look like failures; here they would be errors."""
    numpy = pytest.importorskip("numpy")

    def overflow(*_):
        numpy.array([1e30], numpy.float32).astype(numpy.float16)
        return testing.Comparison(0.0, 0, 1, True, 1.0)

    _only(monkeypatch, "SGD")
    monkeypatch.setattr(verify, "compare", overflow)
    monkeypatch.setattr(verify.verify_samples, "compare_all", lambda device: iter(()))
    assert cli.main(["verify", "--json"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.warns(RuntimeWarning, match="overflow"):
        overflow()


def test_a_log_shows_how_far_a_command_is(monkeypatch, capsys):
    # Catches a minute of silence where there is no terminal, and a line for each of 400 variants.
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("compiling", quiet=False) as show:
        show("searching")
        for done in range(1, 31):
            show("Adam", done, 30)
            now[0] += 1.0
    printed = capsys.readouterr()
    lines = ["compiling", "compiling: searching", "compiling: 1 of 30: Adam"]
    lines += [f"compiling: {done} of 30: Adam" for done in (11, 21, 30)]
    assert (printed.out, printed.err.splitlines()) == ("", lines)
    with progress.progress("", quiet=False) as show:
        show("finding variants")
    assert capsys.readouterr().err == "finding variants\n"
    with progress.progress("compiling", quiet=True) as show:
        show("searching")
    assert capsys.readouterr().err == ""


def test_verify_on_a_missing_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("verify", "--device", "cuda")
    assert result.returncode == 2 and "no CUDA or ROCm device" in result.stderr
