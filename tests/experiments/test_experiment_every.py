"""The experiment on squares at every k-th step, and the figures of it that the docs have."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make experiments importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def committed() -> dict[str, Any]:
    result = json.loads((ROOT / "experiments/results/cpu/every.json").read_text())
    assert not result["reduced"]
    return result


def rows_of_the_page(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table of docs/batch_decoupled.md."""
    settings, found = result["settings"], []
    for name, title in (("digits", "digits"), ("gpt", "character GPT")):
        figures = result["figures"][name]
        arms = [("square-root rule", "", figures["sqrt"])]
        arms += [
            (f"virtual batch {b}", f"{every}", figures[f"virtual {b}, every {every}"])
            for b in settings["virtual"]
            for every in settings["every"]
        ]
        for title_of, every, arm in arms:
            gaps = [arm["M1"].get(batch) for batch in ("32", "128", "512")]
            words = ["" if own is None else f"{fmean(own):.2g}" for own in gaps]
            found.append(f"| {title} | {title_of} | {every} | {' | '.join(words)} |")
    return found


def test_the_page_has_the_committed_figures() -> None:
    # Catches: a page that was not written anew after another run.
    page = (ROOT / "docs/batch_decoupled.md").read_text("utf-8")
    rows = rows_of_the_page(committed())
    assert len(rows) == 14
    assert [row for row in rows if row not in page] == []


def test_the_committed_figures() -> None:
    """What the page says of them in words: see the section on ``every``."""
    result = committed()
    assert len(result["settings"]["digits"]["seeds"]) == 3
    for name in ("digits", "gpt"):
        figures = result["figures"][name]
        for every in (1, 4, 16):
            arm = figures[f"virtual 8, every {every}"]
            # There it is AdamW, to the bit.
            assert set(arm["M1"]["8"]) == {0.0}
            assert arm["share"]["8"] == pytest.approx(1 / every, rel=0.01)


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
