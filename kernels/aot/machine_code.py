"""Reads off the machine code of a compiled kernel what it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ..lang import triton
from . import paths
from .variant import Report, Variant
from .waits import waits_before_data


def report(compiled: Any, target: Any) -> Report:
    """Read the resources of a compiled kernel off its machine code."""
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        return _report_amd(compiled.asm["amdgcn"], shared)
    assembly = compiled.asm["ptx"]
    registers, stack = _cubin_resources(compiled.asm["cubin"])
    access = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?)\.[bufs](\d+)\b", assembly)
    counts: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in access:
        counts[kind][int(bits) * int(vector[2:] or 1)] += 1
    narrow = Counter(
        64 if vector else 32
        for line in paths.whole_chunk(assembly, paths.PTX)[1]
        # What is not a vector of 64 bits is an address, or a setting.
        for vector in re.findall(r"\b(?:ld|st)\.global\S*?(?:(\.v2)\.b32|(?<!\.v4)\.b32)\b", line)
    )
    matrix = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", assembly)
    return Report(
        registers,
        stack,
        shared,
        dict(counts["ld"]),
        dict(counts["st"]),
        tuple(sorted(set(matrix))),
        dict(narrow),
        _loop_instructions(compiled) if matrix else None,
    )


def instructions(compiled: Any, target: Any, variant: Variant) -> float | None:
    """Count the instructions that a whole chunk takes, an element; None where there is no such.

    They are those of one way through the machine code, the shortest, a thread's times threads.
    """
    if target.backend == "hip":
        parts = paths.whole_chunk(compiled.asm["amdgcn"], paths.AMD)
    else:
        parts = paths.whole_chunk(_disassembled(compiled), paths.SASS)
    count = sum(map(len, parts))
    return count * variant.threads / variant.block if count and variant.block else None


def waits(compiled: Any, target: Any) -> int | None:
    """Count the rounds of loads before the first data of a whole chunk; None where not known."""
    if target.backend == "hip":
        return None
    first, rest = paths.whole_chunk(_disassembled(compiled), paths.SASS)
    return waits_before_data([*first, *rest])


def _loop_instructions(compiled: Any) -> int | None:
    """Count a thread's instructions in the innermost loop of products: a block and a sample's end.

    None where there is no such loop. On AMD, where it is unrolled, nobody asks.
    """
    return paths.loop_of_products(_disassembled(compiled), paths.SASS)


def _disassembled(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _run("nvdisasm", "-c", file.name)


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin: PTX does not show what the assembler spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", output)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {output!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _report_amd(assembly: str, shared: int) -> Report:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD assembly does not say {name}")
        return int(found[1])

    widths = {"ubyte": 8, "ushort": 16, "short": 16, "short_d16": 16, "short_d16_hi": 16}
    widths |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for kind, width in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly):
        counts[kind][widths.get(width, 0)] += 1
    narrow: Counter[int] = Counter()
    for line in paths.whole_chunk(assembly, paths.AMD)[1]:
        for kind, pair in re.findall(r"\b(?:global|buffer|flat)_(load|store)_dword(x2)?\b", line):
            if not pair:
                narrow[32] += 1
            elif kind == "store":
                # What is written has been read: addresses are loaded by the same instruction.
                narrow[64] += 2
    matrix = tuple(sorted(set(re.findall(r"\bv_mfma\w+", assembly))))
    return Report(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        shared=shared,
        loads=dict(counts["load"]),
        stores=dict(counts["store"]),
        matrix=matrix,
        narrow=dict(narrow),
    )
