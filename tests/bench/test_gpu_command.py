"""The command for a machine with a GPU, with other commands in the place of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_command import ROOT, make_setting, module, python


@pytest.fixture
def setting(tmp_path: Path):
    return make_setting(tmp_path)


def script(name: str, text: str, **more):
    return module("processes").Command(name, (sys.executable, "-c", text), **more)


def stage(name: str, *commands, limit: float = 20.0, read=None):
    read = read or (lambda setting, outcomes: {"said": outcomes[-1].output.strip()})
    return module("stages").Stage(name, limit, lambda setting: list(commands), read)


def run(setting, *stages, seconds: float = 60.0) -> dict[str, dict]:
    end = time.monotonic() + seconds
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    results = module("session").run(stages, setting, environment, end, lambda line: None)
    return {result["stage"]: result for result in results}


def alive(pid: int) -> bool:
    """Whether a process is running: what has ended may wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon_over(pid: int) -> bool:
    """Whether a process that was killed is gone within a second."""
    end = time.monotonic() + 1.0
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


HANG = """
import pathlib, signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = [sys.executable, "-c", deaf]
pathlib.Path({pid!r}).write_text(str(subprocess.Popen(child).pid))
print("half", flush=True)
time.sleep({seconds})
"""


def test_a_hanging_stage_is_stopped_with_its_child_and_the_next_one_runs(setting, tmp_path):
    """Catches a limit that is for the command alone, or one that a deaf child outlives."""
    pid = tmp_path / "pid"
    hang = script("hang", HANG.format(pid=str(pid), seconds=60))
    begin = time.monotonic()
    results = run(setting, stage("slow", hang, limit=2.5), stage("next", script("x", "print(7)")))
    assert time.monotonic() - begin < 10
    assert results["slow"]["result"] == "out of time" and "hang" in results["slow"]["reason"]
    # What it said before is kept, as a figure and in the log.
    assert results["slow"]["figures"] == {"said": "half"}
    assert "half" in (setting.out / "log.txt").read_text()
    assert soon_over(int(pid.read_text()))
    assert results["next"]["result"] == "passed" and results["next"]["figures"] == {"said": "7"}


