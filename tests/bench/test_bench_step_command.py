"""The benchmark's command: what runs, what is written, and what is said where something is not."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fusedopt import __main__ as cli
from fusedopt.cli import bench

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name}")


def result_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything but the rows that other tests run, once."""
    folder = tmp_path_factory.mktemp("quick")
    arguments = ["--rule", "AdamW", "--types", "fp32", "--types", "bf16"]
    status = cli.main(["bench", "--quick", "--device", "cpu", "--out", str(folder), *arguments])
    result = result_in(folder)
    assert status == 0 and result["failed"] == []
    return folder, result


def test_files(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, result = quick
    # Some types only: neither this nor what is so tiny replaces another result.
    when = re.sub(r"[-:]|\+.*", "", result["environment"]["date"]).replace("T", "-")
    stem = f"{module('harness.environment').slug(result['environment'])}-quick-partial-{when}"
    names = {f"{stem}{end}" for end in (".json", "-bars.png", "-roofline.png", "-sharded.png")}
    assert {file.name for file in folder.iterdir()} == names
    for name in names - {f"{stem}.json"}:
        assert (folder / name).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("settings", "suffix"),
    [
        ({"set": "core", "partial": False}, ""),
        ({"set": "cpu", "partial": False}, ""),
        ({"set": "full", "partial": False}, "-full"),
        ({"set": "quick", "partial": False}, "-quick"),
        ({"set": "core", "partial": True}, "-partial-20260203-040506"),
        ({"set": "full", "partial": True}, "-full-partial-20260203-040506"),
    ],
)
def test_names_of_files(settings: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    environment = {"device": "A GPU", "commit": "0123456789ab"}
    environment["date"] = "2026-02-03T04:05:06+00:00"
    file = module("step.result").file(tmp_path, {"environment": environment, "settings": settings})
    assert file.json == tmp_path / f"a-gpu-012345678{suffix}.json"


@pytest.mark.parametrize(
    ("changed", "partial"),
    [
        ({}, False),
        ({"parts": ["host"]}, True),
        ({"case": ["gpt2"]}, True),
        ({"rule": ["Adam"]}, True),
        ({"types": ["bf16"]}, True),
        ({"contender": ["fusedopt"]}, True),
        ({"clip": False}, True),
        ({"scaler": True}, True),
        ({"seconds": 3.0}, False),
    ],
)
def test_what_is_only_a_part_of_a_set(changed: dict[str, Any], partial: bool) -> None:
    everything = {"parts": [], "rule": [], "types": [], "contender": [], "clip": None}
    everything |= {"scaler": None, "quick": False}
    chosen = options(Path(), **everything | changed)
    assert module("step.run")._settings(chosen, "cuda", "core")["partial"] is partial


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["bench", "--quick", "--device", "cpu", "--out", str(folder)]) == 2
        assert f"bench: --out {folder}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_what_the_json_says(quick: tuple[Path, dict[str, Any]]) -> None:
    _, result = quick
    assert (result["schema"], result["kind"], result["measurement"]) == (1, "bench", False)
    assert "tiny" in result["note"] and result["settings"]["set"] == "quick"
    environment = result["environment"]
    assert environment["torch"] == torch.__version__ and environment["device"]
    keys = "device driver power_limit_w cuda torch triton python fusedopt commit date capability"
    keys += " uncommitted_changes processors memory_bytes l2_bytes threads"
    assert set(keys.split()) <= set(environment)
    assert result["copy"]["bytes"] > 0 and result["copy"]["gbps"]["median"] > 0
    assert set(result["copy"]["by_case"]) == set(module("step.models").CASES)


