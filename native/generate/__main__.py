"""The build step: compile the library's kernels and write the sources around them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusedopt.kernels.aot import processors

if TYPE_CHECKING:
    from .images import Image


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for bad arguments, 1 for kernels that are not good."""
    parser = argparse.ArgumentParser(prog="python -m native.generate", description=__doc__)
    parser.add_argument("--target", action="append", required=True, metavar="cuda:90")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--jobs", type=int, default=processors(), metavar="N")
    parser.add_argument("--check", action="store_true", help="only say whether targets are good")
    options = parser.parse_args(arguments)
    problem = _unusable(options)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    return 0 if options.check else _build(list(dict.fromkeys(options.target)), options)


def _unusable(options: argparse.Namespace) -> str | None:
    if not options.check and options.output is None:
        return "--output says where to write"
    # Debugging lines would put the checkout's path into the machine code.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    if options.output is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(options.output.resolve() / "cache"))
    from fusedopt.kernels import lang

    if lang.triton is None:
        return "Triton is not installed"
    if lang.INTERPRETED:
        return "TRITON_INTERPRET=1 replaces the compiler: unset it"
    from .images import TargetError, check_targets

    try:
        check_targets(options.target)
    except TargetError as error:
        return str(error)
    return None


def _build(targets: Sequence[str], options: argparse.Namespace) -> int:
    import triton

    from fusedopt import __version__

    from . import sources
    from .images import compile_all
    from .table import rows

    tables = {target: list(rows(target)) for target in targets}
    total = sum(map(len, tables.values()))
    images: list[Image] = []
    for image in _progress(compile_all(targets, options.jobs), total):
        images.append(image)
    broken = [image for image in images if image.broken]
    for image in broken:
        name = tables[image.target][image.row].variant.name
        print(f"{image.target} {name}: {'; '.join(image.broken)}", file=sys.stderr)
    if broken:
        return 1
    versions = {"fusedopt": __version__, "triton": triton.__version__}
    sources.write(images, tables, options.output, versions)
    return 0


def _progress(images: Iterable[Image], total: int) -> Iterator[Image]:
    """Pass images on and say how far the build is: a bar in a terminal, else lines."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is not None and console.is_terminal:
        columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(images, total=total)
        return
    for number, image in enumerate(images, 1):
        if number % 32 == 0 or number == total:
            print(f"compiled {number} of {total} kernels ({image.target})", file=sys.stderr)
        yield image


if __name__ == "__main__":
    sys.exit(main())
