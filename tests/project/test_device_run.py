"""A run of the tests on a device: which warnings are errors, and which tests it is of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

WARNS = """
import sys
import types
import warnings


def warn_as(name):
    module = types.ModuleType(name)
    exec("import warnings\\ndef warn(): warnings.warn('of a build')", module.__dict__)
    return module.warn


def test_torch(device):
    warn_as("torch.cuda")()


def test_ours(device):
    warn_as("fusedopt.step.plan")()


def test_named_alike(device):
    warn_as("fusedopts")()
"""
PLACES = """
import contract
import pytest
from contract import new_params

{imports}


def test_plain():
    pass


@pytest.mark.gpu
def test_marked():
    pass
"""


def _run(folder: Path, device: str, text: str) -> dict[str, str]:
    """Run tests as those of this folder are run; return what became of each."""
    (folder / "test_some.py").write_text(text)
    configuration = str(TESTS.parent / "pyproject.toml")
    command = [sys.executable, "-m", "pytest", "-c", configuration, "-p", "conftest", "-q", "-rA"]
    paths = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--noconftest", str(folder / "test_some.py")],
        env={**os.environ, "FUSEDOPT_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split() for line in found.stdout.splitlines()]
    outcomes = {"PASSED", "FAILED"}
    named = {x[1].split("::")[-1]: x[0] for x in lines if len(x) > 1 and x[0] in outcomes}
    skipped = [" ".join(x[3:]) for x in lines if x and x[0] == "SKIPPED"]
    return {**named, **{text: "SKIPPED" for text in skipped}} or {"": found.stdout + found.stderr}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_a_device_only_what_this_package_does_is_an_error(tmp_path, device):
    # Catches a run on a GPU that fails for what its PyTorch warns of, and one that hides ours.
    found = _run(tmp_path, device, WARNS)
    everywhere = "FAILED" if device == "cpu" else "PASSED"
    assert found == {
        "test_torch": everywhere, "test_ours": "FAILED", "test_named_alike": everywhere,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("imports", "outcome"),
    [("", "PASSED"), ("del contract", "PASSED"), ("del new_params, contract", "SKIPPED")],
    ids=["by a module", "by a function", "not at all"],
)
def test_on_a_device_run_those_that_put_something_there(tmp_path, imports, outcome):
    # Catches a run that leaves tests out, and one that is of tests which say nothing of a device.
    found = _run(tmp_path, "meta", PLACES.format(imports=imports))
    reasons = {text.split("Skipped: ")[-1] for text, what in found.items() if what == "SKIPPED"}
    assert any("needs a GPU" in text for text in reasons)
    assert any("nothing on the device" in text for text in reasons) == (outcome == "SKIPPED")
    assert found.get("test_plain", "SKIPPED") == outcome
