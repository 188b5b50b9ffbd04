"""The demo command at a reduced size: what it prints and writes, and when it fails."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt.__main__ import main
from fusedopt.cli import demo, demo_kernels, demo_runs
from fusedopt.examples import char_gpt

QUICK = ("--device", "cpu", "--size", "tiny", "--steps", "8")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user does: without the interpreter mode that the tests switch on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of our own, with characters outside ASCII and what rich would take for markup."""
    file = tmp_path_factory.mktemp("text") / "own.txt"
    file.write_text("[bold]Grüße an die Welt[/], 中文, \U0001f600!\n" * 40, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, bytes]:
    """What one whole run prints, its JSON file and its picture."""
    out = tmp_path_factory.mktemp("demo") / "made" / "for it"
    done = run_python("-m", "fusedopt", "demo", *QUICK, "--seed", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "demo.json").read_text()), (out / "demo.png").read_bytes()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the last part, which starts a process."""
    monkeypatch.setattr(demo, "kernel_step", lambda *_: {"ok": None, "not_run": "left out"})


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, most of what a run of this size takes."""
    monkeypatch.setattr(demo.demo_report, "draw", lambda *_: None)


def test_tables_show_both_runs(shown: tuple[str, dict, bytes]) -> None:
    printed, result, _ = shown
    for run in result["runs"].values():
        assert f"{run['losses'][-1]:.6f}" in printed
        assert f"{run['held_out_loss']:.6f}" in printed
        assert f"{run['step_ms']:.3f}" in printed
    assert "Backend: reference (the tensors are on the CPU" in printed
    assert "Runs agree" in printed
    assert "Kernels agree with the reference in Triton's interpreter" in printed
    assert re.search(r"moves parameters by up to \S+ ulps\)", printed)
    # Catches traffic that is said to be the same for both optimizers.
    assert "at least" not in printed and "the least to read and write" in " ".join(printed.split())
    assert "read and write three times as much, 84 bytes" in printed


def test_runs_agree_and_learn(shown: tuple[str, dict, bytes]) -> None:
    _, result, _ = shown
    ours, theirs = result["runs"]["fusedopt"], result["runs"]["torch"]
    assert result["ok"] and result["agreement"]["ok"]
    assert len(ours["losses"]) == len(theirs["losses"]) == result["steps"] == 8
    # Starting near a uniform guess, and falling.
    assert abs(ours["losses"][0] - math.log(result["text"]["vocabulary"])) < 0.7
    assert ours["losses"][-1] < ours["losses"][0] - 0.3
    assert result["text"]["source"] == "the Python language reference"


def test_cost_counts_every_state(shown: tuple[str, dict, bytes]) -> None:
    _, result, _ = shown
    for run in result["runs"].values():
        # Two float32 moments, and a step count of 4 bytes for each of 17 tensors.
        assert run["state_bytes_per_parameter"] == 8 + 17 * 4 / result["parameters"]
        assert run["least_traffic_per_parameter"] == 28
        assert run["step_ms"] > 0


def test_kernels_are_compared_on_all_parameters(shown: tuple[str, dict, bytes]) -> None:
    _, result, _ = shown
    kernels = result["kernels"]
    assert kernels["ok"] and kernels["interpreted"]
    assert kernels["parameters"] == result["parameters"]
    assert kernels["programs"] >= kernels["tensors"] == 17
    assert kernels["worst_ulps"] <= kernels["tolerance_ulps"] < kernels["update_ulps"]


def test_updates_are_measured_by_layer(shown: tuple[str, dict, bytes]) -> None:
    """Catches norms of other steps, layers that lack one, and parameters counted one by one."""
    ratios = shown[1]["update_ratios"]
    model = char_gpt.CharGPT(shown[1]["text"]["vocabulary"], **demo_runs.SIZES["tiny"])
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert ratios["steps"] == list(range(1, 9)) and set(ratios["layers"]) == layers
    assert all(len(values) == 8 for values in ratios["layers"].values())
    # AdamW's first steps are about as long as the learning rate, 6e-3, and a gain begins as 1.
    assert 1e-3 < ratios["layers"]["body.0.mlp_norm"][1] < 2e-2
    assert all(1e-5 < value < 1.0 for own in ratios["layers"].values() for value in own)


