"""The check of all bit patterns, on a share of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import patterns
import pytest
import torch

from fusedopt.memory import masters

checks = importlib.import_module("tools.patterns.checks")
subjects = importlib.import_module("tools.patterns.subjects").subjects()
command = importlib.import_module("tools.patterns.__main__")


@pytest.mark.parametrize("subject", subjects, ids=lambda subject: subject.name)
def test_a_sample(subject) -> None:
    # Catches any codec that breaks a promise: 2^18 patterns in steps of an odd number.
    sample = torch.arange(1 << 18) * command.STRIDE % subject.patterns
    found = subject.check(sample)
    assert found and checks.failures(found, subject.limits) == []


def test_the_checks_see_what_is_wrong() -> None:
    # Catches a check that finds nothing: upper and lower half without the cases of their own.
    def split(value, remainder, bits):
        pattern = value.view(torch.int32)
        upper = ((pattern + 0x8000) >> 16).to(torch.int16)
        return upper.view(torch.bfloat16), pattern.to(remainder)

    found = checks.master(patterns.special(), split, masters.join, torch.int16, None)
    assert found["parameter: nan hidden or made, wrong"] > 0
    assert found["parameter: infinity lost or made, wrong"] > 0
    assert found["master: error from there on, worst"] > 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Catches a sample that passes for all patterns, and what is not named in the result.
    arguments = ["--sample", "4096", "--only", "remainder8", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*-patterns.json")
    result = json.loads(path.read_text())
    assert result["measurement"] is False and result["settings"]["sample"] == 4096
    assert [found["patterns"] for found in result["subjects"]] == [4096] * 3
    assert "3 checked, 0 failed" in capsys.readouterr().out


def test_the_kept_result_is_of_all_patterns() -> None:
    # Catches a result that was replaced by a sample's, and a codec that was never checked.
    paths = sorted((patterns.CHECKOUT / "bench/results").glob("*-patterns.json"))
    results = [json.loads(path.read_text()) for path in paths]
    assert results and all(result["measurement"] for result in results)
    for result in results:
        assert [x["name"] for x in result["subjects"]] == [subject.name for subject in subjects]
        assert all(x["patterns"] == x["of"] and not x["failures"] for x in result["subjects"])
