"""AdamW in every format beside a copy of its bytes, tried on the CPU."""

from __future__ import annotations

import json

import pytest
from gpu_command import module

from fusedopt.kernels import lang


@pytest.mark.skipif(not lang.INTERPRETED, reason="the interpreter's")
def test_formats_are_measured_and_read(tmp_path, capsys, monkeypatch):
    formats, stages, findings = module("formats"), module("stages"), module("findings")
    table = tmp_path / "formats" / "formats.json"
    table.parent.mkdir()
    chosen = ["--format", "plain", "--format", "remainder8 + int8", "--format", "telemetry"]
    arguments = ["--device", "cpu", "--elements", "2048", "--rounds", "3", "--out", str(table)]
    assert formats.main([*arguments, *chosen]) == 0
    found = json.loads(table.read_text())
    assert {name: row["bytes"] for name, row in found["formats"].items()} == {
        "plain": 14, "remainder8 + int8": 12.125,
        "telemetry": pytest.approx(14 + 12 / 2048, rel=1e-6),
    }  # fmt: skip
    for row in found["formats"].values():
        speeds = row["gbps"]["median"], row["copy_gbps"]["median"]
        assert row["of_copy"] == pytest.approx(speeds[0] / speeds[1]) and min(speeds) > 0
    setting = stages.Setting(tmp_path, tmp_path, "cuda:90")
    read = findings.formats(setting, [])
    assert read["plain % of copy"] == pytest.approx(100 * found["formats"]["plain"]["of_copy"])
    with pytest.raises(SystemExit):
        formats.main([*arguments[:3], "0", "--out", str(table)])


def test_every_format_is_one_of_the_optimizers():
    # Catches an option that is refused on the machine that time is paid for.
    import torch

    import fusedopt

    formats = module("formats")
    for name in formats.NAMES:
        options = formats.options_of(name)
        p = torch.nn.Parameter(torch.empty(1, dtype=formats.DTYPE, device="meta"))
        fusedopt.AdamW([p], **options)


def test_every_codec_is_measured():
    # Catches a codec whose bandwidth nobody would miss, as that of a remainder by chance.
    from fusedopt.formats import format_of
    from fusedopt.kernels.codecs import format as codecs
    from fusedopt.kernels.rules import ADAM

    group = dict(ADAM.example_groups[0], amsgrad=False)
    made = [format_of(ADAM, {**group, **own}) for own in module("formats").FORMATS.values()]
    assert {own.parameter for own in made} == set(codecs.PARAMETERS)
    # Of the average of the weights alone is a state stochastic.
    states = {state.codec for own in made for state in own.states}
    assert states == set(codecs.STATES) - {codecs.STOCHASTIC}