def test_rows(quick: tuple[Path, dict[str, Any]]) -> None:
    _, result = quick
    rows = result["rows"]
    assert {row["case"] for row in rows} == set(module("step.models").CASES)
    documented = module("step").__doc__.partition("A row:")[2]
    for row in rows:
        for key in row:
            assert key in documented, key
        assert row["status"] == "measured", row["reason"]
        assert row["device_ms"]["p10"] <= row["device_ms"]["median"] <= row["device_ms"]["p90"]
        assert min(row["host_ms"], row["gbps"], row["percent_of_copy"], row["ratio_to_ours"]) > 0
        assert row["error"]["ulps"] <= row["error"]["bound_ulps"]
        assert row["extra_peak_bytes"] is None, "memory is counted on GPUs alone"
    eager = set(module("step.sets").EAGER)
    found = {(row["contender"], row["clip"]) for row in rows if row["case"] == "odd"}
    assert found == {(name, clip) for name in eager for clip in (False, True)}
    assert any(row["scaler"] for row in rows)


def test_sharded(quick: tuple[Path, dict[str, Any]]) -> None:
    """Catches a step that falls apart into launches, and torch's failing for a measured time."""
    folder, result = quick
    rows = {(r["placement"], r["tensors"], r["contender"]): r for r in result["sharded"]}
    assert {count for _, count, _ in rows} == {4, 12} and len(rows) == 12
    for (placement, _, contender), row in rows.items():
        if contender == "torch-fused" and placement.startswith("three"):
            # torch 2.13 has no norm over several meshes.
            assert row["first_us"] is row["later_us"] is None and row["reason"]
            continue
        # Which is longer is the clock's to say, on a machine that is busy.
        assert row["reason"] is None and min(row["first_us"], row["later_us"]) > 0
        # The norm's two and the update.
        assert row["launches"] == (3 if contender == "fusedopt" else None)
    assert list(folder.glob("*-sharded.png"))


def test_host_and_first_step_and_training(quick: tuple[Path, dict[str, Any]]) -> None:
    _, result = quick
    host = {(r["tensors"], r["gradients"], r["contender"]): r for r in result["host"]}
    assert {key[0] for key in host} == {20, 5}
    ours, fused = (host[20, "moved", name] for name in ("fusedopt", "torch-fused"))
    assert ours["launches"] == 1 and fused["launches"] is None
    assert fused["ratio_to_torch_fused"] == 1.0 == ours["ratio_to_ours"]
    assert ours["ratio_to_torch_fused"] == pytest.approx(
        ours["microseconds"] / fused["microseconds"], rel=1e-5
    )
    firsts = [(row["contender"], row["reason"]) for row in result["first_step"]]
    assert firsts == [("fusedopt", None), ("torch-fused", None)]
    assert all(row["seconds"] > 0 for row in result["first_step"])
    training = {row["contender"]: row for row in result["training"]}
    assert set(training) == {"fusedopt", "torch-fused", "torch-foreach"}
    for row in training.values():
        assert min(row["optimizer_ms"], row["step_ms"], row["tokens_per_second"]) > 0
    assert training["fusedopt"]["ratio"] == 1.0


