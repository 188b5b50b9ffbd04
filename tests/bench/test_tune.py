"""Tuning: what is tried and ruled out, what counts as faster, and what is written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedopt.backends import triton as backend
from fusedopt.kernels import launch_config
from fusedopt.kernels.launch_config import LaunchConfig
from fusedopt.kernels.rules import ADAM, REGISTRY

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = launch_config.default(aligned=True)


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.tune.{name}")


def entry(rule: str = "Adam", types: str = "fp32"):
    return module("candidates").work(REGISTRY[rule], types)[0]


@pytest.mark.parametrize("key", ["fp64", "fp32", "bf16", "fp32/bf16/fp32/fp32"])
def test_every_candidate_is_valid_and_none_is_the_default(key):
    found = module("candidates").candidates(key)
    assert len(found) > 8 and len(set(found)) == len(found) and DEFAULT not in found
    for candidate in found:
        candidate.check(key)
    narrowest = min(launch_config.SIZES[name] for name in key.split("/"))
    least = min(candidate.block * narrowest / candidate.threads for candidate in found)
    # As many threads as there can be are tried, and no more.
    assert least == 16


def test_an_entry_is_for_all_option_sets_of_its_types():
    for rule in REGISTRY.values():
        variants = {(rule.options(g), len(rule.states(g))) for g in rule.example_groups}
        (uniform,) = module("candidates").work(rule, "fp64")
        assert {(o, len(d) - 1 - len(rule.degrees)) for o, d in uniform.options} == variants
        assert len(uniform.dtypes) == max(len(dtypes) for _, dtypes in uniform.options)


def test_mixed_types_have_the_keys_that_launches_look_up():
    entries = module("candidates").work(REGISTRY["RMSprop"], "bf16+fp32-states")
    keys = {entry.key for entry in entries}
    assert keys == {"/".join(["bf16"] * 2 + ["fp32"] * n) for n in (1, 2, 3)}
    (one,) = module("candidates").work(REGISTRY["BatchDecoupledAdam"], "bf16")[:1]
    assert one.dtypes[:4] == ("bf16", "bf16", "fp32", "bf16")


def _rounds(*, ratio: float, noise: float, rounds: int = 20) -> tuple[list[float], list[float]]:
    """Times of a candidate and of the default, on a machine that drifts and is noisy."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.linspace(1.0, 1.5, rounds)
    shake = torch.randn(2, rounds, generator=generator) * noise
    default = drift * (1 + shake[0])
    candidate = ratio * drift * (1 + shake[1])
    return candidate.tolist(), default.tolist()


@pytest.mark.parametrize(
    ("ratio", "noise", "chosen"),
    [
        (0.90, 0.01, True),
        (0.90, 0.0, True),
        # Better by the median alone: the noise is larger.
        (0.96, 0.05, False),
        (0.992, 0.0, False),
        (1.0, 0.05, False),
        (1.2, 0.01, False),
    ],
)
def test_a_winner_beats_the_default_by_more_than_the_noise(ratio, noise, chosen):
    candidate, default = _rounds(ratio=ratio, noise=noise)
    times = {"1024/128": default, "2048/256": candidate}
    assert module("choose").winner(times, "1024/128") == ("2048/256" if chosen else None)


def test_ratios_are_of_the_same_rounds():
    """A drift as large as this hides a tenth from medians of each."""
    default = [1.0, 2.0, 3.0, 4.0]
    candidate = [0.9 * x for x in default]
    found = module("choose").against(candidate, default)
    assert found.median == pytest.approx(0.9) and found.quartiles == pytest.approx((0.9, 0.9))


def test_the_fastest_of_the_winners_is_chosen():
    times = {"d": [1.0] * 5, "a": [0.9] * 5, "b": [0.8] * 5, "c": [2.0] * 5, "e": [0.95] * 5}
    choose = module("choose")
    assert choose.winner(times, "d") == "b"
    assert choose.finalists(times, "d") == ["b", "a", "e"]


def test_updates_run_in_the_launch_config_that_is_tried(monkeypatch):
    trial = module("trial")
    seen = []
    monkeypatch.setattr(
        backend,
        "launch",
        lambda kernel, programs, threads, *_, **meta: seen.append(
            (programs, threads, meta["BLOCK"], meta["ALIGNED"])
        ),
    )
    tensors = trial.Trial(entry(), [4096, 5], torch.device("cpu"))
    tensors.update(LaunchConfig(2048, 256))()
    tensors.update(DEFAULT)()
    assert seen == [(3, 256, 2048, True), (5, DEFAULT.threads, DEFAULT.block, True)]
    # What was forced is over.
    assert launch_config.update_launch_config("", "Adam", ("fp32",) * 4, True) == DEFAULT


@pytest.mark.parametrize("rule", ["SGD", "BatchDecoupledAdam"])
def test_results_do_not_depend_on_the_launch_config(rule, device):
    assert module("trial").differs(entry(rule), LaunchConfig(512, 64), device) is None


@pytest.mark.parametrize("wrong", ["tail", "nothing"])
def test_a_launch_config_with_other_results_is_seen(wrong, device, monkeypatch):
    launch = backend.launch

    def broken(kernel, programs, threads, *arguments, **meta):
        if meta["BLOCK"] != DEFAULT.block:
            if wrong == "nothing":
                return
            # Of the last tensor, which is less than a chunk.
            programs -= programs > 1
        launch(kernel, programs, threads, *arguments, **meta)

    monkeypatch.setattr(backend, "launch", broken)
    difference = module("trial").differs(entry("SGD"), LaunchConfig(512, 64), device)
    assert difference is not None and "are not the default's" in difference


