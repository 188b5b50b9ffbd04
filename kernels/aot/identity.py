"""What decides the machine code of a variant, and what is read off it, as one short name.

Triton's front end turns a kernel with its constants into intermediate code; nothing but that, the
options, the target and the compiler itself goes into machine code. Triton's own name of a kernel is
of the text of sources and the line that it begins at, which a comment changes, and for AMD of the
folder that Triton is in.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from . import machine_code, paths
from .compile import compiler_input
from .variant import Variant


def identity(variant: Variant, target: Any) -> str:
    """Name a variant's intermediate code, options, target and compiler.

    Nothing is compiled, only translated, which takes a sixth of the time.

    Returns:
        16 digits: alike, whatever the machine and the folder, for what leads to one report.
    """
    from triton.compiler.compiler import make_backend

    source, chosen = compiler_input(variant, target)
    backend = make_backend(target)
    options = backend.parse_options(chosen)
    parts = (
        _intermediate(source, backend, options, target),
        repr(_plain(options)),
        str(target),
        # Of NVIDIA's assembler, the version.
        str(backend.hash()),
        _tools(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _intermediate(source: Any, backend: Any, options: Any, target: Any) -> str:
    """Translate; where in the sources a line stood is left out."""
    from triton._C.libtriton import ir

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, functions, modules, context).str_nodebug())


def _plain(options: Any) -> list[tuple[str, Any]]:
    """Name libraries by what is in them: the folder is another on every machine."""
    libraries = [(name, _content(path)) for name, path in options.extern_libs]
    return sorted({**vars(options), "extern_libs": libraries}.items())


@cache
def _tools() -> str:
    """Name Triton itself, what the environment changes of it, and what reads machine code."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import triton_key

    readers = [_content(str(module.__file__)) for module in (machine_code, paths)]
    return repr((triton_key(), sorted(get_cache_invalidating_env_vars().items()), readers))


@cache
def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
