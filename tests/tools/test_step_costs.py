"""What a step costs with what is around it: as the page says, and counted as it should be."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(ROOT))

costs = importlib.import_module("tools.step_costs")


def test_the_page_has_the_table_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches a byte more of ours. Where one is meant: python -m tools.step_costs --write.
    monkeypatch.undo()  # fresh memory that is filled is an operation more
    page = costs.SECTION.page.read_text(encoding="utf-8")
    assert costs.SECTION.within(page) == page


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda p: p.mul_(2.0), 8),  # read and written
        (lambda p: p * 2.0, 8),
        (lambda p: p.grad.copy_(p), 8),  # what was there is not read
        (lambda p: p.grad.zero_(), 4),
        (lambda p: p.view(-1).detach(), 0),
        (lambda p: torch.empty_like(p), 0),
        (lambda p: torch.lerp(p, p.grad, 0.5, out=p.grad), 12),
        (lambda p: torch._foreach_norm([p, p.grad]), 8),
    ],
)
def test_bytes_of_operations(monkeypatch: pytest.MonkeyPatch, operation, expected: int) -> None:
    monkeypatch.undo()
    # Catches views that are counted, and writes or reads that are not.
    found = costs.counted(lambda params: lambda: [operation(p) for p in params])
    assert found == pytest.approx(expected, abs=0.01)


def test_clipping_by_hand() -> None:
    # A norm that reads 4 bytes, and a product that reads and writes 4 each.
    assert costs.counted(costs._clip) == pytest.approx(12.0, abs=0.01)
