"""What the command for a machine with a GPU runs there, and how it reads what that says."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from gpu_command import make_setting, module, python


@pytest.fixture
def setting(tmp_path: Path):
    return make_setting(tmp_path)


class Parsed(Exception):
    """Carries what a command line was read as, before anything is run."""


def _main_of(arguments):
    """What ``python -m`` would run, and its arguments."""
    assert arguments[1] == "-m"
    name = arguments[2]
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if package else name).main, arguments[3:]


@pytest.mark.parametrize("stage", module("stages").STAGES, ids=lambda stage: stage.name)
def test_the_stages_commands_are_understood(stage, setting, monkeypatch):
    """Catches an option or a name that the command would refuse, on a machine that is lent once."""
    monkeypatch.setattr(module("stages").shutil, "which", lambda name, path=None: f"/bin/{name}")
    parse = argparse.ArgumentParser.parse_known_args
    within = []

    def stop(self, *arguments, **keywords):
        # Parsers of commands are called by that of the whole.
        within.append(self)
        options, unknown = parse(self, *arguments, **keywords)
        within.pop()
        if within:
            return options, unknown
        assert not unknown
        raise Parsed(options)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    for command in stage.commands(setting):
        if sys.executable not in command.arguments or "pytest" in command.arguments:
            continue
        main, own = _main_of(command.arguments[command.arguments.index(sys.executable) :])
        with pytest.raises(Parsed) as parsed:
            main(list(own))
        if "bench" in own:
            (options,) = parsed.value.args
            bench = importlib.import_module("fusedopt.cli.bench")
            assert bench._wrong(options, bench._step()) is None


JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'
VERIFY = {"rule": "Adam", "dtype": "float32", "worst_ulps": 3.0, "passed": True}
MEMCHECK = "9 comparisons with the reference, {} failed\n========= ERROR SUMMARY: {} errors\n"


def _outcome(name, output, status=0):
    processes = module("processes")
    return processes.Outcome(processes.Command(name, ()), status, 1.0, output, "")


@pytest.mark.parametrize("name", ["info", "precompile", "tests", "verify", "bench", "native"])
def test_garbage_is_a_failure(setting, name):
    """Catches a reader that takes silence for success, or ends the run by an exception."""
    (setting.out / "junit.xml").write_text("<<<")
    (setting.out / "x.json").write_text("[1, 2")
    read = getattr(module("findings"), name)
    outcome = _outcome(name, "%$ 1\n")
    stages, session = module("stages"), module("session")
    found = session._judge(stages.Stage(name, 1.0, None, read), setting, [outcome])
    assert found["result"] == "failed" and found["reason"]


def test_info_is_read(setting):
    """From what the command itself says, which tells the processor first."""
    findings = module("findings")
    facts = importlib.import_module("fusedopt.cli.info").collect()
    gpu = {"device": "cuda:0", "name": "a GPU", "backend": "triton", "why": "it can"}
    facts["devices"] = [*facts["devices"][:1], gpu]
    found = findings.info(setting, [_outcome("info", json.dumps(facts))])
    assert found["device"] == "a GPU" and found["torch"] == torch.__version__
    gpu |= {"backend": "reference", "why": "too old"}
    with pytest.raises(findings.Bad, match="too old"):
        findings.info(setting, [_outcome("info", json.dumps(facts))])


def test_precompile_is_read(setting):
    """From what the command's own summary says."""
    findings = module("findings")
    report = importlib.import_module("fusedopt.cli.precompile_report")
    rows = [
        {"target": "cuda:90", "cached": i == 0, "error": None, "seconds": 1.0, "bytes": 5}
        for i in range(3)
    ]
    modules = {"built": 2, "problem": None}

    def printed():
        found = report.summary(rows, ["cuda:90"], Path("x"), modules, {}, 1.0)
        return [_outcome("precompile", json.dumps(found))]

    found = findings.precompile(setting, printed())
    assert found == {"compiled": 2, "there": 1, "failed": 0, "bytes": 15, "C modules": 2}
    rows[2]["error"] = "no"
    with pytest.raises(findings.Bad, match="1 variants failed"):
        findings.precompile(setting, printed())
    rows.clear()
    with pytest.raises(findings.Bad):
        findings.precompile(setting, printed())


