"""The structure: imports run one way, from what users call down to what a kernel is."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import fusedopt

ROOT = Path(fusedopt.__file__).parent
CHECKOUT = Path(__file__).resolve().parents[2]

# From the bottom up: a package imports those above it in this list, and itself.
LAYERS = (
    "tracing",
    "memory",
    "kernels",
    "formats",
    "compilations",
    "coefficients",
    "source",
    "clipping",
    "owned",
    "guard",
    "backends",
    "statistics",
    "averaging",
    "step",
    "completion",
    "checkpoint",
    "engine",
    "telemetry",
    "normed",
    "optimizer",
    "arguments",
    "optimizers",
    "adam_c",
    "lion",
    "schedule_free",
    "batch_decoupled",
    "release",
    "accumulation",
    "scaling",
    "svag",
    # The package itself: what users import.
    "",
    "examples",
    "conditioning",
    "testing",
    "precompile",
    "cli",
    "__main__",
)


def module_of(path: Path, root: Path = ROOT) -> str:
    """Name a file within the package; the package itself is the empty name."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(root: Path = ROOT) -> Iterator[Path]:
    # The kernels are reached through a link.
    for path in sorted(root.iterdir()):
        yield from path.rglob("*.py") if path.is_dir() else [path] * (path.suffix == ".py")


def imports(source: str, module: str, package: bool, known: Iterable[str]) -> set[str]:
    """Return the modules that a file imports, those within functions and for types included."""
    known, found = set(known), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fusedopt")}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            inside = module.split(".") if module else []
            inside = inside if package else inside[:-1]
            base = inside[: len(inside) - node.level + 1] + base
        elif not base or base[0] != "fusedopt":
            continue
        else:
            base = base[1:]
        for alias in node.names:
            full = ".".join([*base, alias.name])
            found.add(full if full in known else ".".join(base))
    found = {name.removeprefix("fusedopt").removeprefix(".") for name in found}
    return (found & known) - {module}


def graph() -> dict[str, set[str]]:
    paths = {module_of(path): path for path in files()}
    return {
        name: imports(path.read_text(), name, path.name == "__init__.py", paths)
        for name, path in paths.items()
    }


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Return sets of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges.get(name, ())
        reach[start] = seen
    found = [{a, *(b for b in reach[a] if a in reach.get(b, ()))} for a in edges if a in reach[a]]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def wrong_ways(edges: Mapping[str, set[str]]) -> list[str]:
    place = {name: i for i, name in enumerate(LAYERS)}
    return [
        f"{a} imports {b}"
        for a, targets in edges.items()
        for b in sorted(targets)
        if place[b.partition(".")[0]] > place[a.partition(".")[0]]
    ]


def test_every_package_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in graph()} == set(LAYERS)


def test_imports_run_one_way() -> None:
    # Catches an arrow that climbs, those within functions or under TYPE_CHECKING included.
    assert wrong_ways(graph()) == []


def test_no_import_circle() -> None:
    # Packages count as modules: what they hand on is imported by them.
    assert circles(graph()) == []


def test_what_the_checks_see() -> None:
    source = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
def f():
    from . import request
    from fusedopt.memory.layout import is_dense
"""
    known = ["optimizer", "step.plan", "step.request", "memory.layout", "step"]
    found = imports(source, "step.plan", False, known)
    assert found == {"optimizer", "step.request", "memory.layout"}
    edges = {"step.plan": found, "optimizer": {"step.plan"}, "step.request": set()}
    assert wrong_ways(edges) == ["step.plan imports optimizer"]
    assert circles(edges) == [{"step.plan", "optimizer"}]


def test_kernels_are_seen() -> None:
    # Behind a link, which a walk might not follow.
    assert "kernels.rules.adam" in graph()


def test_the_pictures_of_the_architecture_name_files_that_are_there() -> None:
    spec = importlib.util.spec_from_file_location(
        "drawing", CHECKOUT / "tools/draw_architecture.py"
    )
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    sys.modules["drawing"] = drawing
    spec.loader.exec_module(drawing)
    assert drawing.missing() == []
    found = {path.name for path in drawing.FOLDER.glob("*.png")}
    assert {f"{name}.png" for name in drawing.PICTURES} <= found


def test_every_picture_is_shown_on_a_page() -> None:
    # Catches a picture that is left behind, and one that was never kept.
    text = "".join(path.read_text("utf-8") for path in (CHECKOUT / "docs").glob("*.md"))
    shown = set(re.findall(r"pictures/(\w+\.png)\)", text))
    assert shown == {path.name for path in (CHECKOUT / "docs/pictures").glob("*.png")}


def test_the_architecture_names_files_that_are_there() -> None:
    # Catches a page that was not taken along when code was moved.
    text = (CHECKOUT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`((?:[\w]+/)+[\w.]*|[\w/]+\.py)`", text))
    roots = CHECKOUT, ROOT, ROOT / "statistics", ROOT / "statistics/per_sample"
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert len(named) > 40 and not missing


def test_no_file_of_tests_is_over_500_lines() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (CHECKOUT / "tests").rglob("*.py")}
    assert len(lengths) > 100 and {name: n for name, n in lengths.items() if n > 500} == {}
