"""docs/scale.md and its picture against the script that writes them, and what it reads."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# bench and tools are not installed. Last, so that they hide nothing that is.
sys.path.append(str(ROOT))

section = importlib.import_module("tools.scale.__main__").SECTION
page = importlib.import_module("tools.scale.page")
tables = importlib.import_module("tools.scale.tables")
picture = importlib.import_module("tools.scale.picture")
measured = importlib.import_module("tools.scale.measured")
cluster = importlib.import_module("tools.scale.cluster")
models = importlib.import_module("tools.scale.models")


def test_the_page_is_what_the_script_writes() -> None:
    # Catches a page that says what was true once: python -m tools.scale --write.
    text = section.page.read_text(encoding="utf-8")
    assert section.within(text) == text


def test_the_picture_is_of_these_curves() -> None:
    # Catches a picture of an older page: python -m tools.scale --write.
    image = pytest.importorskip("PIL.Image").open(picture.FILE)
    assert image.text["Description"] == picture.digest()


def test_the_picture_draws_every_curve() -> None:
    # Catches a line that is left out, or is another model's.
    figure = picture.draw()
    for axes, model in zip(figure.axes, models.MODELS, strict=True):
        drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        assert drawn == picture.curves(model)
        assert axes.get_title() == model.name


def test_writing_the_picture_again_changes_nothing_else(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture.write(tmp_path / "again.png")
    again = image.open(tmp_path / "again.png")
    assert again.text["Description"] == picture.digest() and again.size[0] > 500


def test_every_assumption_is_named_with_its_source() -> None:
    # Catches a constant of others that the page keeps to itself.
    known = [x for x in vars(cluster).values() if isinstance(x, cluster.Assumption)]
    text = section.page.read_text(encoding="utf-8")
    behind = text.partition("## Assumed: not measured")[2]
    for one in known:
        assert f"| {one.what} | {one.value:g}" in behind and one.source in behind
    assert len(known) == len(cluster.ASSUMPTIONS) > 5


def test_from_where_on_something_holds() -> None:
    # Catches the last number of GPUs in the place of the first.
    small = models.MODELS[0]
    assert page.first(small, lambda s: s.layout.gpus >= 100) == 128
    assert page.first(small, lambda s: s.layout.gpus > 16384) is None
    assert page.GPUS[0] == 8 and page.GPUS[-1] == 16384


def cells(lines: list[str], *first: str) -> dict[str, str]:
    """Return the row that begins with some cells, by its table's headings."""
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    (own,) = [row for row in rows if row[: len(first)] == list(first)]
    return dict(zip((x.strip() for x in rows[0]), own, strict=True))


def test_columns_have_what_their_headings_say() -> None:
    # Catches columns that are swapped, and another unit than the heading's.
    model = models.MODELS[1]
    step = page.fsdp2(model, 8)
    row = cells("\n".join(tables.steps()).splitlines(), "70 B", "8", "FSDP2")
    assert float(row["moved, GB"]) == pytest.approx(step.moved / 1e9, rel=0.01)
    assert float(row["memory, ms"]) == pytest.approx(1e3 * step.passes, rel=0.01)
    assert float(row["µs of them"]) == pytest.approx(1e6 * step.launching, rel=0.05)
    assert float(row["host, ms"]) == pytest.approx(1e3 * step.host, rel=0.01)
    assert float(row["norm, µs"]) == pytest.approx(1e6 * step.norm, rel=0.05)
    assert float(row["step, %"]) == pytest.approx(100 * step.seconds / step.training, rel=0.05)
    # 16 bytes a parameter are within 150.1 GB, and with a whole unit no more.
    assert row["resident, GB"] == "141.2 (**162.2**)"
    own, units = tables.by_tensor(step), tables.by_unit(step)
    row = cells("\n".join(tables.squares()).splitlines(), "70 B", "8", "FSDP2")
    assert float(row["sent, GB"]) == pytest.approx(own.sent / 1e9, rel=0.01)
    assert float(row["bytes, s"]) == pytest.approx(own.transfer, rel=0.01)
    assert float(row["hops, s"]) == pytest.approx(own.latency, rel=0.01)
    assert float(row["hops a unit at a time, s"]) == pytest.approx(units.latency, rel=0.01)
    assert row["collectives"] == "723"
    row = cells("\n".join(tables.squares()).splitlines(), "70 B", "16,384", "HSDP, 64")
    assert row["collectives"] == "1,446"


def clipped(case: str, parameters: int, milliseconds: float) -> dict[str, Any]:
    return {
        "case": case, "rule": "AdamW", "types": "fp32", "contender": "fusedopt", "clip": True,
        "scaler": False, "status": "measured", "parameters": parameters, "launches": 5,
        "device_ms": {"median": milliseconds}, "bytes_per_parameter": 32,
    }  # fmt: skip


def test_a_gpu_is_the_line_through_two_cases() -> None:
    # Catches milliseconds for seconds, and a bandwidth that takes the launches for bytes.
    facts = {"device": "a GPU", "memory_bytes": 10}
    rows = [clipped("gpt2", 1000, 3.0), clipped("llama-3.2-1b", 5000, 7.0)]
    found = measured.device({"environment": facts, "rows": rows})
    assert found.fixed == pytest.approx(2e-3) and found.launch == pytest.approx(0.4e-3)
    # 4,000 parameters of 32 bytes in 4 ms.
    assert found.bandwidth == pytest.approx(32e6)
    assert (found.name, found.memory, found.launches) == ("a GPU", 10, 5)
    with pytest.raises(ValueError, match=r"no clipped AdamW of gpt2 and llama-3\.2-1b"):
        measured.device({"environment": facts, "rows": rows[:1]})


def timed(tensors: int, microseconds: float, gradients: str = "same", **more: Any) -> dict:
    own = {"rule": "AdamW", "contender": "fusedopt", "tensors": tensors}
    return {**own, "microseconds": microseconds, "gradients": gradients, **more}


def test_the_host_is_read_between_its_numbers_of_tensors() -> None:
    # Catches another rule's or contender's time, gradients that have not moved, a line from zero.
    rows = [
        timed(100, 200.0), timed(10, 110.0), timed(1000, 2000.0), timed(100, 250.0, "moved"),
        timed(100, 9.0, rule="SGD"), timed(100, 9.0, contender="torch-foreach"),
        *(timed(n, 10.0 * n, kind, contender="torch-fused")
          for n, kind in ((10, "same"), (100, "same"), (100, "moved"))),
    ]  # fmt: skip
    result = {"host": rows}
    assert measured.host_seconds(result, 100) == pytest.approx(250e-6)
    assert measured.host_seconds(result, 10) == pytest.approx(115e-6)
    assert measured.host_seconds(result, 550) == pytest.approx((200 + 900 + 275) * 1e-6)
    assert measured.host_seconds(result, 50, "torch-fused") == pytest.approx(500e-6)
    for tensors in (9, 1001):
        with pytest.raises(ValueError, match=f"{tensors} tensors: measured were 10 to 1000"):
            measured.host_seconds(result, tensors)