def test_tests_are_read(setting):
    findings = module("findings")
    (setting.out / "junit.xml").write_text(JUNIT.format(0))
    assert findings.tests(setting, []) == {"passed": 7, "failed": 0, "skipped": 2}
    (setting.out / "junit.xml").write_text(JUNIT.format(3))
    with pytest.raises(findings.Bad, match="3 tests failed"):
        findings.tests(setting, [])
    # All skipped: nothing was tested.
    (setting.out / "junit.xml").write_text('<testsuite tests="2" skipped="2"/>')
    with pytest.raises(findings.Bad, match="0 passed"):
        findings.tests(setting, [])


def test_verify_is_read(setting):
    findings = module("findings")
    rows = [VERIFY, {**VERIFY, "worst_ulps": 5.0}]
    found = {"rows": rows, "formats": [], "operations": []}
    assert findings.verify(setting, [_outcome("verify", json.dumps(found))])["float32 ulps"] == 5.0
    found["operations"] = [{"operation": "bias", "dtype": "float16", "passed": False}]
    with pytest.raises(findings.Bad, match="bias"):
        findings.verify(setting, [_outcome("verify", json.dumps(found))])


@pytest.mark.parametrize(
    ("failed", "errors", "complaint"),
    [(0, 0, None), (0, 4, "4 errors"), (1, 0, "1 failed")],
)
def test_sanitizer_is_read(setting, failed, errors, complaint):
    findings = module("findings")
    outcomes = [_outcome("memcheck", MEMCHECK.format(failed, errors))]
    if complaint is None:
        assert findings.sanitizer(setting, outcomes) == {"memcheck errors": 0}
        return
    with pytest.raises(findings.Bad, match=complaint):
        findings.sanitizer(setting, outcomes)


def test_a_sanitizer_that_watched_nothing_is_no_success(setting):
    findings = module("findings")
    for text in ("", "========= ERROR SUMMARY: 0 errors\n", MEMCHECK.format(0, 0)[:45]):
        with pytest.raises(findings.Bad):
            findings.sanitizer(setting, [_outcome("memcheck", text)])


def test_a_device_that_the_sanitizer_does_not_support_is_named(setting):
    findings = module("findings")
    with pytest.raises(findings.Bad, match="^memcheck: the tool does not support this device$"):
        findings.sanitizer(setting, [_outcome("memcheck", "Error: Device not supported\n", 1)])


def test_racecheck_is_read(setting):
    text = "9 comparisons with the reference, 0 failed\n========= RACECHECK SUMMARY: {} hazards"
    findings = module("findings")
    assert findings.sanitizer(setting, [_outcome("racecheck", text.format(0))])
    with pytest.raises(findings.Bad, match="2 errors"):
        findings.sanitizer(setting, [_outcome("racecheck", text.format(2))])


def test_ctest_is_read(setting):
    findings = module("findings")
    text = "100% tests passed, 0 tests failed out of 4\n"
    assert findings.native(setting, [_outcome("ctest", text)])["passed"] == 4
    with pytest.raises(findings.Bad, match="1 of 4"):
        findings.native(setting, [_outcome("ctest", "75% tests passed, 1 tests failed out of 4")])


def test_a_gpu_that_the_library_passed_over_is_a_failure(setting):
    findings = module("findings")
    text = "5/7 Test #5: {} ...***Skipped 0.01 sec\n100% tests passed, 0 tests failed out of 7\n"
    found = findings.native(setting, [_outcome("ctest", text.format("other"))])
    assert found == {"passed": 6, "failed": 0, "skipped": 1}
    with pytest.raises(findings.Bad, match="step_on_gpu"):
        findings.native(setting, [_outcome("ctest", text.format("step_on_gpu"))])


@pytest.mark.parametrize("name", ["info", "precompile", "verify", "bench"])
def test_the_commands_of_the_stages_exist(name, setting, monkeypatch):
    """Catches an option that a command does not have: argparse says so before it does anything."""
    main = importlib.import_module("fusedopt.__main__")
    (stage,) = [stage for stage in module("stages").STAGES if stage.name == name]
    command = stage.commands(setting)[0]
    package = importlib.import_module(f"fusedopt.cli.{name}")
    seen = []
    monkeypatch.setattr(package, "run", lambda options: seen.append(options) or 0)
    assert command.arguments[1:3] == ("-m", "fusedopt")
    assert main.main(command.arguments[3:]) == 0 and seen