def test_a_default_that_does_nothing_is_no_standard(device, monkeypatch):
    monkeypatch.setattr(backend, "launch", lambda *_, **__: None)
    difference = module("trial").differs(entry("SGD"), LaunchConfig(512, 64), device)
    assert difference == "the default changes nothing"


def _tuned(monkeypatch, device, seconds, ruled_out=()):
    """Tune with a clock that says what each takes; return the result and what was timed."""
    tuning = module("tuning")
    some = [LaunchConfig(*one) for one in ((512, 64), (2048, 128), (2048, 256), (4096, 128))]
    monkeypatch.setattr(tuning, "candidates", lambda key: some)
    timed = []

    def measure(functions, rounds):
        timed.append(list(functions))
        for update in functions.values():
            update()
        return {name: [seconds.get(name, 1.0)] * rounds for name in functions}

    def unfit(entry, candidate):
        return ["8 bytes of stack"] if f"{candidate.block}/{candidate.threads}" in ruled_out else []

    found = tuning.tune(entry("SGD"), device, unfit, measure, elements=2048)
    return found, timed


def test_the_search(monkeypatch, device):
    times = {"2048/128": 0.5, "2048/256": 0.8, "4096/128": 0.9, "512/64": 1.3}
    found, timed = _tuned(monkeypatch, device, times, ruled_out=["2048/128"])
    default = f"{DEFAULT.block}/{DEFAULT.threads}"
    # What is ruled out is never run, and the final is of the fastest and the default.
    assert timed[0] == [default, "512/64", "2048/256", "4096/128"]
    assert timed[1][:3] == [default, "2048/256", "4096/128"]
    assert found["tried"]["2048/128"] == {"ruled_out": "8 bytes of stack"}
    assert found["chosen"] == {"name": "2048/256", "block": 2048, "threads": 256, "ratio": 0.8}
    assert _tuned(monkeypatch, device, {})[0]["chosen"] is None


def test_a_wrong_result_rules_out(monkeypatch, device):
    tuning = module("tuning")
    monkeypatch.setattr(
        tuning, "differs", lambda entry, one, device: "wrong" if one.block == 2048 else None
    )
    found, timed = _tuned(monkeypatch, device, {"2048/256": 0.1})
    assert found["chosen"] is None and not any("2048" in name for name in timed[0])
    assert found["tried"]["2048/256"] == {"ruled_out": "wrong"}


ORIGIN = {"device": "a GPU", "torch": "2", "commit": "abc", "date": "2030-01-01"}


def test_what_is_written_is_what_launches_read(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(launch_config, "TUNED", path)
    old = {"architecture": "cuda:90", "rule": "SGD", "types": "fp32", "block": 4096, "threads": 64}
    launch_config.save(path, [old, {**old, "rule": "Adam"}, {**old, "architecture": "cuda:80"}])
    result = {
        "rule": "SGD", "types": "fp32", "elements": 4,
        "chosen": {"block": 2048, "threads": 256, "ratio": 0.87654321},
    }  # fmt: skip
    write = module("tuning").write
    look = launch_config.update_launch_config
    try:
        assert write(path, [result], "cuda:90", ORIGIN) == 1
        fp32 = ("fp32",) * 3
        assert look("cuda:90", "SGD", fp32, True) == LaunchConfig(2048, 256)
        # What was not tuned now stays.
        assert look("cuda:80", "SGD", fp32, True) == LaunchConfig(4096, 64)
        assert look("cuda:90", "Adam", fp32, True) == LaunchConfig(4096, 64)
        (written,) = [e for e in launch_config.load(path) if e.get("commit")]
        assert written["ratio"] == 0.8765 and written["device"] == "a GPU"
        # Where the default is best now, an older entry goes.
        assert write(path, [{**result, "chosen": None}], "cuda:90", ORIGIN) == 0
        assert look("cuda:90", "SGD", fp32, True) == DEFAULT
        assert look("cuda:80", "SGD", fp32, True) == LaunchConfig(4096, 64)
    finally:
        launch_config._tuned.cache_clear()


SCRIPT = """
import json
from bench.tune import candidates
from fusedopt.kernels.launch_config import LaunchConfig
tried = [LaunchConfig(*one) for one in ((2048, 256), (4096, 64), (1024, 128))]
if __name__ == "__main__":
    candidates.candidates = lambda key: tried
    found = candidates.complaints("Adam", "fp32", "cuda:90")
    print(json.dumps([found["fp32", one] for one in tried]))
"""


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )


def test_what_spills_is_ruled_out(tmp_path):
    # A file: the processes that compile read it, too.
    (tmp_path / "script.py").write_text(SCRIPT)
    done = _python(str(tmp_path / "script.py"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    wide, spilling, default = json.loads(done.stdout)
    assert wide == [] and default == []
    # In each of Adam's option sets.
    sets = {ADAM.options(group) for group in ADAM.example_groups}
    assert sum("stack" in complaint for complaint in spilling) == len(sets)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = _python("-m", "bench.tune", "--write", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "needs a GPU" in done.stderr and not done.stdout


@pytest.mark.parametrize("arguments", [["--rule", "Adagrad"], ["--elements", "0"]])
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        module("__main__").main(arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(monkeypatch, capsys):
    """At a size that measures nothing: every step of the search runs, and nothing is written."""
    candidates = module("candidates")
    monkeypatch.setattr(candidates, "BLOCKS", (1024, 2048))
    monkeypatch.setattr(candidates, "THREADS", (128, 256))
    before = launch_config.TUNED.read_text()
    arguments = ["--rule", "SGD", "--types", "fp32", "--elements", "100000", "--json"]
    assert module("__main__").main(arguments) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert len(result["tried"]) == 4 and result["tried"][result["default"]]["ratio"] == 1.0
    assert not any("elements are not" in x.get("ruled_out", "") for x in result["tried"].values())
    assert launch_config.TUNED.read_text() == before
