"""The C modules that Triton builds when a process first launches: into the cache, without a GPU.

Triton keeps them beside the kernels, by their source and the platform: one that loads machine code,
and before Triton 3.7 one for every signature of a kernel. Here they are built by Triton itself and
never loaded, for they need the driver's library. To link against, a library with the same names in
it is enough.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .fake_driver import NoLauncher

LIBRARY = "libcuda.so.1"


def c_compiler() -> str | None:
    """Return the C compiler that Triton would take, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def make_library(directory: Path) -> None:
    """Make a library to link against, in which every function of the driver fails.

    Raises:
        OSError: where the C compiler does not run.
        subprocess.CalledProcessError: where it fails.
    """
    source = directory / "driver.c"
    # 100 is CUDA_ERROR_NO_DEVICE, if ever one is called.
    functions = [f"int {name}(void) {{ return 100; }}\n" for name in _driver_functions()]
    source.write_text("".join(functions), encoding="utf-8")
    compiler = c_compiler() or "cc"
    command = [compiler, str(source), "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    output = ["-o", str(directory / LIBRARY)]
    subprocess.run([*command, *output], check=True, capture_output=True, text=True)


def _driver_functions() -> list[str]:
    """Every name of the driver's that Triton's sources mention.

    Linkers leave out a library that gives nothing to a module, which then could not be loaded.
    """
    import triton

    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    texts = [(nvidia / name).read_text(encoding="utf-8") for name in ("driver.c", "driver.py")]
    return sorted({name for text in texts for name in re.findall(r"\bcu[A-Z]\w*", text)})


class _Unloaded:
    """Stands in for a module that is built and not loaded: every function of it does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def build_without_loading(library: Path) -> None:
    """Make this process build modules for NVIDIA's GPUs, and load none, for good.

    Args:
        library: directory of what ``make_library`` made.
    """
    from triton import knobs
    from triton.runtime import build

    if not hasattr(build, "_load_module_from_path"):
        raise RuntimeError("this version of Triton builds its modules in an unknown way")
    knobs.nvidia.libcuda_path = str(library)
    build._load_module_from_path = lambda name, path: _Unloaded()


def build_utilities() -> None:
    """Build the module that loads machine code."""
    from triton.backends.nvidia import driver

    driver.CudaUtils()


def launcher() -> type:
    """Return what builds the module of a signature, and starts nothing."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        # Since Triton 3.7 one module serves all signatures.
        return NoLauncher

    class BuildOnly(driver.CudaLauncher):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> None:
            pass

    return BuildOnly
