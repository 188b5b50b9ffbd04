"""A whole run for a GPU, rehearsed on the CPU with a stand-in for each stage."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from gpu_command import ROOT, module, python

# The order in which facts are worth most, and what comes only if time is left.
WANTED = ["info", "precompile", "verify", "step", "per-sample", "training"]
WANTED += ["tune", "bench", "tests", "sanitizer"]
IF_TIME = ["formats", "first-step", "racecheck", "native", "profile"]
BAD = {
    "fails": "import sys; sys.exit(3)",
    "overruns": "import time; time.sleep(60)",
    "prints garbage": "print('{' * 1000)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
}


def stand_ins(bad: str, code: str, limit: float = 5.0):
    """Every stage as a process that does nothing but say its name; one is bad."""
    stages, processes = module("stages"), module("processes")

    def stand_in(stage):
        text = code if stage.name == bad else f"print({stage.name!r})"
        command = processes.Command(stage.name, (sys.executable, "-S", "-c", text))

        def read(setting, outcomes):
            if outcomes[0].output.strip() != stage.name:
                raise ValueError(outcomes[0].output[:20])
            return {"said": stage.name}

        seconds = 1.0 if stage.name == bad else limit
        return dataclasses.replace(
            stage, limit=seconds, commands=lambda setting: [command], read=read
        )

    return tuple(map(stand_in, stages.STAGES))


def test_the_order_of_the_stages():
    stages = module("stages").STAGES
    assert [stage.name for stage in stages] == WANTED + IF_TIME
    assert [stage.name for stage in stages if not stage.kept] == IF_TIME
    # With the time to find the GPU, what is kept fits into the deadline.
    assert sum(stage.limit for stage in stages if stage.kept) <= module("__main__").DEADLINE - 10


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("bad", ["info", "step", "tests", "profile"])
def test_a_bad_stage_loses_nothing_of_the_others(bad, how, monkeypatch, tmp_path):
    main = module("__main__")
    monkeypatch.setattr(main, "STAGES", stand_ins(bad, BAD[how]))
    monkeypatch.setattr(main, "probe", lambda: {"device": "stand-in", "target": "cuda:90"})
    begin = time.monotonic()
    assert main.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    assert time.monotonic() - begin < 30
    summary = json.loads((tmp_path / "summary.json").read_text())
    results = {stage["stage"]: stage["result"] for stage in summary["stages"]}
    assert list(results) == WANTED + IF_TIME and results.pop(bad) != "passed"
    assert set(results.values()) == {"passed"}
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_killed_run_keeps_what_came_before(tmp_path):
    """Each result is written when its stage ends, so that a machine may go away at any time."""
    script = (
        "import sys; sys.path[:0] = ['tests/bench', 'tests/helpers', '.']\n"
        "import test_gpu_rehearsal as rehearsal\n"
        "main = rehearsal.module('__main__')\n"
        "main.STAGES = rehearsal.stand_ins('training', 'import time; time.sleep(60)')\n"
        "import dataclasses\n"
        "main.STAGES = tuple(dataclasses.replace(s, limit=60.0) for s in main.STAGES)\n"
        "main.probe = lambda: {'device': 'stand-in', 'target': 'cuda:90'}\n"
        f"main.main(['--out', {str(tmp_path)!r}, '--commit', 'abc'])\n"
    )
    command = [sys.executable, "-c", script]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), **quiet)
    try:
        end = time.monotonic() + 60
        found = []
        while len(found) < 5 and time.monotonic() < end:
            time.sleep(0.1)
            if (tmp_path / "summary.json").exists():
                # Whole at every moment.
                found = json.loads((tmp_path / "summary.json").read_text())["stages"]
    finally:
        running.kill()
        running.wait()
    assert [(s["stage"], s["result"]) for s in found] == [(n, "passed") for n in WANTED[:5]]


def test_what_a_profiler_looks_at_runs():
    done = python("-m", "bench.gpu.profiled", "--device", "cpu", "--small", TRITON_INTERPRET="1")
    assert done.returncode == 0 and "have run twice" in done.stdout, done.stderr
