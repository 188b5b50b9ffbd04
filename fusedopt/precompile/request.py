"""What is to be compiled, and where to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Called with what goes on, and how many of how many variants are done.
Step = Callable[..., None]


@dataclass(frozen=True)
class Request:
    """What the command line asks for, checked.

    Attributes:
        targets: as ``aot.parse_target`` reads them.
        rules: names of rules; none means all.
        types: names of element types; none means all.
        cache: an absolute path, writable.
        imports: modules that register rules.
        statistics: whether per-sample squares are wanted.
        precision: options that steps are taken with, as optimizers take them.
        jobs: processes.
    """

    targets: tuple[str, ...]
    rules: tuple[str, ...]
    types: tuple[str, ...]
    cache: Path
    imports: tuple[str, ...]
    statistics: bool
    precision: Mapping[str, Any]
    jobs: int
