"""The checkout that the tests are part of: what is installed nowhere is imported from it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Last, so that it hides nothing that is installed.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