def test_picture_is_a_png_with_content(shown: tuple[str, dict, bytes]) -> None:
    _, _, picture = shown
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 800 and height >= 600
    assert len(picture) > 10_000  # an empty canvas of this size compresses to 3 kB


def test_json_is_all_that_is_printed(
    tmp_path: Path,
    text_file: Path,
    no_kernels: None,
    no_picture: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["demo", *QUICK, "--json", "--text", str(text_file), "--out", str(out)]
    assert main(command) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    text = text_file.read_text(encoding="utf-8")
    assert result["text"] == {
        "source": str(text_file),
        "characters": len(text),
        "vocabulary": len(set(text)),
    }
    assert set(result["sample"]) <= set(text)
    assert result == json.loads((out / "demo.json").read_text())


def test_same_seed_same_losses(tmp_path: Path, no_kernels: None, no_picture: None) -> None:
    losses = []
    for seed in ("1", "1", "2"):
        assert main(["demo", *QUICK, "--json", "--seed", seed, "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "demo.json").read_text())
        losses.append(result["runs"]["fusedopt"]["losses"])
    assert losses[0] == losses[1] != losses[2]


def test_sample_is_not_read_as_markup(
    tmp_path: Path, no_kernels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text_file = tmp_path / "markup.txt"
    text_file.write_text("[/]" * 200)
    assert main(["demo", *QUICK, "--text", str(text_file), "--out", str(tmp_path)]) == 0
    assert "written by the fusedopt run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "parameters", "ok"),
    [
        (([2.0, 1.0], [2.0, 1.0]), (1.0, 1.0), True),
        (([2.0, 1.0], [2.0, 1.0 + 5e-5]), (1.0, 1.0005), True),
        (([2.0, 1.0], [2.0 + 2e-4, 1.0]), (1.0, 1.0), False),
        (([2.0, 1.0], [2.0, 1.0]), (1.0, 1.002), False),
        (([2.0, math.nan], [2.0, 1.0]), (1.0, 1.0), False),
        (([math.nan, 2.0], [1.0, 2.0]), (1.0, 1.0), False),
        (([2.0, 1.0], [2.0, 1.0]), (1.0, math.nan), False),
        (([2.0, math.inf], [2.0, math.inf]), (1.0, 1.0), False),
    ],
)
def test_agreement(
    losses: tuple[list[float], list[float]], parameters: tuple[float, float], ok: bool
) -> None:
    ours, theirs = ([torch.tensor([0.5]), torch.tensor([p, 0.0])] for p in parameters)
    assert demo_runs.agreement(losses, (ours, theirs)).ok is ok


def test_an_optimizer_that_is_slightly_off_fails(
    tmp_path: Path,
    no_kernels: None,
    no_picture: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Off(fusedopt.AdamW):
        def __init__(self, params, lr: float, **options) -> None:
            super().__init__(params, lr=1.001 * lr, **options)

    monkeypatch.setattr(fusedopt, "AdamW", Off)
    assert main(["demo", *QUICK, "--out", str(tmp_path)]) == 1
    assert "Runs DISAGREE" in capsys.readouterr().out


def test_a_run_that_diverges_fails_with_strict_json(
    tmp_path: Path, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo_runs.ADAMW, "lr", math.inf)
    assert main(["demo", *QUICK, "--out", str(tmp_path)]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads((tmp_path / "demo.json").read_text(), parse_constant=refuse)
    assert result["runs"]["torch"]["losses"][-1] is None


def test_kernels_that_fail_fail_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise demo_kernels.KernelError("in the interpreter: broken")

    monkeypatch.setattr(demo_kernels, "compare_in_interpreter", fail)
    assert main(["demo", *QUICK, "--out", str(tmp_path)]) == 1
    assert "Kernels: FAILED in the interpreter: broken." in capsys.readouterr().out


@pytest.mark.parametrize("module", ["triton", "numpy"])
def test_kernels_that_cannot_run_do_not_fail_the_demo(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == module else find_spec(n)
    )
    assert main(["demo", *QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.lower()
    assert f"kernels: not run ({module}" in printed and "is not installed)." in printed
    # Catches a check that is reported as passed and did not run.
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["ok"] is True and result["kernels"]["ok"] is None


def test_a_failing_process_is_reported_in_one_line() -> None:
    with pytest.raises(demo_kernels.KernelError, match="in the interpreter: KeyError") as raised:
        demo_kernels.compare_in_interpreter({})
    assert "\n" not in str(raised.value)


def test_snapshot_is_not_changed_by_the_steps() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.3)
    parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    moment = optimizer.state[parameter]["exp_avg"].clone()
    value = parameter.detach().clone()
    # conftest switched the interpreter on, so both backends run here.
    step = demo_kernels.compare_backends(demo_kernels.snapshot(optimizer))
    assert step.ok and step.parameters == 3 and step.programs == 1
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    assert torch.equal(parameter, value)


def test_a_kernel_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.3)
    parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    monkeypatch.setattr(fusedopt.AdamW, "step", lambda self: None)
    assert not demo_kernels.compare_backends(demo_kernels.snapshot(optimizer)).ok


def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path,
    no_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", *QUICK, "--out", str(tmp_path)]) == 0
    assert "No PNG: matplotlib is not installed." in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "--text nowhere.txt: No such file or directory"),
        (("--text", "."), "--text .: Is a directory"),
        (("--text", "small.txt"), "small.txt: 169 characters of text; 170 are needed"),
        (("--text", "latin.txt"), "--text latin.txt is not UTF-8: "),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be between 0 and 2**63 - 1, got -1"),
        (("--device", "abacus"), "--device abacus cannot be used: "),
        (("--device", "meta"), "--device meta cannot be used: "),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used: "),
        (("--out", "latin.txt"), "--out latin.txt: File exists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("a" * 169)
    Path("latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert main(["demo", *QUICK, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"demo: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("optimizer", ["fusedopt", "torch"])
def test_example_trains_on_its_own(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(char_gpt.torch.cuda, "is_available", lambda: False)
    # The class is built with backend="auto", which here would be the slow interpreter.
    monkeypatch.setattr(fusedopt, "AdamW", lambda *a, **k: _reference(*a, **k))
    monkeypatch.setattr(sys, "argv", ["char_gpt.py", "--optimizer", optimizer, "--steps", "50"])
    char_gpt.main()
    assert "step   50  " in capsys.readouterr().out


_AdamW = fusedopt.AdamW


def _reference(*arguments, **options) -> fusedopt.AdamW:
    return _AdamW(*arguments, **options, backend="reference")


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 40, 200])
def test_learning_rate_rises_and_falls(steps: int) -> None:
    model = char_gpt.CharGPT(5, context=4, width=4, heads=1, layers=1)
    optimizer = torch.optim.SGD(char_gpt.decay_groups(model), lr=2.0)
    rates, decays = [], []

    def note(optimizer, *_) -> None:
        decayed, plain = optimizer.param_groups
        rates.append(decayed["lr"])
        decays.append(decayed["weight_decay"])
        assert plain["weight_decay"] == 0.0

    optimizer.register_step_pre_hook(note)
    batches = itertools.repeat(torch.zeros(1, 5, dtype=torch.int64))
    assert len(list(char_gpt.train(model, optimizer, batches, steps))) == len(rates) == steps
    top = rates.index(max(rates))
    assert 1.9 < rates[top] <= 2.0 and top <= steps // 20
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.08)
    # Catches a decay that stays, or falls from what it has fallen to.
    assert decays[0] == 0.1 and decays == sorted(decays, reverse=True)
    middle = 0.5 * (0.1 + 0.004)
    assert decays[steps // 2] == pytest.approx(middle if steps > 1 else 0.1, abs=0.1 / steps)


def test_model_cannot_see_the_future() -> None:
    model = char_gpt.CharGPT(11, context=8, width=16, heads=2, layers=2)
    codes = torch.arange(8)[None]
    changed = codes.clone()
    changed[0, 5] = 10
    before, after = model(codes), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_windows_reach_both_ends_of_the_text() -> None:
    codes = torch.arange(7)
    drawn = next(char_gpt.windows(codes, context=4, batch=200, seed=0))
    assert drawn[:, 0].unique().tolist() == [0, 1, 2]
    assert torch.equal(drawn - drawn[:, :1], torch.arange(5).expand(200, 5))


def test_encoding_holds_out_the_last_tenth() -> None:
    text = "ab\U0001f600é" * 10
    characters, codes, held_out = char_gpt.encode(text, context=3)
    assert "".join(characters[c] for c in torch.cat([codes, held_out]).tolist()) == text
    assert len(held_out) == 4


def test_language_reference_holds_out_unseen_paragraphs() -> None:
    paragraphs = char_gpt.read_text().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000
