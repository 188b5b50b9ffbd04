"""How many elements and threads a program of the update kernel has.

An update waits for memory, so what decides is how many bytes are on their way at once, and that
depends on the architecture and on the registers that a rule takes. ``tuned.json``, beside this
file, holds what ``python -m bench.tune`` has measured; where it has no entry the default stands.
Nothing is tried out at run time: a kernel that updates in place would apply the update once for
each trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import multi_tensor, telemetry
from .codecs.format import PLAIN, Format

TUNED = Path(__file__).resolve().with_name("tuned.json")

# Bytes of an element, by Triton's name of its type.
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# What one access of a thread moves, at most.
ACCESS_BYTES = 16


@dataclass(frozen=True)
class LaunchConfig:
    """Elements and threads of a program; both powers of two."""

    block: int
    threads: int

    def check(self, types: str) -> None:
        """Raise ValueError where accesses could not be 128 bits wide, or a size is impossible.

        Args:
            types: as ``types_key`` writes them.
        """
        for name, value, low, high in (
            ("block", self.block, 128, 65536),
            # A wavefront of AMD's has 64.
            ("threads", self.threads, 64, 1024),
        ):
            if type(value) is not int or not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name} is a power of two from {low} to {high}, got {value!r}")
        narrowest = min(SIZES[name] for name in types.split("/"))
        if self.block * narrowest < ACCESS_BYTES * self.threads:
            raise ValueError(
                f"{self.threads} threads share a block of {self.block} elements of {types}: that"
                f" is less than {ACCESS_BYTES} bytes each, the width of an access"
            )


def types_key(dtypes: Sequence[str]) -> str:
    """Name the types of parameter, inputs and states: one name where all are the same."""
    return dtypes[0] if len(set(dtypes)) == 1 else "/".join(dtypes)


def default(aligned: bool, rowwise: bool = False, format: Format = PLAIN) -> LaunchConfig:
    """What stands where nothing was measured."""
    block = multi_tensor.block_size(aligned, rowwise, format)
    return LaunchConfig(block, multi_tensor.THREADS)


def measured(config: LaunchConfig) -> LaunchConfig:
    """Return what takes the place of a launch configuration where telemetry measures."""
    block = max(config.block, telemetry.SMALLEST_BLOCK)
    threads = config.threads * block // config.block
    return LaunchConfig(block, max(config.threads, min(threads, telemetry.MOST_THREADS)))


def update_launch_config(
    architecture: str, rule: str, dtypes: Sequence[str], aligned: bool
) -> LaunchConfig:
    """Return the launch configuration of ``multi_tensor.update_tensors``.

    Args:
        architecture: ``cuda:90``, ``hip:gfx942``, or anything else for the default.
        rule: name of the rule.
        dtypes: types of parameter, inputs and states in Triton's spelling.
        aligned: whether every address is a multiple of 16 bytes; otherwise the default stands.
    """
    if not aligned:
        return default(aligned)
    return _tuned().get((architecture, rule, types_key(dtypes)), default(aligned))


@cache
def _tuned() -> dict[tuple[str, str, str], LaunchConfig]:
    return index(load(TUNED))


def load(path: Path) -> list[dict[str, Any]]:
    """Read a table's entries.

    Raises:
        ValueError: where the file is not such a table; the message names it.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        index(entries)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of launch configurations: {error!r}") from error
    return list(entries)


def save(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, ordered, one entry a line.

    Args:
        path: where to; ``TUNED`` is what optimizers read.
        entries: with ``architecture``, ``rule``, ``types``, ``block`` and ``threads``; whatever
            else says where they come from.

    Raises:
        ValueError: for an entry that no kernel could run with; nothing is written then.
    """
    ordered = sorted(entries, key=_key)
    index(ordered)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in ordered)
    text = '{"entries": [' + (f"\n{lines}\n" if lines else "") + "]}\n"
    path.write_text(text, encoding="utf-8")
    _tuned.cache_clear()


def index(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], LaunchConfig]:
    """Check entries and return them by architecture, rule and types."""
    found: dict[tuple[str, str, str], LaunchConfig] = {}
    for entry in entries:
        config = LaunchConfig(entry["block"], entry["threads"])
        unknown = set(entry["types"].split("/")) - set(SIZES)
        if unknown:
            raise ValueError(f"{_key(entry)}: no types {sorted(unknown)}")
        config.check(entry["types"])
        if _key(entry) in found:
            raise ValueError(f"two entries for {_key(entry)}")
        found[_key(entry)] = config
    return found


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["architecture"], entry["rule"], entry["types"]
