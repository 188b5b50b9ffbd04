"""Writes the device functions of the library's rules as C, for the stand-in driver.

The text of each function is executed once with symbols in the place of blocks, and what it does
to them is written out: so the stand-in runs what ``kernels/rules`` says, stated nowhere twice.

    python native/tests/emulation.py OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

from fusedopt.kernels import lang
from native.generate.table import LIBRARY
from native.generate.trace import Symbol, leaf, statements


def _where(condition: Any, a: Any, b: Any) -> Symbol:
    return Symbol("?:", condition, a, b)


# The primitives of kernels/lang.py; the rest of it is executed like the rules.
PRIMITIVES = {
    "where": _where,
    "sqrt": lambda x: Symbol("sqrt()", x),
    "divide": lambda a, b: a / b,
    "maximum": lambda a, b: Symbol("maximum()", a, b),
    "tl": SimpleNamespace(where=_where),
}


def plain(function: Any) -> FunctionType:
    """A device function as Python, with symbols for everything it calls."""
    names = vars(sys.modules[function.fn.__module__])
    words = {}
    for name in function.fn.__code__.co_names:
        if name in PRIMITIVES:
            words[name] = PRIMITIVES[name]
        elif isinstance(names.get(name), type(lang.lerp)):
            words[name] = plain(names[name])
    return FunctionType(function.fn.__code__, words)


def emulate(name: str, update: Any, options: tuple[bool, ...], sizes: tuple[int, int]) -> list[str]:
    """State one update for float and for double."""
    n_coefficients, n_states = sizes
    states = tuple(leaf(f"s{i}") for i in range(n_states))
    coefficients = tuple(leaf(f"c[{i}]") for i in range(n_coefficients))
    p, new_states = plain(update)(leaf("p"), (leaf("g"),), states, coefficients, options)
    targets = ["v[0]", *(f"v[{2 + i}]" for i in range(n_states))]
    lines = []
    for real in ("float", "double"):
        lines += [f"static void {name}_{real}(const {real} *c, {real} *v)", "{"]
        lines += [f"    const {real} p = v[0], g = v[1];"]
        lines += [f"    const {real} s{i} = v[{2 + i}];" for i in range(n_states)]
        lines += ["    (void)c;"]
        lines += ["    " + line for line in statements([p, *new_states], targets, real)]
        lines += ["}", ""]
    return lines


def source() -> str:
    """State every update that the library offers, and a table of them."""
    lines = ["/* Written by native/tests/emulation.py: do not edit. */", "#include <math.h>"]
    lines += ['#include "emulation.h"', ""]
    rows = {}
    for entry in LIBRARY:
        for options, states in entry.layouts().items():
            bits = sum(int(on) << place for place, on in enumerate(options))
            names = [n for n, on in zip(entry.rule.option_names, options, strict=True) if on]
            name, sizes = f"{entry.rule.name}_{bits}", (entry.rule.n_coefficients, len(states))
            if name not in rows:
                rows[name] = (
                    f'    {{"{entry.rule.name}", "{", ".join(names)}", {sizes[0]}, {sizes[1]},'
                    f" {name}_float, {name}_double}},"
                )
                lines += emulate(name, entry.rule.update, options, sizes)
    lines += ["const struct emulation emulations[] = {", *rows.values(), "};"]
    return "\n".join([*lines, f"const size_t emulation_count = {len(rows)};", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
