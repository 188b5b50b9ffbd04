"""The experiment on squares at every k-th step."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make experiments importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.mark.slow
def test_every(tmp_path: Path) -> None:
    command = importlib.import_module("experiments.__main__").main
    assert command(["every", "--reduced", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "every.json").read_text())["figures"]
    for name, batch in (("digits", "128"), ("gpt", "64")):
        for b in (8, 1):
            # Catches: squares that are made at other steps than is said.
            assert figures[name][f"virtual {b}, every 4"]["share"][batch] == pytest.approx(
                0.25, abs=0.05
            )
        assert figures[name]["virtual 8, every 4"]["M1"]["8"] == [0.0]
    picture = (tmp_path / "every.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
