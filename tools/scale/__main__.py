"""The counts of docs/scale.md: ``python -m tools.scale [--write]``, its picture included."""

from __future__ import annotations

import sys

from tools.readme import Section

from . import page, picture

SECTION = Section("scale", "the counts for thousands of GPUs", page.text, "docs/scale.md")

if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        picture.write()
    sys.exit(SECTION.main())
