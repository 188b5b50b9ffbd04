"""The benchmark of per-sample squares at tiny size: what is timed is right, and what is written."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ["4x1x24x16", "4x5x24x16", "3x16x8x20"]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.per_sample.{name}")


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the benchmark in this process; return its exit status and what its JSON says."""
    status = module("__main__").main([*arguments, "--quick", "--out", str(folder)])
    return status, json.loads((folder / "per_sample.json").read_text())


def replace(monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[..., Any]) -> None:
    contenders = module("contenders").CONTENDERS
    monkeypatch.setitem(contenders, name, dataclasses.replace(contenders[name], prepare=prepare))


def test_linear(tmp_path: Path) -> None:
    status, result = run(tmp_path, "linear", "--types", "bf16", "fp32")
    assert status == 0 and result["failed"] == []
    assert (tmp_path / "per_sample.png").read_bytes().startswith(b"\x89PNG")
    assert not result["measurement"] and "tiny" in result["note"]
    assert result["environment"]["device"] and result["environment"]["torch"] == torch.__version__
    cases = [(case["shape"], case["arithmetic"]) for case in result["linear"]]
    assert cases == [(shape, kind) for kind in ("bf16", "fp32") for shape in SHAPES]
    for case in result["linear"]:
        everyone = set(module("contenders").CONTENDERS)
        assert set(case["contenders"]) == everyone - (
            {"backpack_ordered"} if case["length"] == 1 else set()
        )
        for name, entry in case["contenders"].items():
            assert entry["status"] == "measured" and entry["source"], name
            assert len(entry["milliseconds"]) == result["settings"]["repetitions"]
            assert min(*entry["milliseconds"], entry["ratio"], *entry["ratio_quartiles"]) > 0
            parts = {"gradient"} if name == "plain" else {"gradient", "squares"}
            assert set(entry["distance"]) == parts, name
            assert entry["peak_bytes"] is None, "memory is counted on GPUs alone"
        assert case["contenders"]["plain"]["ratio"] == 1.0
    assert result["aims"] and all(aim["holds"] is None for aim in result["aims"])


def test_the_pace_is_printed_beside_cublas(tmp_path: Path, capsys: Any) -> None:
    """Catches the time over the plain gradient's, which is the inverse, in the place of a share."""
    _, result = run(tmp_path, "linear", "--types", "bf16", "--shapes", SHAPES[1])
    (case,) = result["linear"]
    printed = capsys.readouterr().out.split("share of cuBLAS ")[1].split("Busy processors")[0]
    assert f" {1 / case['contenders']['fused']['ratio']:.3f} " in printed


def test_layers_of_known_models_can_be_asked_for() -> None:
    """Catches a layer that is left out of the run, or rows and columns that are turned around."""
    main, busy = module("__main__"), module("busy")
    asked = main._settings(main._parse(["linear", "--models"]), "cuda")["shapes"]
    named = {str(shape): names for shape, names in busy.shapes().items()}
    assert asked == list(named)
    assert sorted(name for names in named.values() for name in names) == sorted(
        f"{model} {layer}" for model, (_, weights) in busy.MODELS.items() for layer in weights
    )
    assert named["32x1024x768x3072"] == ["GPT-2 fc"] and named["32x1024x3072x768"] == ["GPT-2 proj"]
    assert named["8x2048x4096x14336"] == ["Llama-3-8B gate, up"]


def test_training(tmp_path: Path) -> None:
    status, result = run(tmp_path, "training")
    assert status == 0 and result["failed"] == []
    step = result["training"]
    assert step["batch"] == 3 and step["ratio"] > 0 and step["parameters"] > 1000
    assert min(*step["with"]["milliseconds"], *step["without"]["milliseconds"]) > 0
    assert step["samples"] == 3, "of the last step alone"
    assert 0 <= step["gradient_distance"]["rms"] < 1e-5


def per_token(x: Any) -> Callable[[], Any]:
    """Return another statistic, which a sum over all tokens of products of squares would be."""
    a, e = x.a.flatten(0, 1), x.e.flatten(0, 1)
    return lambda: (e.t() @ a, (e.float().square().t() @ a.float().square()))


def half_the_batch(x: Any) -> Callable[[], Any]:
    """Return the gradient of fewer samples."""
    a, e = x.a[1:].flatten(0, 1), x.e[1:].flatten(0, 1)
    return lambda: (e.t() @ a, None)


