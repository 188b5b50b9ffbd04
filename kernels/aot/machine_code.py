"""Ahead-of-time compilation: every kernel variant, for any target, on a machine without a GPU.

A variant is what the launcher would compile at run time; a report is what can be read off the
machine code: registers, stack, matrix instructions, and how wide and how many the accesses to
global memory are; a budget is the limits that this project sets itself. Families of kernels list
their variants in modules of their own, named in ``variants``.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lang import COMPILE_OPTIONS, tl, triton
from .launch_config import SIZES
from .per_sample.shapes import matrix_instruction

# Bytes of an element, by Triton's name of its type.
DTYPES = SIZES


@dataclass(frozen=True)
class Budget:
    """Limits of a variant; no variant may use stack.

    Attributes:
        bytes_per_element: bytes an element that whole chunks move by 128-bit accesses, no more
            and no fewer; None where that is not counted.
        registers: registers a thread at most, or None.
        matrix: whether products must be the target's matrix instructions.
    """

    bytes_per_element: float | None = None
    registers: int | None = None
    matrix: bool = False

    def broken(self, variant: Variant, result: Report, target: Any) -> list[str]:
        """Say which limits a variant breaks."""
        broken = []
        if result.stack > 0:
            broken.append(f"{result.stack} bytes of stack")
        moved = result.bytes_moved(variant)
        if self.bytes_per_element is not None and moved != self.bytes_per_element:
            broken.append(
                f"128-bit accesses move {moved:g} bytes an element, not {self.bytes_per_element:g}"
            )
        if self.registers is not None and result.registers > self.registers:
            broken.append(f"{result.registers} registers, more than {self.registers}")
        if self.matrix:
            wanted = matrix_instruction(capability(target))
            if not any(name.startswith(wanted) for name in result.matrix):
                broken.append(f"no {wanted} instruction")
        return broken


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel as the compiler sees it.

    Attributes:
        name: a short name for tables, unique among the variants of a target.
        kernel: the ``@jit`` function.
        arguments: type of each run-time argument, in Triton's spelling (``*fp32``, ``i32``). The
            argument is named in ``constants`` instead where the launcher makes it one (None, 1).
        constants: value of each compile-time argument.
        threads: threads of a program.
        stages: depth of the software pipeline, or None for the compiler's default.
        block: elements that a program owns, where bytes an element are counted; otherwise 0.
        divisible: integer arguments that are multiples of 16. Addresses always are: torch
            allocates on 16 bytes and more, and the launcher says so to the compiler.
        budget: what the variant may use.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    threads: int
    stages: int | None = None
    block: int = 0
    divisible: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant uses.

    Attributes:
        registers: registers a thread (vector registers on AMD).
        stack: bytes of stack or scratch a thread.
        shared: bytes of shared memory a program.
        loads: number of load instructions from global memory, by width in bits.
        stores: the same for stores.
        matrix: names of matrix instructions.
    """

    registers: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: tuple[str, ...]

    def bytes_moved(self, variant: Variant) -> float:
        """Bytes an element moved by 128-bit accesses, those of whole chunks."""
        accesses = self.loads.get(128, 0) + self.stores.get(128, 0)
        return 16 * accesses * variant.threads / variant.block if variant.block else 0.0


def variants(target: Any) -> Iterator[Variant]:
    """Every variant that can be needed on a target: the registry's rules and the other kernels."""
    from . import aot_variants
    from .per_sample import aot_variants as per_sample

    yield from aot_variants.variants(architecture(target))
    yield from per_sample.variants(target)


def parse_target(text: str) -> Any:
    """Read ``cuda:90`` or ``hip:gfx942`` as a Triton target.

    Raises:
        ValueError: for anything else.
    """
    from triton.backends.compiler import GPUTarget

    backend, _, architecture = text.partition(":")
    if backend == "cuda" and architecture.isdigit():
        return GPUTarget("cuda", int(architecture), 32)
    if backend == "hip" and architecture.startswith("gfx"):
        # Compute cards (gfx9) have wavefronts of 64, graphics cards of 32.
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise ValueError(f"a target is cuda:<capability> or hip:gfx<number>, got {text!r}")


def architecture(target: Any) -> str:
    """Name a target as ``parse_target`` reads it."""
    return f"{target.backend}:{target.arch}"


def processors() -> int:
    """How many processes to compile with: those that may be used, not those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def capability(target: Any) -> int:
    """Compute capability times 10 (sm_90 is 90), or 0 for a target that is not NVIDIA's."""
    return int(target.arch) if target.backend == "cuda" else 0


def element_type(name: str) -> Any:
    """Triton's type of a name in DTYPES."""
    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}[name]


def compile_variant(variant: Variant, target: Any) -> Any:
    """Compile a variant for a target; Triton's compiled kernel is returned."""
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.arguments.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in variant.divisible
        },
    )
    options = {"num_warps": variant.threads // target.warp_size, **COMPILE_OPTIONS}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    return triton.compile(source, target=target, options=options)


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
    matrix = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", assembly)
    return Report(
        registers, stack, shared, dict(counts["ld"]), dict(counts["st"]), tuple(sorted(set(matrix)))
    )


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin: PTX does not show what the assembler spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
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
    matrix = tuple(sorted(set(re.findall(r"\bv_mfma\w+", assembly))))
    return Report(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        shared=shared,
        loads=dict(counts["load"]),
        stores=dict(counts["store"]),
        matrix=matrix,
    )
