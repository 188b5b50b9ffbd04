"""What the benchmarks share: how results are kept, and who may know of whom."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """Make bench importable, which no installation has."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.harness.{name}")


def imported(folder: Path) -> set[str]:
    """Return the first two parts of every module that a folder's files import from without."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            else:
                continue
            found |= {".".join(name.split(".")[:2]) for name in names}
    return found


def test_the_harness_knows_no_benchmark() -> None:
    # Catches a helper that reaches back into what uses it.
    assert imported(ROOT / "bench" / "harness")
    own = {name for name in imported(ROOT / "bench" / "harness") if name.startswith("bench.")}
    assert own <= {"bench.harness"}
    assert not [name for name in imported(ROOT / "bench") if name.startswith("experiments")]


def test_experiments_use_the_harness_alone() -> None:
    used = {name for name in imported(ROOT / "experiments") if name.startswith("bench")}
    assert used == {"bench.harness"}


def test_what_a_killed_run_leaves_needs_no_torch() -> None:
    # Catches an import that takes memory of a GPU in a process that only starts others.
    code = "import bench.harness.output, bench.harness.places, sys;"
    code += "print([name for name in ('torch', 'rich', 'matplotlib') if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_result_is_strict_json_written_whole(tmp_path: Path) -> None:
    output = module("output")
    file = output.File(tmp_path / "new", "a.b")
    file.keep({"x": [1 / 3, float("nan"), float("inf")], 2: (True, None, "text")})
    text = file.json.read_text(encoding="utf-8")
    assert file.json.name == "a.b.json" and file.path("-bars.png").name == "a.b-bars.png"
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"x": [0.3333333, None, None], "2": [True, None, "text"]}
    with pytest.raises(TypeError):
        file.keep({"x": object()})
    # What was there before a result that cannot be written still is.
    assert file.json.read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.b.json"]


def test_headings_say_what_a_figure_means() -> None:
    heading = module("figures").heading
    result = {"measurement": False, "note": "why"}
    assert heading("Times", result, "shapes") == "Times\nNOT A MEASUREMENT: tiny shapes"
    assert heading("Times", result | {"measurement": True}, "shapes") == "Times\nwhy"
    assert heading("Times", {"measurement": True, "note": ""}, "shapes") == "Times"


def test_tables_are_wide_in_a_file_and_as_wide_as_a_terminal() -> None:
    tables, log = module("tables"), StringIO()
    terminal = SimpleNamespace(is_terminal=True)
    assert tables.wide(terminal) is terminal
    console = tables.wide(SimpleNamespace(is_terminal=False, file=log), 180)
    assert console.width == 180 and console.file is log
    assert tables.number(None) == tables.mebibytes(None) == "-"
    assert (tables.number(1.23456), tables.mebibytes(3 * 2**20)) == ("1.235", "3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_library_of_theirs", "needs no_such_library_of_theirs"),
        ("raise OSError('no symbol\\nin it')", "OSError: no symbol"),
    ],
)
def test_why_a_library_is_missing(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module("contenders").load
    (tmp_path / "library_that_breaks.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("library_that_breaks") == (None, reason)
    assert load("no_such_library.at_all") == (None, "not installed")
    assert load("json") == (json, None)
