"""``verify``: how parameters and states are kept, by kernels and by the reference."""

from __future__ import annotations

import json

import pytest
import torch

from fusedopt import __main__ as cli
from fusedopt.cli import verify, verify_formats
from fusedopt.kernels import lang
from fusedopt.memory import codes, masters

pytestmark = pytest.mark.skipif(lang.triton is None, reason="needs Triton")
SMALL = ((1024,), (300,), (3, 150), (), (0,))


@pytest.fixture
def only(monkeypatch):
    """Leave a few formats, small tensors, and nothing else that the command compares."""

    def leave(*names: str) -> None:
        formats = {name: verify_formats.FORMATS[name] for name in names}
        monkeypatch.setattr(verify_formats, "FORMATS", formats)
        monkeypatch.setattr(verify_formats, "SHAPES", SMALL)
        monkeypatch.setattr(verify, "REGISTRY", {})
        monkeypatch.setattr(verify.verify_samples, "compare_all", lambda device: iter(()))

    return leave


def rows(device: torch.device) -> dict[str, dict]:
    return {row["format"]: row for row in verify_formats.compare_all(device)}


def test_every_format_is_kept_to_the_bit(only, capsys):
    only(*verify_formats.FORMATS)
    assert cli.main(["verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["formats"]
    assert {row["format"] for row in found} == set(verify_formats.FORMATS)
    assert {row["differing"] for row in found} == {0}


@pytest.mark.parametrize(
    ("name", "place", "function"),
    [
        # A threshold that walks another way; a scale that is a bit larger; a master cut, not
        # rounded: each moves a few bits, by which no step of Adam's is seen to be wrong.
        ("int8", codes, "encode"),
        ("fp8", codes, "_scales"),
        ("remainder8", masters, "split"),
    ],
)
def test_a_codec_that_differs_in_a_bit_fails(only, monkeypatch, device, name, place, function):
    only(name)
    right = getattr(place, function)

    def wrong(*arguments):
        found = right(*arguments)
        first, *rest = found if isinstance(found, tuple) else (found,)
        changed = first.clone()
        if changed.numel():
            flat = changed.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[first.itemsize])
            flat.flatten()[0] ^= 1
        return (changed, *rest) if rest else changed

    monkeypatch.setattr(place, function, wrong)
    assert rows(device)[name]["differing"] > 0
    assert not rows(device)[name]["passed"]


def test_a_step_from_a_wrong_state_is_seen(only, monkeypatch, device):
    only("fp8")
    right = codes.decode
    monkeypatch.setattr(codes, "decode", lambda *a: 1.1 * right(*a))
    row = rows(device)["fp8"]
    assert row["worst_ulps"] > row["tolerance_ulps"] and not row["passed"]
