"""The vocabulary of the device functions, importable where Triton is not installed.

A rule writes its update with these few operations and with ``+ - * /``. ``sqrt`` and ``divide`` are
correctly rounded where Triton's own are approximate: a step waits for memory, not for them. They
take registers, though; a rule may use ``/`` (two units in the last place) where those run out.

Without Triton the decorator leaves a plain Python function behind, which nothing calls: the
host-side half of a rule (coefficients, twin) keeps working.
"""

from __future__ import annotations

from typing import Any

# What keeps Triton from being used, or None.
MISSING: str | None = None

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language.extra import libdevice
except ImportError as error:
    triton = None
    tl = None
    libdevice = None
    # Triton's interpreter computes with numpy, which Triton does not ask for.
    MISSING = "Triton is not installed"
    if error.name != "triton":
        MISSING = f"Triton cannot be imported ({error})"
    if error.name == "numpy":
        MISSING = "Triton's interpreter needs numpy, which is not installed: pip install numpy"

    def jit(fn: Any = None, **_: Any) -> Any:
        """Stand in for ``triton.jit``: the function stays plain Python."""
        return fn if fn is not None else jit


@jit
def where(condition, a, b):
    """Choose elementwise; never a multiplication by zero, which would turn inf into nan."""
    return tl.where(condition, a, b)


@jit
def sqrt(x):
    """Square root, correctly rounded."""
    # tl.sqrt is the approximate instruction for float32, and the exact form exists for it alone.
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@jit
def divide(a, b):
    """Quotient of two blocks, correctly rounded."""
    # a / b compiles to an instruction that is off by up to two units in the last place.
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@jit
def maximum(a, b):
    """Elementwise maximum in which a nan wins, as in ``torch.maximum``."""
    # The default drops a nan in compiled code and keeps it in the interpreter.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def lerp(a, b, weight):
    """Move from ``a`` to ``b`` by ``weight``, anchored at the nearer end as ``torch.lerp`` is.

    The one-sided form ``a + weight * (b - a)`` does not return ``b`` at weight 1.
    """
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


# A product and a sum may be contracted into one rounding, which takes fewer registers. Stated,
# because Triton's default is about to change.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


# Each operation is rounded by itself.
EXACT_OPTIONS = {"enable_fp_fusion": False}


def register_options(registers: int | None, backend: str) -> dict[str, int]:
    """Return the compile options that keep a kernel within so many registers a thread.

    Args:
        registers: at most; None for any.
        backend: ``cuda``; others are asked nothing: AMD's compiler stays within by itself, and
            where it is told how many waves are to fit (``waves_per_eu``), it takes stack instead.
    """
    return {} if registers is None or backend != "cuda" else {"maxnreg": registers}


# Whether the kernels run as Python on the CPU (TRITON_INTERPRET=1 when this module was imported).
INTERPRETED = triton is not None and not isinstance(lerp, triton.JITFunction)

if INTERPRETED:

    def power(a: Any, b: Any) -> Any:
        """Raise a block to a power, as ``power`` of compiled code: the interpreter has none."""
        import numpy as np
        from triton.runtime.interpreter import TensorHandle

        with np.errstate(all="ignore"):
            data = np.power(a.handle.data, b.handle.data)
        return tl.tensor(TensorHandle(data, a.handle.dtype), a.type)

else:

    @jit
    def power(a, b):
        """Raise a float64 block to a power, by the target's own library."""
        return libdevice.pow(a, b)