def test_what_a_finished_command_leaves_running_is_ended(setting, tmp_path):
    pid = tmp_path / "pid"
    results = run(setting, stage("x", script("x", HANG.format(pid=str(pid), seconds=0))))
    assert results["x"]["result"] == "passed" and results["x"]["seconds"] < 15
    assert soon_over(int(pid.read_text()))


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupted_command_may_write_down_what_it_has(setting, ignored):
    """Catches a command that ignores interrupts as a job of a shell in the background does."""
    text = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        results = run(setting, stage("x", script("x", text), limit=4.0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert results["x"]["result"] == "out of time" and results["x"]["figures"] == {"said": "so far"}


def test_a_failing_command_ends_its_stage_and_says_why(setting):
    fail = script("one", "import sys; sys.exit('no such thing')")
    after = script("two", "print('ran')")
    results = run(setting, stage("x", fail, after))
    assert results["x"]["result"] == "failed"
    assert "one: exit status 1: no such thing" in results["x"]["reason"]
    assert "ran" not in (setting.out / "log.txt").read_text()


def test_a_command_that_is_not_required_may_fail_or_be_missing(setting):
    missing = module("processes").Command("tool", ("/no/such/tool",), required=False)
    results = run(setting, stage("x", missing, script("y", "print(1)")))
    assert results["x"]["result"] == "passed"


def test_a_missing_program_is_a_failure_and_no_traceback(setting):
    missing = module("processes").Command("tool", ("/no/such/tool",))
    assert "No such file" in run(setting, stage("x", missing))["x"]["reason"]


def test_a_command_without_enough_time_left_is_not_begun(setting):
    late = script("late", "print('ran')", least=30.0)
    read = lambda setting, outcomes: {"begun": [o.begun for o in outcomes]}  # noqa: E731
    results = run(setting, stage("x", script("soon", ""), late, limit=5.0, read=read))
    assert results["x"]["result"] == "passed" and results["x"]["figures"]["begun"] == [True, False]


def test_a_stage_that_cannot_be_run_here_is_left_out(setting):
    stages = module("stages")

    def commands(setting):
        raise stages.LeftOut("there is no tool")

    results = run(setting, stages.Stage("x", 5.0, commands, None))
    assert results["x"]["result"] == "left out" and results["x"]["reason"] == "there is no tool"


def test_budget_keeps_the_time_of_later_stages():
    """Whatever earlier stages take, the limits and the deadline hold."""
    budget = module("session").budget
    stages = module("stages").STAGES
    for fraction in (0.0, 0.5, 1.0):
        left, given = 412.0, []
        for i in range(len(stages)):
            given.append(budget(stages[i:], left))
            left -= fraction * given[-1]
        assert all(0 <= g <= s.limit for g, s in zip(given, stages, strict=True))
        assert left >= -1e-9
    # With all to itself a stage has its limit, and with nothing left it has none.
    assert budget(stages[4:5], 412.0) == stages[4].limit
    assert budget(stages[4:], 0.001) < 0.001


def _main(monkeypatch, capsys, tmp_path, *stages) -> tuple[int, str, Path]:
    """Run the whole command with other stages, on a GPU that is only said to be there."""
    command = module("__main__")
    machine = {"device": "a GPU", "target": "cuda:90"}
    monkeypatch.setattr(command, "probe", lambda: machine)
    monkeypatch.setattr(command, "STAGES", stages)
    monkeypatch.setattr(command, "NAMES", tuple(s.name for s in stages))
    out = tmp_path / "out"
    status = command.main(["--out", str(out), "--commit", "abc"])
    return status, capsys.readouterr().out, out


def test_files_table_and_exit_status(monkeypatch, capsys, tmp_path):
    good = stage("good", script("g", "import os; print(os.environ['PYTHONPATH'].split(':')[0])"))
    status, printed, out = _main(monkeypatch, capsys, tmp_path, good)
    assert status == 0 and "passed" in printed and "good" in printed
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "summary.json", "summary.md"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["passed"] and summary["commit"] == "abc" and summary["device"] == "a GPU"
    # Subprocesses import this checkout, whatever is installed.
    assert summary["stages"][0]["figures"] == {"said": str(ROOT)}
    assert "| good | passed |" in (out / "summary.md").read_text()
    bad = stage("bad", script("b", "raise SystemExit(3)"))
    status, printed, out = _main(monkeypatch, capsys, tmp_path, bad, good)
    assert status == 1 and "failed" in printed and "passed" in printed
    assert not json.loads((out / "summary.json").read_text())["passed"]


def test_counts_of_an_earlier_run_are_not_this_ones(monkeypatch, capsys, tmp_path):
    stages, findings = module("stages"), module("findings")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "junit.xml").write_text('<testsuite tests="9"/>')
    cut = stages.Stage("tests", 5.0, lambda setting: [script("x", "")], findings.tests)
    status, printed, out = _main(monkeypatch, capsys, tmp_path, cut)
    assert status == 1 and not (out / "junit.xml").exists()
    (found,) = json.loads((out / "summary.json").read_text())["stages"]
    assert found["result"] == "failed" and not found["figures"]


def test_what_is_missing_is_said_at_once(monkeypatch, capsys, tmp_path):
    command = module("__main__")
    monkeypatch.setattr(command, "probe", lambda: {"device": "a GPU", "target": "cuda:90"})
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("it runs"))
    (tmp_path / "file").write_text("kept")
    assert command.main(["--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'}: File exists" in capsys.readouterr().err
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--out", str(tmp_path / "new")]) == 2
    assert "pip install rich" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_long_output_is_shortened_in_the_middle(setting):
    report = module("report")
    report.log(setting.out, "x", "begin" + "." * 2_000_000 + "end", "")
    text = (setting.out / "log.txt").read_text()
    assert len(text) < 1_100_000 and "begin" in text and "end\n" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = python("-m", "bench.gpu", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "needs a GPU" in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "info,sleep"], "no stage 'sleep'"),
        (["--deadline", "421"], "at most 415"),
        (["--deadline", "soon"], "'soon' is no number of seconds"),
        (["--bench", "--case 'odd"], "No closing quotation"),
        ([], "--out"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    out = [] if message == "--out" else ["--out", "x"]
    with pytest.raises(SystemExit) as ended:
        module("__main__").main([*out, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_dry_run_prints_every_stage(capsys, monkeypatch):
    command = module("__main__")
    monkeypatch.setattr(command, "probe", lambda: None)
    assert command.main(["--out", "x", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for name in module("stages").NAMES:
        assert f"# {name}, at most" in printed
