"""Clients' own warnings are theirs: only ours are errors here."""

from __future__ import annotations

import os

import pytest

# No test may wait for, or depend on, what lies on a server.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::fusedopt")
