"""What a kernel variant is, what its machine code uses, and what it may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..codecs.place import GROUP
from ..lang import tl
from ..launch_config import SIZES
from ..per_sample.shapes import matrix_instruction
from .targets import capability

# Bytes of an element, by Triton's name of its type.
DTYPES = SIZES
TYPES = {
    "fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64,
    "i16": tl.int16, "i8": tl.int8, "u8": tl.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Limits of a variant; no variant may use stack.

    Attributes:
        bytes_per_element: bytes an element that whole chunks move by 128-bit accesses, no more
            and no fewer; None where that is not counted.
        read_per_element: the same of 128-bit loads alone.
        narrow: besides, by 64-bit accesses and by 32-bit ones, by their widths: codes, and scales.
        registers: registers a thread at most, or None.
        amd_registers: the same on AMD, where it is another; a compute unit has twice as many.
        matrix: whether products must be the target's matrix instructions.
    """

    bytes_per_element: float | None = None
    read_per_element: float | None = None
    narrow: Mapping[int, float] = field(default_factory=dict)
    registers: int | None = None
    amd_registers: int | None = None
    matrix: bool = False

    def broken(self, variant: Variant, result: Report, target: Any) -> list[str]:
        """Say which limits a variant breaks."""
        broken = []
        if result.stack > 0:
            broken.append(f"{result.stack} bytes of stack")
        wanted = {} if self.bytes_per_element is None else {128: self.bytes_per_element}
        for width, limit in {**wanted, **self.narrow}.items():
            moved = result.moved_by(variant, width)
            if moved != limit:
                broken.append(
                    f"{width}-bit accesses move {moved:g} bytes an element, not {limit:g}"
                )
        read = result.read_by(variant)
        if self.read_per_element not in (None, read):
            broken.append(
                f"128-bit loads read {read:g} bytes an element, not {self.read_per_element:g}"
            )
        most = self.registers
        if target.backend == "hip" and self.amd_registers is not None:
            most = self.amd_registers
        if most is not None and result.registers > most:
            broken.append(f"{result.registers} registers, more than {most}")
        if self.matrix:
            product = matrix_instruction(capability(target))
            if not any(name.startswith(product) for name in result.matrix):
                broken.append(f"no {product} instruction")
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
        registers: that the compiler is told to keep a thread within, or None.
        exact: whether each operation is rounded by itself.
        stages: depth of the software pipeline, or None for the compiler's default.
        block: elements that a program owns, where bytes an element are counted; otherwise 0.
        sums: accesses of 32 bits that one thread of a program makes, and no other.
        divisible: integer arguments that are multiples of 16. Addresses always are: torch
            allocates on 16 bytes and more, and the launcher says so to the compiler.
        budget: what the variant may use.
        coefficients: names of the scalars that it reads, of a rule.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    threads: int
    registers: int | None = None
    exact: bool = False
    stages: int | None = None
    block: int = 0
    sums: int = 0
    divisible: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    coefficients: tuple[str, ...] = ()


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
        narrow: number of accesses of 64 and of 32 bits that a whole chunk takes, without those to
            the table of addresses, where it has 128-bit ones.
        loop: a thread's instructions in the innermost loop of products; None where there is none.
    """

    registers: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: tuple[str, ...]
    narrow: dict[int, int] = field(default_factory=dict)
    loop: int | None = None

    def bytes_moved(self, variant: Variant) -> float:
        """Bytes an element that whole chunks move, by what the variant's budget has."""
        if variant.budget.read_per_element is not None:
            return self.read_by(variant)
        return sum(self.moved_by(variant, width) for width in (128, *variant.budget.narrow))

    def read_by(self, variant: Variant) -> float:
        """Bytes an element that 128-bit loads read."""
        return 16 * self.loads.get(128, 0) * variant.threads / max(variant.block, 1)

    def moved_by(self, variant: Variant, width: int) -> float:
        """Bytes an element that whole chunks move by accesses of a width in bits."""
        if not variant.block:
            return 0.0
        if width == 128:
            accesses = self.loads.get(128, 0) + self.stores.get(128, 0)
        else:
            accesses = self.narrow.get(width, 0)
        if width == 32:
            # Scales: the threads of a group read one together, and one of them writes it.
            scales = max(accesses - variant.sums, 0)
            return 4 * scales / GROUP + 4 * (accesses - scales) / variant.block
        return width / 8 * accesses * variant.threads / variant.block


def element_type(name: str) -> Any:
    """Triton's type of a name."""
    return TYPES[name]


def element_bytes(name: str) -> int:
    """Bytes of an element of the type of a name."""
    return int(TYPES[name].primitive_bitwidth) // 8


def alignment_suffix(aligned: bool) -> str:
    """End the name of a variant whose addresses need not be multiples of 16 bytes."""
    return "" if aligned else " unaligned"
