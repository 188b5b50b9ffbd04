"""The code of docs/trainers.md that needs a trainer's package."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import OUT, WIDTH, batches
from scripts import ROOT
from torch import nn

import fusedopt

PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python ecosystem\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PACKAGES = (
    "transformers",
    "accelerate",
    "opacus",
    "backpack",
    "backpack.extensions",
    "torchtitan.components.optimizer",
)


def _tiny() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForSequenceClassification(
        BertConfig(vocab_size=31, num_attention_heads=2, max_position_embeddings=16, **sizes)
    )


def _used(code: str) -> dict[str, Any]:
    """The packages that a block names."""
    named = [name for name in PACKAGES if f"{name.partition('.')[0]}." in code]
    for name in named:
        pytest.importorskip(name)
    return {root: importlib.import_module(root) for root in {n.partition(".")[0] for n in named}}


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split(" =")[0].strip())
@pytest.mark.filterwarnings("ignore:virtual_batch_size=32 is more than:UserWarning")
def test_runs(code: str, tmp_path: Path) -> None:
    space = _used(code)
    if "transformers" in space or "accelerate" in space:
        rows = torch.randint(31, (16, 9))
        dataset = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
        space |= {"model": _tiny(), "dataset": dataset, "folder": str(tmp_path)}
        space["loader"] = torch.utils.data.DataLoader(dataset, batch_size=4)
    ((inputs, targets),) = batches(1, 4)
    network = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, OUT))
    space |= {"torch": torch, "fusedopt": fusedopt, "network": network}
    space |= {"dataclasses": dataclasses, "__name__": "trainers"}
    space |= {"inputs": inputs, "targets": targets}
    before = [p.detach().clone() for p in space.get("model", network).parameters()]
    start = space.get("model", network)
    exec(compile(code, "docs/trainers.md", "exec"), space)
    after = [p.detach() for p in start.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_blocks_are_found() -> None:
    assert len(BLOCKS) == 6