def test_the_tests_of_the_tests_stage_are_collected(setting):
    """Catches a marker or an option that pytest does not know, and a suite without such tests."""
    stages = module("stages")
    (stage,) = [stage for stage in stages.STAGES if stage.name == "tests"]
    arguments = stage.commands(setting)[0].arguments[1:]
    done = python(*arguments, "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/step/test_capture.py::" in done.stdout


def test_sanitizer_tools_are_looked_for(setting, monkeypatch, tmp_path):
    stages = module("stages")
    monkeypatch.setattr(stages.shutil, "which", lambda name, path=None: None)
    with pytest.raises(stages.LeftOut, match="compute-sanitizer"):
        stages._sanitizer(setting)
    with pytest.raises(stages.LeftOut, match="cmake"):
        stages._native(setting)
    monkeypatch.setattr(
        stages.shutil, "which", lambda name, path=None: f"{path}/{name}" if path else None
    )
    commands = stages._sanitizer(setting)
    assert commands[0].arguments[0] == "/usr/local/cuda/bin/compute-sanitizer"
    assert commands[0].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for command in commands:
        assert {"--launch-timeout=0", "--report-api-errors=no"} <= set(command.arguments)


def test_native_is_for_nvidia_alone(setting, monkeypatch):
    stages = module("stages")
    monkeypatch.setattr(stages.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    assert "-DFUSEDOPT_TARGETS=cuda:90" in stages._native(setting)[0].arguments
    amd = stages.Setting(setting.out, setting.work, "hip:gfx942")
    with pytest.raises(stages.LeftOut, match="gfx942"):
        stages._native(amd)


SMALL = ("SGD", "BatchDecoupledAdam")


@pytest.fixture
def small_step(monkeypatch):
    """The program that the sanitizer watches, for two rules."""
    small_step = module("small_step")
    rules = {name: small_step.REGISTRY[name] for name in SMALL}
    monkeypatch.setattr(small_step, "REGISTRY", rules)
    return small_step


def test_small_step_runs_every_kernel_of_a_rule(small_step, monkeypatch, capsys, device):
    from fusedopt.backends import triton as backend

    seen = []
    launch = backend.launch

    def watched(kernel, *arguments, **meta):
        seen.append((kernel.fn.__name__, meta.get("ALIGNED"), meta.get("INFINITY_NORM")))
        launch(kernel, *arguments, **meta)

    monkeypatch.setattr(backend, "launch", watched)
    assert small_step.run(device, ["rules"]) == 0
    assert "4 comparisons with the reference, 0 failed" in capsys.readouterr().out
    assert set(seen) == {
        *(("update_tensors", aligned, None) for aligned in (True, False)),
        *(("partial_norms", aligned, form) for aligned in (True, False) for form in (True, False)),
        *(("clip_factor", None, form) for form in (True, False)),
    }


@pytest.mark.parametrize("kernel", ["update_tensors", "clip_factor"])
def test_small_step_sees_a_kernel_that_does_nothing(
    small_step, monkeypatch, capsys, device, kernel
):
    from fusedopt.backends import triton as backend

    launch = backend.launch

    def broken(function, *arguments, **meta):
        if function.fn.__name__ != kernel:
            launch(function, *arguments, **meta)

    monkeypatch.setattr(backend, "launch", broken)
    assert small_step.run(device, ["rules"]) == 1
    assert "FAILED: SGD torch.float32" in capsys.readouterr().out


def test_small_steps_tensors_are_the_end_of_their_allocations():
    small_step = module("small_step")
    values = torch.arange(5.0)
    for shift in (0, 1):
        tensor = small_step.placed(values, torch.device("cpu"), shift)
        assert torch.equal(tensor, values) and tensor.storage_offset() == shift
        assert tensor.untyped_storage().nbytes() == 4 * (shift + 5)
