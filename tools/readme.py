"""A part of a page that a command writes, between two markers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Section:
    """What stands between two markers.

    Attributes:
        name: in the markers.
        title: for the command's help and its messages.
        text: returns what stands there, in Markdown, with links from the project's root.
        place: the page, from the project's root.
    """

    name: str
    title: str
    text: Callable[[], str]
    place: str

    @property
    def page(self) -> Path:
        """The page's file."""
        return ROOT / self.place

    @property
    def begin(self) -> str:
        """The marker before."""
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        """The marker behind."""
        return f"<!-- {self.name}: end -->"

    def within(self, page: str) -> str:
        """Return the page's text with this part as it is now."""
        pattern = re.compile(f"{re.escape(self.begin)}.*?{re.escape(self.end)}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(
                f"{self.place} has no place for {self.title}: {self.begin} ... {self.end}"
            )
        # The page lies in a folder.
        found = re.sub(r"\]\((?=[\w.]+/)", "](" + "../" * self.place.count("/"), self.text())
        return pattern.sub(lambda _: f"{self.begin}\n{found}\n{self.end}", page)

    def main(self) -> int:
        """Print the part, or write it into the page."""
        parser = argparse.ArgumentParser(description=f"{self.title}, for {self.place}.")
        parser.add_argument("--write", action="store_true", help=f"write it into {self.place}")
        if parser.parse_args().write:
            page = self.within(self.page.read_text(encoding="utf-8"))
            self.page.write_text(page, encoding="utf-8")
        else:
            print(self.text())
        return 0
