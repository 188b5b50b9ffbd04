"""How often a thread waits for memory before it asks for the first of its data.

A thread issues its instructions in order, and stops at the first that reads what a load has yet to
bring. So what matters is not how many loads come before the data, but how many rounds of them: a
round ends where something that was loaded is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .paths import SASS

_PARTS = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
_GUARD = re.compile(r"\*/\s+@!?(U?P\w+)")
_REGISTER = re.compile(r"\bU?R\d+\b")
_WIDTH = re.compile(r"\.(64|128)\b")


def waits_before_data(lines: Iterable[str]) -> int | None:
    """Count the rounds of loads that a thread waits for before its first 128-bit access.

    Args:
        lines: instructions of NVIDIA's machine code in the order of one way through it, as
            ``paths.whole_chunk`` finds it.

    Returns:
        None where nothing is accessed by 128 bits.
    """
    # When what a load brings is there, counted in latencies; and what time it is.
    arrival: dict[str, int] = {}
    now = 0
    for line in lines:
        name, target, sources = _parse(line)
        now = max([now, *(arrival.get(source, 0) for source in sources)])
        if SASS.wide.search(line):
            return now
        if target is None:
            continue
        # From global memory; constants and what the processor itself knows are there at once.
        is_load = name.startswith("LDG")
        for register in _registers(target, name if is_load else ""):
            arrival[register] = now + is_load
    return None


def _parse(line: str) -> tuple[str, str | None, set[str]]:
    """Return an instruction's name, the first register that it writes, and those that it reads."""
    found = _PARTS.search(line)
    if found is None:
        return "", None, set()
    name, operands = found.groups()
    first, _, rest = operands.partition(",")
    # What is stored and compared is read, wherever it stands.
    writes = not name.startswith(("ST", "RED", "BRA", "EXIT"))
    target = _REGISTER.search(first) if writes and "[" not in first else None
    sources = set(_REGISTER.findall(rest if writes else operands))
    guard = _GUARD.search(line)
    if guard is not None:
        sources.add(guard[1])
    return name, None if target is None else target[0], sources


def _registers(first: str, name: str) -> set[str]:
    kind = first.rstrip("0123456789")
    width = _WIDTH.search(name)
    count = int(width[1]) // 32 if width else 1
    return {f"{kind}{int(first[len(kind) :]) + i}" for i in range(count)}
