"""Stops a build that would leave the kernels out; everything else is said in pyproject.toml."""

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).resolve().parent / "fusedopt"

for name in ("kernels", "examples"):
    if not (PACKAGE / name / "__init__.py").is_file():
        raise SystemExit(
            f"fusedopt cannot be built: fusedopt/{name} has to be a link to {name}, and this"
            " copy has lost it. Unpack or clone it anew where links are allowed (with git on"
            " Windows: git clone -c core.symlinks=true), or build from the source archive"
        )

setup()
