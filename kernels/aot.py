"""Ahead-of-time compilation: every kernel variant, for any target, on a machine without a GPU.

A variant is what the launcher would compile at run time; a report is what can be read off the
machine code: registers, stack, and how wide and how many the accesses to global memory are.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import multi_tensor, norms
from .lang import COMPILE_OPTIONS, tl, triton
from .rules import REGISTRY

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}

# Element types of parameter, gradient and states, and whether addresses are aligned.
LAYOUTS = (
    *((dtype, dtype, dtype, True) for dtype in DTYPES),
    ("fp32", "bf16", "fp32", True),
    ("bf16", "fp32", "bf16", True),
    ("fp32", "fp32", "fp32", False),
    ("bf16", "bf16", "bf16", False),
)


@dataclass(frozen=True)
class Variant:
    """One kernel as the compiler sees it.

    Attributes:
        kernel: name of the kernel function.
        rule: name of a rule in the registry, or "" for the norm kernels.
        options: compile-time options of the rule.
        dtypes: element types of the operands.
        aligned: whether addresses are multiples of 16 bytes.
        infinity_norm: for the norm kernels.
    """

    kernel: str
    rule: str = ""
    options: tuple[bool, ...] = ()
    n_states: int = 0
    dtypes: tuple[str, ...] = ()
    aligned: bool = True
    infinity_norm: bool = False

    @property
    def name(self) -> str:
        """A short name for tables."""
        types = "/".join(dict.fromkeys(self.dtypes))
        if self.rule:
            label = REGISTRY[self.rule].label(self.options)
            types = types if len(set(self.dtypes)) == 1 else f"{types} gradient"
        else:
            label = f"{self.kernel} ({'inf' if self.infinity_norm else '2'})"
        return f"{label} {types}{'' if self.aligned else ' unaligned'}".strip()

    @property
    def block(self) -> int:
        """Elements a program owns."""
        if self.kernel == "update_tensors":
            return multi_tensor.block_size(self.aligned)
        return norms.NORM_BLOCK if self.kernel == "partial_norms" else norms.REDUCE_BLOCK

    @property
    def threads(self) -> int:
        """Threads a program has."""
        sizes = {
            "partial_norms": norms.NORM_THREADS,
            "clip_factor": norms.REDUCE_THREADS,
            "update_tensors": multi_tensor.THREADS,
        }
        return sizes[self.kernel]

    @property
    def bytes_needed(self) -> int:
        """Bytes an element that the update must read and write, by the operands' types."""
        sizes = [DTYPES[d] for d in self.dtypes]
        if self.kernel == "partial_norms":
            return sizes[0]
        # Everything is read, and everything but the gradient is written.
        return 2 * sum(sizes) - sizes[1]


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
        return 16 * accesses * variant.threads / variant.block


def variants() -> Iterator[Variant]:
    """Every variant that the registry's rules and the norm kernels can need."""
    for rule in REGISTRY.values():
        seen = set()
        for group in rule.example_groups:
            key = rule.options(group), len(rule.states(group))
            if key in seen:
                continue
            seen.add(key)
            for param, gradient, state, aligned in LAYOUTS:
                dtypes = (param, *([gradient] * len(rule.degrees)), *([state] * key[1]))
                yield Variant("update_tensors", rule.name, *key, dtypes, aligned)
    for infinity_norm in (False, True):
        for dtype in DTYPES:
            yield Variant("partial_norms", dtypes=(dtype,), infinity_norm=infinity_norm)
        yield Variant("partial_norms", dtypes=("fp32",), aligned=False, infinity_norm=infinity_norm)
        yield Variant("clip_factor", infinity_norm=infinity_norm)


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


def compile_variant(variant: Variant, target: Any) -> Any:
    """Compile a variant for a target; Triton's compiled kernel is returned."""
    from triton.compiler import ASTSource

    kernel, signature, constants = _source(variant)
    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # torch allocates on 16 bytes and more, and the launcher says so to the compiler.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind.startswith("*")
        },
    )
    warps = variant.threads // target.warp_size
    return triton.compile(source, target=target, options={"num_warps": warps, **COMPILE_OPTIONS})


def _source(variant: Variant) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = tuple(_element_type(d) for d in variant.dtypes)
    compute = tl.float64 if tl.float64 in types else tl.float32
    if variant.kernel == "update_tensors":
        rule = REGISTRY[variant.rule]
        kernel: Any = multi_tensor.update_tensors
        arguments = {
            "table": "*i64",
            "width": "i32",
            "chunk_tensor": "*i32",
            "chunk_index": "*i32",
            "coefficients": "*fp64",
            "control": "*fp64",
        }
        constants: dict[str, Any] = {
            "RULE": rule.update,
            "OPTIONS": variant.options,
            "DTYPES": types,
            "DEGREES": rule.degrees,
            "N_COEFFICIENTS": rule.n_coefficients,
            "COMPUTE": compute,
            "ALIGNED": variant.aligned,
            "BLOCK": variant.block,
        }
    elif variant.kernel == "partial_norms":
        kernel = norms.partial_norms
        arguments = {
            "table": "*i64",
            "width": "i32",
            "chunk_tensor": "*i32",
            "chunk_index": "*i32",
            "inverse_scale": "*fp64",
            "partials": "*fp64",
        }
        constants = {
            "DTYPE": types[0],
            "COMPUTE": compute,
            "ALIGNED": variant.aligned,
            "INFINITY_NORM": variant.infinity_norm,
            "BLOCK": variant.block,
        }
    else:
        kernel = norms.clip_factor
        arguments = {
            "partials": "*fp64",
            "count": "i32",
            "inverse_scale": "*fp64",
            "max_norm": "*fp64",
            "control": "*fp64",
            "norm": "*fp32",
        }
        constants = {"INFINITY_NORM": variant.infinity_norm, "BLOCK": variant.block}
    return kernel, {**arguments, **dict.fromkeys(constants, "constexpr")}, constants


def _element_type(name: str) -> Any:
    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}[name]


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


def broken_budgets(variant: Variant, result: Report, target: Any) -> list[str]:
    """Say which of the limits that this project sets itself a variant breaks.

    No stack; whole chunks of aligned tensors in 128-bit accesses, as many as the operands need
    and no more; AdamW in float32 in at most 64 registers, half the threads an SM can hold.
    """
    broken = []
    if result.stack > 0:
        broken.append(f"{result.stack} bytes of stack")
    if variant.kernel != "clip_factor" and variant.aligned:
        moved, needed = result.bytes_moved(variant), variant.bytes_needed
        if moved != needed:
            broken.append(f"128-bit accesses move {moved:g} bytes an element, not {needed}")
    is_adamw = variant.rule == "Adam" and not any(variant.options)
    if is_adamw and set(variant.dtypes) == {"fp32"} and result.registers > 64:
        broken.append(f"{result.registers} registers, more than 64")
    return broken
