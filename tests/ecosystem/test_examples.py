"""The examples that need a trainer's package, as a user runs them, shortened."""

from __future__ import annotations

import pytest
from scripts import losses, run_example


@pytest.mark.parametrize(
    ("package", "name", "steps"),
    [("transformers", "hugging_face", 20), ("lightning", "lightning_module", 40)],
)
def test_trains(package: str, name: str, steps: int) -> None:
    pytest.importorskip(package)
    seen = losses(run_example(name, "--steps", str(steps)))
    assert len(seen) == 5 and seen[-1] < seen[0]
