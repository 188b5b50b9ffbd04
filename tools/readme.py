"""A part of the README that a command writes, between two markers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


@dataclass(frozen=True)
class Section:
    """What stands between two markers.

    Attributes:
        name: in the markers.
        title: for the command's help and its messages.
        text: returns what stands there, in Markdown.
    """

    name: str
    title: str
    text: Callable[[], str]

    @property
    def begin(self) -> str:
        """The marker before."""
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        """The marker behind."""
        return f"<!-- {self.name}: end -->"

    def within(self, readme: str) -> str:
        """Return the README's text with this part as it is now."""
        pattern = re.compile(f"{re.escape(self.begin)}.*?{re.escape(self.end)}", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(
                f"README.md has no place for {self.title}: {self.begin} ... {self.end}"
            )
        found = self.text()
        return pattern.sub(lambda _: f"{self.begin}\n{found}\n{self.end}", readme)

    def main(self) -> int:
        """Print the part, or write it into the README."""
        parser = argparse.ArgumentParser(description=f"The README's part with {self.title}.")
        parser.add_argument("--write", action="store_true", help="write it into README.md")
        if parser.parse_args().write:
            README.write_text(self.within(README.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print(self.text())
        return 0
