"""What steps hand to the device: as the page says, and never more."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from contract import DEVICE

ROOT = Path(__file__).resolve().parents[2]
# tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(ROOT))

launches = importlib.import_module("tools.launches")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="launches are counted on the CPU")

each_kind = pytest.mark.parametrize("kind", launches.KINDS, ids=lambda kind: kind.name)
KINDS = {kind.name: kind for kind in launches.KINDS}


def test_the_page_has_the_table_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches a launch, an operation or a copy more, at the first step or later ones. Where one is
    # meant: TRITON_INTERPRET=1 python -m tools.launches --write.
    monkeypatch.undo()  # fresh memory that is filled is an operation more
    page = launches.SECTION.page.read_text(encoding="utf-8")
    assert launches.SECTION.within(page) == page


@each_kind
def test_the_number_of_tensors_changes_nothing(kind) -> None:
    # Catches a loop over parameters that hands each to the device.
    few, many = (launches.measure(kind, count)[1].sizes for count in (6, 18))
    assert (few == many) != kind.strided


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("plain", (1, 0, 1)),
        ("three groups", (1, 0, 1)),
        ("clipped", (3, 0, 1)),
        ("float32 and bfloat16, clipped", (5, 0, 1)),
        ("loss scale", (2, 2, 0)),
        ("loss scale, clipped", (4, 2, 0)),
        ("`capturable=True`", (2, 0, 0)),
        ("`capturable=True`, `lr` a tensor, three groups", (2, 1, 0)),
        ("`capturable=True`, clipped", (4, 0, 0)),
    ],
)
def test_no_step_is_dearer_than_meant(name: str, most: tuple[int, int, int]) -> None:
    # Whatever the page is made to say.
    found = launches.measure(KINDS[name], 6)[1].sizes
    assert all(a <= b for a, b in zip(found, most, strict=True)), found


def test_what_is_counted_is_seen() -> None:
    """Catches a count that sees nothing: of buffers, numbers that are tensors, and moved inputs."""
    gaps = launches.measure(KINDS["elements with gaps"], 6)[1]
    # Gradient, parameter and two states are read through buffers, and three written back.
    assert gaps.operations == ["copy_"] * 7 * 6
    still, moved = (
        launches.measure(KINDS[name], 6)[1]
        for name in ("plain", "gradients elsewhere at every step")
    )
    assert moved.copies == still.copies + 1
    live = launches.measure(KINDS["`capturable=True`, `lr` a tensor"], 6)[1]
    assert live.operations == ["copy_"] and live.copies == 0
