"""Compile in many processes: C modules first, then what the cases launch."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import modules, work
from .request import Request, Step

Row = dict[str, Any]


def compile_all(request: Request, step: Step) -> tuple[list[Row], dict[str, Any]]:
    """Fill the cache.

    Args:
        request: what to compile.
        step: called with ``(text, done, total)`` as things go on.

    Returns:
        A row of ``work.compile_task`` for each variant, and of the C modules how many were built
        and the problem that kept them from it, if any.
    """
    with contextlib.ExitStack() as stack:
        library, problem = _library(request, stack)
        settings = work.Settings(
            cache=str(request.cache),
            imports=request.imports,
            statistics=request.statistics,
            precision=request.precision,
            library=library,
        )
        pool = stack.enter_context(
            # Not forked: threads of torch, and contexts of a GPU, do not survive that.
            ProcessPoolExecutor(
                request.jobs, get_context("spawn"), initializer=work.prepare, initargs=(settings,)
            )
        )
        before = _built(request.cache)
        if library is not None:
            step("building C modules")
            problem = pool.submit(work.build_utilities).result()
        step("finding variants")
        tasks, rows = _find(pool, request)
        tasks = [replace(task, launchers=not problem) for task in tasks]
        rows += _compile(pool, tasks, step)
        built = len(_built(request.cache) - before)
    return rows, {"built": built, "problem": problem}


def _find(pool: ProcessPoolExecutor, request: Request) -> tuple[list[work.Task], list[Row]]:
    tasks, rows = [], []
    futures = [pool.submit(work.find, t, request.rules, request.types) for t in request.targets]
    for future in futures:
        found, failed = future.result()
        tasks += found
        rows += failed
    return tasks, rows


def _compile(pool: ProcessPoolExecutor, tasks: Sequence[work.Task], step: Step) -> list[Row]:
    futures = {pool.submit(work.compile_task, task): i for i, task in enumerate(tasks)}
    rows: dict[int, Row] = {}
    for future in as_completed(futures):
        row = rows[futures[future]] = future.result()
        step(f"{row['target']} {row['variant']}", len(rows), len(tasks))
    return [rows[i] for i in range(len(tasks))]


def _library(request: Request, stack: contextlib.ExitStack) -> tuple[str | None, str]:
    """Make what C modules are linked against, or say why they are not built."""
    if not any(target.startswith("cuda") for target in request.targets):
        return None, "their source names a library of the AMD machine"
    if modules.c_compiler() is None:
        return None, "there is no C compiler: CC, gcc or clang"
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    try:
        modules.make_library(Path(directory))
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"the C compiler does not work: {error}"
    return directory, ""


def _built(cache: Path) -> set[Path]:
    return set(cache.glob("*/*.so"))
