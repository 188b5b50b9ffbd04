"""Every variant of every family of kernels.

To add a family: list its variants in a module of its own, and yield them below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import accumulate, coefficients, materialised, norms, samples, update, vectors
from .targets import architecture
from .variant import Variant


def variants(target: Any) -> Iterator[Variant]:
    """Every variant that can be needed on a target: the registry's rules and the other kernels."""
    yield from update.variants(architecture(target))
    yield from norms.variants()
    yield from coefficients.variants()
    yield from accumulate.variants()
    yield from samples.variants(target)
    yield from vectors.variants()
    yield from materialised.variants()