@pytest.mark.parametrize(
    ("name", "prepare", "part"),
    [("materialised", per_token, "squares"), ("plain", half_the_batch, "gradient")],
)
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_different_numbers_fail_the_run(
    name: str,
    prepare: Callable[..., Any],
    part: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(monkeypatch, name, prepare)
    arguments = ("linear", "--types", kind, "--shapes", "4x5x24x16", "3x1x8x8")
    status, result = run(tmp_path, *arguments)
    assert status == 1
    assert f"4x5x24x16 {kind}: {part} of {name} differs" in result["failed"][0]
    # Its times are not reported; a sample of one token is the same either way.
    shapes = [case["shape"] for case in result["linear"]]
    assert shapes == (["3x1x8x8"] if part == "squares" else [])


def test_another_library_that_fails_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(_: Any) -> Any:
        raise AttributeError("no such sampler")

    def late(_: Any) -> Any:
        def broken() -> None:
            raise TypeError("another signature")

        return broken

    contenders = module("contenders").CONTENDERS
    for name, prepare in (("opacus", unknown), ("opacus_fused", late), ("backpack", per_token)):
        foreign = dataclasses.replace(contenders[name], prepare=prepare, source="a library")
        monkeypatch.setitem(contenders, name, foreign)
    status, result = run(tmp_path, "linear", "--types", "fp32", "--shapes", "4x5x24x16")
    assert status == 0 and result["failed"] == []
    found = result["linear"][0]["contenders"]
    reasons = {name: entry["reason"] for name, entry in found.items() if "reason" in entry}
    assert set(reasons) == {"opacus", "opacus_fused", "backpack"}
    assert reasons["opacus"] == "AttributeError: no such sampler"
    assert reasons["opacus_fused"] == "TypeError: another signature"
    assert reasons["backpack"].startswith("squares of backpack differs from ours")
    assert all((entry["status"] == "failed") == (n in reasons) for n, entry in found.items())
    assert "milliseconds" not in found["opacus"] and "milliseconds" in found["vmap"]
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (7, -8)])
def test_ours_is_compared_with_float64(
    place: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the others alone, who may all make the same mistake."""
    right = module("contenders").fused

    def wrong(x: Any) -> Callable[[], Any]:
        gradient, squares = right(x)()
        squares[place] *= 1.1
        return lambda: (gradient, squares)

    for name in module("contenders").CONTENDERS:
        if name != "plain":
            replace(monkeypatch, name, wrong)
    status, result = run(tmp_path, "linear", "--types", "fp32", "--shapes", "4x5x24x20")
    assert status == 1 and result["linear"] == []
    assert "squares of fused differs from float64" in result["failed"][0]


def test_observed_gradients_that_differ_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = module("training").Training
    backward = training.backward

    def scaled(self: Any, codes: torch.Tensor) -> torch.Tensor:
        loss = backward(self, codes)
        if self.statistics is not None:
            self.model.norm.weight.grad *= 1.001
            self.statistics.rescale(1.0)
        return loss

    monkeypatch.setattr(training, "backward", scaled)
    status, result = run(tmp_path, "training")
    assert status == 1 and result["training"] is None
    assert "gradient of norm.weight differs" in result["failed"][0]


def test_one_wrong_element_is_seen() -> None:
    correctness, cases = module("correctness"), module("cases")
    wanted = torch.randn(256, 256)
    for kind, arithmetic in cases.ARITHMETIC.items():
        correctness.check("it", wanted * (1 + arithmetic.unit), wanted, kind, arithmetic)
        # Not enough to be seen in the mean.
        least = correctness.MAXIMUM * correctness.RMS[kind] * arithmetic.unit
        for wrong in (2 * least, float("nan")):
            found = wanted.clone()
            found[3, 7] += wrong
            with pytest.raises(correctness.Mismatch):
                correctness.check("it", found, wanted, kind, arithmetic)


def test_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(_: Any) -> Any:
        raise torch.OutOfMemoryError("prepared")

    def late(_: Any) -> Any:
        def full() -> None:
            raise torch.OutOfMemoryError("run")

        return full

    replace(monkeypatch, "vmap_backward", at_once)
    replace(monkeypatch, "backpack", late)
    status, result = run(tmp_path, "linear", "--types", "fp32", "--shapes", "4x5x24x16")
    assert status == 0
    found = result["linear"][0]["contenders"]
    unfit = [name for name, entry in found.items() if entry["status"] == "does not fit"]
    assert unfit == ["vmap_backward", "backpack"]
    assert "milliseconds" not in found["backpack"] and "milliseconds" in found["backpack_ordered"]


def test_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    training = module("training")

    def measured(_: Any, batch: int, *__: Any) -> dict[str, Any]:
        if batch > 5:
            raise torch.OutOfMemoryError
        return {"ratio": 1.0}

    monkeypatch.setattr(training, "_measure", measured)
    settings = {"device": "cpu", "batch": 32}
    assert training.measure(training.gpt.TINY, settings, lambda: None)["batch"] == 4


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = module("__main__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Else a mistake here would be the whole benchmark on the CPU.
    monkeypatch.setattr(main, "run", lambda *_: 0)
    assert main.main(["--out", str(tmp_path / "new")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_functions_are_measured_in_turn() -> None:
    clock = importlib.import_module("bench.harness.clock")
    called: list[str] = []

    class Watch:
        def hide(self, functions: Any) -> None:
            assert list(functions) == ["a", "b"]

        def measure(self, function: Callable[[], None]) -> tuple[float, float]:
            called.append("time")
            function()
            return 1.0, 2.0

    functions = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = clock.in_turn(functions, Watch(), rounds=2, seconds=9.0)
    assert called == ["time", "a", "time", "b"] * 2
    assert times == {"a": [(1.0, 2.0)] * 2, "b": [(1.0, 2.0)] * 2}
    # Whoever has used up the time is measured no more, but a few times in any case.
    times = clock.in_turn(functions, Watch(), rounds=50, seconds=-1.0, least=3)
    assert [len(measured) for measured in times.values()] == [3, 3]


def test_ratios_are_within_rounds() -> None:
    clock = importlib.import_module("bench.harness.clock")
    ours, theirs = (clock.summary([(t, 0.0) for t in times]) for times in ([2, 4, 9], [1, 2, 3, 8]))
    assert ours["median"] == 4 and ours["quartiles"] == [3, 6.5]
    found = clock.ratio(ours, theirs)
    # Of the pairs 2, 2 and 3; the medians' would be 1.6, outside of its own quartiles.
    assert found == {"ratio": 2, "ratio_quartiles": [2, 2.5]}


def test_aims() -> None:
    aims = module("aims").aims
    elements = 4096 * 4096

    def case(length: int, ratio: float, more: int) -> dict[str, Any]:
        ours = {"ratio": ratio, "peak_bytes": 2 * elements + more}
        found = {"plain": {"peak_bytes": 2 * elements}, "fused": ours}
        facts = {"shape": "s", "arithmetic": "bf16", "length": length, "contenders": found}
        return facts | {"inputs": 4096, "outputs": 4096}

    squares = 4 * elements
    cases = [case(1, 2.1, squares), case(64, 9.0, 5 * elements), case(256, 1.1, squares)]
    step = {"ratio": 1.2, "parameters": elements}
    step |= {name: {"peak_bytes": 10} for name in ("with", "without")}
    result = {"measurement": True, "linear": cases, "training": step}
    holds = [aim["holds"] for aim in aims(result)]
    assert holds == [False, True, False, True, True, False, True]
    assert aims(result)[1]["measured"] == 4.0
    assert {aim["holds"] for aim in aims(result | {"measurement": False})} == {None}


def test_gpt_is_gpt_2_small() -> None:
    gpt = importlib.import_module("bench.harness.gpt")
    with torch.device("meta"):
        model = gpt.GPT(gpt.Size(tied=True))
    # GPT-2's 124,439,808 (Radford et al., 2019, as published) and 47 more tokens.
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 47 * 768
    assert model.tokens.weight is model.head.weight
    size = gpt.TINY
    codes = torch.zeros(2, size.length, dtype=torch.int64)
    assert gpt.GPT(size)(codes).shape == (2, size.length, size.vocabulary)


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    main = module("__main__")
    options = main._parse(["--shapes", "2x3x4x5", "--layers", "3", "--tied"])
    settings = main._settings(options, "cuda")
    assert settings["shapes"] == ["2x3x4x5"] and settings["types"] == ["bf16", "tf32", "fp32"]
    assert settings["size"]["layers"] == 3 and settings["size"]["tied"]
    assert settings["size"]["length"] == 1024 and settings["batch"] == 32
    folder = main._folder("NVIDIA H100 80GB HBM3", quick=False)
    assert folder == ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "per_sample"
    for wrong in (["--shapes", "3x4"], ["--shapes", "0x1x1x1"], ["lineal"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            main._parse(wrong)
    assert "batch x length x inputs x outputs" in capsys.readouterr().err
