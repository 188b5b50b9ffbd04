"""Compiles a variant, for any target, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from ..lang import COMPILE_OPTIONS, EXACT_OPTIONS, register_options, triton
from .variant import Variant


def specialization(variant: Variant) -> dict[str, Any]:
    """State signature, constants and attributes as Triton's launcher forms them of a launch."""
    names = variant.kernel.arg_names
    signature = {name: variant.arguments.get(name, "constexpr") for name in names}
    return {
        "signature": signature,
        "constexprs": {(names.index(name),): value for name, value in variant.constants.items()},
        "attrs": {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in variant.divisible
        },
    }


def compiler_input(variant: Variant, target: Any) -> tuple[Any, dict[str, Any]]:
    """State what Triton compiles of a variant, and the options."""
    from triton.compiler import ASTSource

    source = ASTSource(fn=variant.kernel, **specialization(variant))
    options = {"num_warps": variant.threads // target.warp_size}
    options |= EXACT_OPTIONS if variant.exact else COMPILE_OPTIONS
    options |= register_options(variant.registers, target.backend)
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    return source, options


def compile_variant(variant: Variant, target: Any) -> Any:
    """Compile a variant for a target; Triton's compiled kernel is returned."""
    source, options = compiler_input(variant, target)
    return triton.compile(source, target=target, options=options)