def test_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "step", "--quick", "--case", "conv", "--rule", "SGD", "--json"]
    arguments += ["--contender", "fusedopt", "--no-clip", "--device", "cpu"]
    arguments += ["--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == result_in(tmp_path)
    # A pair that no set has: it is run nevertheless.
    assert [(r["case"], r["rule"], r["clip"]) for r in printed["rows"]] == [("conv", "SGD", False)]


def test_nothing_to_time_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    external = importlib.import_module("bench.step.external")
    monkeypatch.setattr(external.ExternalLibrary, "reason_missing", lambda self: "not installed")
    arguments = ["bench", "step", "--quick", "--contender", "optimi", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "optimi is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps"], "PART: there is no 'steps', but step, training"),
        (["--case", "gpt3"], "--case: there is no 'gpt3', but gpt2"),
        (["--rule", "Lion"], "--rule: there is no 'Lion'"),
        (["--types", "fp8"], "--types: there is no 'fp8', but fp32, bf16"),
        (["--contender", "apex"], "--contender: there is no 'apex'"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--full", "--device", "cpu"], "--full is for a GPU"),
    ],
)
def test_wrong_names(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [] if "--full" in arguments else ["--quick"]
    assert cli.main(["bench", *quick, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_installed_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err


def options(folder: Path, **changed: Any) -> SimpleNamespace:
    plain = {"parts": ["step"], "out": folder, "set": "core", "quick": True, "case": []}
    plain |= {"rule": ["AdamW"], "types": ["fp32"], "contender": ["fusedopt"], "clip": False}
    plain |= {"scaler": False, "device": "cpu", "seconds": None, "json": False}
    return SimpleNamespace(**plain | changed)


def test_a_run_cut_short_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("step.run")
    measure = run.measure
    calls: list[str] = []

    def interrupted(group: Any, *rest: Any) -> Any:
        calls.append(group.case.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(group, *rest)

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(options(tmp_path))
    assert [row["case"] for row in result_in(tmp_path)["rows"]] == calls[:2]


def test_a_part_that_fails_does_not_take_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module("step.run")

    def broken(*_: Any) -> Any:
        raise ValueError("no reason\nat all")

    monkeypatch.setattr(run, "measure", broken)
    monkeypatch.setattr(run.children, "host", lambda *_: [{"microseconds": 1.0}])
    monkeypatch.setattr(run, "report", lambda *_: None)
    assert run.run(options(tmp_path, parts=["step", "host"])) == 1
    result = result_in(tmp_path)
    assert result["failed"] == ["step: ValueError: no reason"]
    assert result["host"] == [{"microseconds": 1.0}] and result["rows"] == []


def test_a_wrong_step_of_ours_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fusedopt

    monkeypatch.setattr(fusedopt.AdamW, "step", lambda self: None)
    assert module("step.run").run(options(tmp_path, case=["gpt2"])) == 1
    (failure,) = result_in(tmp_path)["failed"]
    assert failure.startswith("gpt2 AdamW fp32: a parameter is")
    assert "FAILED gpt2" in capsys.readouterr().out


def test_brackets_in_a_reason_are_no_markup(
    quick: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = quick
    skipped = {**result["rows"][0], "status": "skipped", "reason": "[/skipped]"}
    step = {"rule": "AdamW", "types": "fp32", "contender": "fusedopt", "seconds": None}
    step |= {"variants_compiled": None, "reason": "[/first]"}
    missing = [{"contender": "optimi", "reason": "[/missing]"}]
    changed = {"rows": [skipped], "first_step": [step], "missing": missing, "failed": ["[/failed]"]}
    module("step.report").report({**result, **changed}, Console())
    printed = capsys.readouterr().out
    assert all(f"[/{word}]" in printed for word in ("skipped", "first", "missing", "failed"))


def test_trainings_that_differ_have_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, run = module("step.training"), module("step.run")
    make = training._optimizer

    def slower(contender: str, *rest: Any) -> Any:
        optimizer = make(contender, *rest)
        if contender == "torch-foreach":
            optimizer.param_groups[0]["lr"] *= 0.1
        return optimizer

    monkeypatch.setattr(training, "TOLERANCE", 1e-4)
    monkeypatch.setattr(run, "report", lambda *_: None)
    alike, apart = tmp_path / "alike", tmp_path / "apart"
    assert run.run(options(alike, parts=["training"])) == 0
    assert len(result_in(alike)["training"]) == 3
    monkeypatch.setattr(training, "_optimizer", slower)
    assert run.run(options(apart, parts=["training"])) == 1
    result = result_in(apart)
    assert result["training"] is None and "losses of torch-foreach" in result["failed"][0]


def test_a_process_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    children = module("step.children")
    with pytest.raises(children.PartFailed, match="exit status 2"):
        children.host(True, ["no such rule"])
    monkeypatch.setattr(children, "LIMIT", 0.01)
    (ours, _) = children.first_steps("cpu", True, [])
    assert ours["seconds"] is None and "took more than" in ours["reason"]


def test_a_first_step_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import fusedopt

    first_step = module("step.first_step")
    right = first_step.measure("fusedopt", "AdamW", "fp32", "cpu", True)
    assert right["seconds"] > 0 and right["variants_compiled"] == 0
    step = fusedopt.AdamW.step

    def twice(self: Any) -> None:
        step(self)
        step(self)

    monkeypatch.setattr(fusedopt.AdamW, "step", twice)
    with pytest.raises(module("step.correctness").Mismatch, match="from float64 after two steps"):
        first_step.measure("fusedopt", "AdamW", "fp32", "cpu", True)


def test_host_times_of_some_contenders() -> None:
    rows = module("step.children").host(True, ["Adam"], ["torch-fused"])
    assert {(row["rule"], row["contender"]) for row in rows} == {
        ("Adam", "fusedopt"),
        ("Adam", "torch-fused"),
    }


def test_contenders_that_are_missing_or_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, external = module("step.run"), module("step.external")
    contenders = module("step.contenders").CONTENDERS

    class Peer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no kernel image\nis available")

    fake = ModuleType("peer_that_breaks")
    fake.AdamW = Peer
    monkeypatch.setitem(sys.modules, "peer_that_breaks", fake)

    def build(found: ModuleType, params: list[Any], row: Any) -> Any:
        return found.AdamW(params)

    broken = external.ExternalLibrary("peer_that_breaks", build)
    absent = external.ExternalLibrary("no_such_library.optim", build)
    monkeypatch.setattr(external, "LIBRARIES", {})
    monkeypatch.setattr(run, "LIBRARIES", {"optimi": broken, "torchao": absent})
    old = contenders["optimi"]
    monkeypatch.setitem(
        contenders, "optimi", type(old)("optimi", "optimi", broken.make, old.bytes_per_parameter)
    )
    names = ["fusedopt", "torch-fused", "optimi", "torchao"]
    chosen = options(tmp_path, case=["gpt2"], rule=["AdamW", "RMSprop"], contender=names)
    assert run.run(chosen) == 0
    result = result_in(tmp_path)
    assert result["missing"] == [{"contender": "torchao", "reason": "not installed"}]
    rows = {(row["rule"], row["contender"]): row for row in result["rows"]}
    assert rows["AdamW", "optimi"]["status"] == "skipped"
    reason = rows["AdamW", "optimi"]["reason"]
    assert reason == "at its first steps: RuntimeError: no kernel image"
    assert rows["RMSprop", "torch-fused"]["reason"] == "torch has no fused RMSprop"
    assert rows["AdamW", "fusedopt"]["status"] == "measured"


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, models = module("step.measure"), module("step.models")
    contenders = module("step.contenders").CONTENDERS

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("asked for 3 GiB")

    old = contenders["torch-foreach"]
    changed = type(old)(old.name, old.title, full, old.bytes_per_parameter)
    monkeypatch.setitem(contenders, "torch-foreach", changed)
    keys = (measure.Key("fusedopt"), measure.Key("torch-foreach"))
    group = measure.Group(models.tiny("gpt2"), "AdamW", "fp32", keys)
    settings = {"device": "cpu", "rounds": 1, "seconds": 0.01}
    ours, theirs = measure.measure(group, settings, None)
    assert ours["status"] == "measured" and ours["percent_of_copy"] is None
    assert theirs["status"] == "does not fit" and "3 GiB" in theirs["reason"]
    monkeypatch.setattr(measure, "Workload", full)
    assert [row["status"] for row in measure.measure(group, settings, None)] == ["does not fit"] * 2


def test_sets() -> None:
    sets, step = module("step.sets"), module("step")
    run = module("step.run")
    core = sets.groups("core", sets.Filters(), ["optimi", "torchao", "heavyball", "bitsandbytes"])
    assert {group.case.name for group in core} == set(module("step.models").CASES)
    parts = run._settings(options(Path(), parts=[], quick=False), "cuda", "core")["parts"]
    assert set(parts) < set(step.PARTS)
    others = sum(run.SECONDS[part] for part in parts if part != "step")
    assert sets.estimate(core, 25, 0.4) + others < 180
    full = sets.groups("full", sets.Filters(types=["bf16"], contenders=["fusedopt"], clip=True))
    assert {group.types for group in full} == {"bf16"}
    assert {(k.contender, k.clip) for group in full for k in group.keys} == {("fusedopt", True)}
    (group,) = sets.groups("cpu", sets.Filters(cases=["huge"]))
    assert (group.case.name, group.rule, group.types) == ("huge", "AdamW", "fp32")
    names = set(module("step.contenders").CONTENDERS)
    for choices in sets.SETS.values():
        for choice in choices:
            assert set(choice.contenders) <= names and choice.case in module("step.models").CASES
            assert set(choice.rules) <= set(module("step.rules").RULES)
            assert set(choice.types) <= set(module("step.codecs").CODECS)


@pytest.mark.parametrize("name", ["core", "full"])
def test_what_may_break_the_process_comes_last(name: str) -> None:
    sets = module("step.sets")
    cases = [group.case.name for group in sets.groups(name, sets.Filters())]
    assert set(cases[cases.index("huge") :]) == {"huge"}


def test_parts_without_a_gpu() -> None:
    run = module("step.run")
    chosen = run._settings(options(Path(), parts=[], quick=False), "cpu", "cpu")
    assert chosen["parts"] == ["step", "host"] and chosen["set"] == "cpu"
    assert run._settings(options(Path(), parts=["sharded"]), "cpu", "cpu")["parts"] == ["sharded"]
    chosen = run._settings(options(Path(), parts=["training", "step"]), "cuda", "core")
    assert chosen["parts"] == ["step", "training"]
    # What a processor can take as well comes last.
    chosen = run._settings(options(Path(), parts=[], quick=False), "cuda", "core")
    assert chosen["parts"] == ["step", "training", "first-step", "host"]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Catches what has no counterpart on a CPU: events, flushes, profiles, memory."""
    chosen = options(tmp_path, device="cuda", contender=[], clip=None, case=["gpt2", "odd"])
    assert module("step.run").run(chosen) == 0
    result = result_in(tmp_path)
    assert result["environment"]["capability"] and result["environment"]["l2_bytes"] > 0
    rows = {(r["case"], r["contender"], r["clip"], r["scaler"]): r for r in result["rows"]}
    ours, loop = (rows["gpt2", name, False, False] for name in ("fusedopt", "torch-for-loop"))
    for row in (ours, loop):
        assert row["status"] == "measured", row["reason"]
        assert row["device_ms"]["median"] > 0 and row["extra_peak_bytes"] is not None
    assert 1 <= ours["launches"] < loop["launches"]
    # The norm, its factor, and the update.
    assert rows["gpt2", "fusedopt", True, False]["launches"] >= ours["launches"] + 2


def test_pictures_of_little(tmp_path: Path, quick: tuple[Path, dict[str, Any]]) -> None:
    figures, step_result = module("step.figures"), module("step.result")
    _, result = quick
    ours = [row for row in result["rows"] if row["contender"] == "fusedopt"]
    for rows, copy in (([], None), (ours[:1], result["copy"])):
        file = step_result.file(tmp_path, result)
        figures.write({**result, "rows": rows, "copy": copy}, file)
        assert file.path("-bars.png").read_bytes().startswith(PNG)


def test_tenths() -> None:
    clock = module("harness.clock")
    found = clock.percentiles([float(i) for i in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert clock.percentiles([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = module("harness.environment")
    monkeypatch.setattr(environment, "_output", lambda *_: None)
    facts = environment.environment("cpu")
    assert facts["commit"] is None and facts["uncommitted_changes"] is None
    assert environment.slug(facts | {"device": "NVIDIA H100 80GB"}) == "nvidia-h100-80gb-unknown"
