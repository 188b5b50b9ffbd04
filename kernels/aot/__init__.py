"""Ahead-of-time compilation: every kernel variant, for any target, on a machine without a GPU.

A variant is what the launcher would compile at run time; a report is what can be read off the
machine code: registers, stack, matrix instructions, and how wide and how many the accesses to
global memory are; a budget is the limits that this project sets itself. The modules, each of which
imports those before it alone: ``targets``; ``variant``, the vocabulary; ``compile`` and
``machine_code``, with ``paths`` and ``waits``; ``identity``; ``option_sets`` and ``formats``;
``update``, ``norms``, ``coefficients``, ``accumulate``, ``materialised``, ``vectors`` and
``samples``, a family of kernels each; ``catalogue``, all of them.
"""

from .catalogue import variants
from .compile import compile_variant
from .identity import identity
from .machine_code import instructions, report, waits
from .targets import architecture, capability, parse_target, processors
from .variant import DTYPES, Budget, Report, Variant, element_type

__all__ = [
    "DTYPES",
    "Budget",
    "Report",
    "Variant",
    "architecture",
    "capability",
    "compile_variant",
    "element_type",
    "identity",
    "instructions",
    "parse_target",
    "processors",
    "report",
    "variants",
    "waits",
]
