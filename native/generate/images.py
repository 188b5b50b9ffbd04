"""Compiles the library's kernels, many at a time, and reads off each what its caller must know."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

from fusedopt.kernels import aot, lang

from .table import Row, rows

# Bytes of an argument and its PTX type, by Triton's spelling; pointers are the others.
INTEGERS = {"i32": "u32", "i64": "u64"}
# What Triton appends to a kernel's own parameters: addresses of global and of profiling scratch.
MOST_SCRATCH = 2
# Beyond this a launch needs an attribute of the function.
MOST_SHARED = 48 * 1024


class TargetError(ValueError):
    """A target that nothing can be compiled for."""


@dataclass(frozen=True)
class Image:
    """One compiled kernel.

    Attributes:
        target: name of the target, ``cuda:90``.
        row: index into the rows of the table.
        cubin: the machine code.
        machine: what the machine code is for, ``sm_90a``.
        ptx_version: of the assembler, as ``8.7``.
        scratch: how many scratch addresses follow the kernel's own parameters.
        report: registers, stack and the rest.
        broken: budgets that it breaks, and whatever else is wrong with it.
    """

    target: str
    row: int
    cubin: bytes
    machine: str
    ptx_version: str
    scratch: int
    report: aot.Report | None
    broken: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the machine code, in hexadecimal."""
        return hashlib.sha256(self.cubin).hexdigest()

    @property
    def exact(self) -> bool:
        """Whether the code runs on its own compute capability alone (``sm_90a``)."""
        return self.machine.endswith("a")

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor compute capability."""
        return divmod(int(self.machine.removeprefix("sm_").rstrip("a")), 10)

    @property
    def cuda(self) -> int:
        """The oldest CUDA whose driver loads it, as ``cuDriverGetVersion`` counts: 12000.

        Drivers of one major version load what assemblers of that version write. The assembler's
        own version shows in that of its PTX: 7.x is CUDA 11, 8.x CUDA 12.
        """
        return (int(self.ptx_version.split(".")[0]) + 4) * 1000


def check_targets(names: Sequence[str]) -> None:
    """Raise TargetError, in one line, for a target that the library cannot be built for."""
    for name in names:
        if name.startswith("hip:"):
            raise TargetError(
                f"{name}: the library is for NVIDIA GPUs; targets are cuda:80 and such"
            )
        try:
            target = aot.parse_target(name)
        except ValueError as error:
            raise TargetError(str(error)) from None
        try:
            with _silence():
                aot.compile_variant(_rows(name)[-1].variant, target)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises says no
            found = re.search(r"ptxas\S* fatal\s*: (.*)", str(error))
            reason = f" ({found[1].strip()})" if found else f" ({type(error).__name__})"
            major, minor = divmod(int(target.arch), 10)
            raise TargetError(
                f"{name}: Triton {lang.triton.__version__} cannot compile for compute capability"
                f" {major}.{minor}{reason}"
            ) from None


@contextmanager
def _silence() -> Iterator[None]:
    """Keep off the console what the compiler itself writes there, to either stream."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream, _ in kept:
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def compile_all(targets: Sequence[str], jobs: int) -> Iterator[Image]:
    """Compile every row of the table for every target, in order.

    Args:
        targets: names of targets that ``check_targets`` has accepted.
        jobs: number of processes.
    """
    work = [(target, row) for target in targets for row in range(len(_rows(target)))]
    with ProcessPoolExecutor(max(1, jobs), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, work, chunksize=4)


@cache
def _rows(target: str) -> list[Row]:
    return list(rows(target))


def compile_one(work: tuple[str, int]) -> Image:
    """Compile one row; rows travel between processes by number, for a kernel cannot be pickled."""
    name, index = work
    target, row = aot.parse_target(name), _rows(name)[index]
    try:
        compiled = aot.compile_variant(row.variant, target)
        report = aot.report(compiled, target)
        scratch, wrong = _interface(row, compiled)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is a finding
        text = f"does not compile: {type(error).__name__}: {error}"[:600]
        return Image(name, index, b"", "", "", 0, None, (text,))
    ptx = compiled.asm["ptx"]
    machine, version = _directive(ptx, "target"), _directive(ptx, "version")
    if not re.fullmatch(r"sm_\d+a?", machine):
        wrong.append(f"code for {machine}, of which it is not known where it runs")
    if report.shared > MOST_SHARED:
        wrong.append(f"{report.shared} bytes of shared memory, more than {MOST_SHARED}")
    wrong += row.variant.budget.broken(row.variant, report, target)
    return Image(
        name, index, compiled.asm["cubin"], machine, version, scratch, report, tuple(wrong)
    )


def _directive(ptx: str, name: str) -> str:
    found = re.search(rf"^\.{name}\s+(\w[\w.]*)", ptx, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the PTX has no .{name}")
    return found[1]


def _interface(row: Row, compiled: Any) -> tuple[int, list[str]]:
    """Compare the kernel's parameters with what the library passes.

    Returns:
        The number of scratch addresses after the kernel's own parameters, and what is wrong.
    """
    variant, metadata = row.variant, compiled.metadata
    wanted = [
        INTEGERS.get(variant.arguments[name], "u64")
        for name in variant.kernel.arg_names
        if name in variant.arguments
    ]
    found = entry_parameters(compiled.asm["ptx"], metadata.name)
    extra = found[len(wanted) :]
    wrong = []
    if found[: len(wanted)] != wanted or len(extra) > MOST_SCRATCH or set(extra) - {"u64"}:
        wrong.append(f"its parameters are {found}, expected {wanted} and scratch addresses")
    if metadata.name != variant.kernel.__name__:
        wrong.append(f"its symbol is {metadata.name}")
    if metadata.num_ctas != 1:
        wrong.append("it is launched in clusters")
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            wrong.append(f"{kind} is {getattr(metadata, kind)}, and the library has no scratch")
    if metadata.num_warps * 32 != variant.threads:
        wrong.append(f"{metadata.num_warps} warps instead of {variant.threads} threads")
    return len(extra), wrong


def entry_parameters(ptx: str, symbol: str) -> list[str]:
    """PTX types of the parameters of a kernel, in order."""
    found = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\((.*?)\)", ptx, re.DOTALL)
    if found is None:
        raise RuntimeError(f"the PTX has no entry {symbol}")
    return re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", found[1])
