"""Results that are read while a run goes on, or after it was killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file; at every moment there is the one before or the one after.

    Args:
        path: its folder is made if need be.
        text: all that it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
