"""Options of precision and optimizers on the command line, for every command that takes them."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fusedopt import FusedOptimizer, WeightAverage

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
CODES = ("int8", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--states``, ``--master``, ``--rounding`` and ``--average``."""
    types = " ".join([*CODES, *DTYPES])
    parser.add_argument(
        "--states",
        type=read_states,
        metavar="int8",
        help=f"state_dtype: one of {types}, or by state: exp_avg=bf16,exp_avg_sq=int8",
    )
    parser.add_argument("--master", metavar="remainder8", help="remainder, remainder8 or float32")
    parser.add_argument("--rounding", metavar="stochastic", help="stochastic or kahan")
    parser.add_argument(
        "--average",
        type=read_dtype,
        metavar="fp32",
        help="type of an average of the weights: fp32, bf16 or fp16; none by default",
    )


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Return those of the options that were given, as parameter groups have them.

    Raises:
        ValueError: for an average of another type.
    """
    given = {
        "state_dtype": options.states,
        "master": options.master,
        "rounding": options.rounding,
    }
    found = {name: value for name, value in given.items() if value is not None}
    if options.average is not None:
        found |= WeightAverage(dtype=options.average).options()
    return found


def read_states(text: str) -> Any:
    """Read ``state_dtype``.

    Raises:
        argparse.ArgumentTypeError: for a type that there is not.
    """
    if "=" not in text:
        return _state_dtype(text)
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        found[name] = _state_dtype(value)
    return found


def _state_dtype(text: str) -> Any:
    if text in CODES:
        return text
    return read_dtype(text, also=CODES)


def read_dtype(text: str, also: tuple[str, ...] = ()) -> torch.dtype:
    """Read a floating type.

    Raises:
        argparse.ArgumentTypeError: for a type that there is not.
    """
    # As torch calls them, too.
    known = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}
    text = text.removeprefix("torch.")
    if text not in known:
        raise argparse.ArgumentTypeError(
            f"no type {text!r}: there are {', '.join([*also, *DTYPES])}"
        )
    return known[text]


def optimizers() -> dict[str, Any]:
    """Return the classes of optimizers by name."""
    import fusedopt

    return {
        name: value
        for name, value in vars(fusedopt).items()
        if isinstance(value, type) and issubclass(value, FusedOptimizer) and hasattr(value, "rule")
    }
