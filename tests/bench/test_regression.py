"""The check of the host time of step(): what it sees, and what it takes for noise."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.regression.{name}")


@pytest.fixture
def host(monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("it is of tensors on the CPU, which the backend takes for the interpreter")
    host = module("host")
    monkeypatch.setattr(host, "COUNTS", (10, 60))
    return host


def _known(ratio: float = 0.4, calls: float = 228, per_tensor: float = 0.0) -> dict:
    row = {"ratio": ratio, "calls": calls, "calls_a_tensor": per_tensor}
    return {"schema": 1, "rows": {f"AdamW {mode}": row for mode in ("still", "moved")}}


def _judged(monkeypatch, times, calls=(228, 0.0), known=None) -> tuple[list[str], int]:
    """Judge one class with made-up figures: the complaints, and how often it was measured."""
    judge = module("judge")
    times, taken = iter(times), []
    monkeypatch.setattr(judge, "MODES", ("still",))
    monkeypatch.setattr(judge, "measure_afresh", lambda *_: taken.append(next(times)) or taken[-1])
    monkeypatch.setattr(judge, "calls", lambda *_: calls)
    (row,) = judge.check(known or _known(), judge.CASES[-1:])
    return row["slower"], len(taken)


def test_noise_is_no_regression(monkeypatch):
    assert _judged(monkeypatch, [0.41]) == ([], 1)
    assert _judged(monkeypatch, [0.59]) == ([], 1)
    # Other processes had the machine twice.
    assert _judged(monkeypatch, [2.0, 0.9, 0.45]) == ([], 3)


def test_what_is_slow_every_time_is_a_regression(monkeypatch):
    every = module("judge").ATTEMPTS
    (complaint,), attempts = _judged(monkeypatch, [0.9, 0.65, *[0.7] * (every - 2)])
    assert attempts == every and "0.650 of torch fused's time, more than 0.600" in complaint
    assert _judged(monkeypatch, [float("nan")] * every)[0]


def test_calls_are_counted(monkeypatch):
    assert _judged(monkeypatch, [0.4], (280, 0.05))[0] == []
    (complaint,), _ = _judged(monkeypatch, [0.4], (300, 0.0))
    assert "300 calls a step" in complaint
    complaints, _ = _judged(monkeypatch, [0.4], (1228, 1.0))
    assert "1.00 calls a tensor, not 0.00" in complaints[1]
    # That many were there before.
    assert _judged(monkeypatch, [0.4], (1228, 1.0), _known(calls=1228, per_tensor=1.0))[0] == []


def test_the_committed_baseline_has_every_class(host):
    judge = module("judge")
    baseline = judge.load(ROOT / "bench" / "baselines" / "host.json")
    assert set(baseline["rows"]) == {f"{c.name} {mode}" for c in host.CASES for mode in host.MODES}


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_calls_of_a_step_do_not_depend_on_the_number_of_tensors(host, name):
    """The figure itself, which is the same on any machine: a loop over tensors fails here too."""
    (case,) = [case for case in host.CASES if case.name == name]
    baseline = module("judge").load(ROOT / "bench" / "baselines" / "host.json")
    for mode, per_tensor in (("still", 0.0), ("moved", 1.0)):
        count, found = host.calls(case, mode)
        assert found == per_tensor
        # Of 60 tensors instead of 1,000.
        expected = baseline["rows"][f"{name} {mode}"]["calls"] - 940 * per_tensor
        assert 0.7 * expected < count < 1.3 * expected


def test_a_loop_over_tensors_shows(host, monkeypatch):
    case = host.CASES[-1]

    def looping(self, count):
        optimizer = original(self, count)
        step = optimizer.step
        params = optimizer.param_groups[0]["params"]
        optimizer.step = lambda: (step(), [p.numel() for p in params])
        return optimizer

    original = host.Case.ours
    monkeypatch.setattr(host.Case, "ours", looping)
    assert host.calls(case, "still")[1] == 1.0


def test_a_loss_for_each_tensor_shows(host, monkeypatch):
    """A planted loss of 10 us a tensor, which a busy machine does not hide from one attempt."""
    judge = module("judge")
    monkeypatch.setattr(judge, "measure_afresh", lambda *which: host.measure(*which, rounds=20))
    monkeypatch.setattr(judge, "MODES", ("still",))
    monkeypatch.setattr(judge, "ATTEMPTS", 1)

    def slow(self, count):
        optimizer = original(self, count)
        step = optimizer.step

        def slow_step():
            step()
            end = time.perf_counter() + 1e-5 * count
            while time.perf_counter() < end:
                pass

        optimizer.step = slow_step
        return optimizer

    original = host.Case.ours
    monkeypatch.setattr(host.Case, "ours", slow)
    baseline = judge.load(ROOT / "bench" / "baselines" / "host.json")
    (row,) = judge.check(baseline, [case for case in host.CASES if case.name == "AdamW"])
    assert any("of torch fused's time" in complaint for complaint in row["slower"])


def test_a_step_that_launches_nothing_is_not_timed(host, monkeypatch):
    monkeypatch.setattr(host.Case, "ours", lambda self, count: self.theirs(count))
    with pytest.raises(RuntimeError, match="one launch of everything"):
        host.measure(host.CASES[0], "still", rounds=1)


def test_a_recorded_baseline_is_read_and_met(host, monkeypatch, tmp_path):
    judge = module("judge")
    monkeypatch.setattr(judge, "measure_afresh", lambda *_: 0.25)
    path = tmp_path / "x" / "host.json"
    judge.save(path, judge.record(host.CASES[:1]))
    assert [row["slower"] for row in judge.check(judge.load(path), host.CASES[:1])] == [[], []]
    with pytest.raises(ValueError, match="no RMSprop still"):
        judge.check(judge.load(path), host.CASES)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2, "rows": {}}', "[]"])
def test_a_file_that_is_no_baseline_is_named(text, tmp_path, capsys):
    path = tmp_path / "host.json"
    path.write_text(text)
    assert module("__main__").main(["host", "--baseline", str(path)]) == 2
    printed = capsys.readouterr()
    assert "host.json is no baseline" in printed.err and not printed.out


def test_the_command(monkeypatch, capsys, tmp_path):
    judge = module("judge")
    path = tmp_path / "host.json"
    judge.save(path, {"schema": 1, **_known()})
    rows = [
        {"class": "AdamW", "mode": "still", "against": "fused", "ratio": 0.7, "baseline_ratio": 0.4,
         "calls": 228, "calls_a_tensor": 0.0, "baseline_calls": 228, "baseline_calls_a_tensor": 0.0,
         "slower": []}
    ]  # fmt: skip
    monkeypatch.setattr(judge, "check", lambda *_, **__: rows)
    main = module("__main__").main
    assert main(["host", "--baseline", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slower"] == 0
    rows[0]["slower"] = ["much more"]
    assert main(["host", "--baseline", str(path)]) == 1
    assert "much more" in capsys.readouterr().out
