"""``python -m fusedopt bench``: the optimizer step against others, as tables, JSON and pictures."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

# What does not choose in every part.
OF_PARTS = {
    "case": " (of the step part)",
    "types": " (of the step part)",
    "rule": " (of the step and host parts)",
    "contender": " (training has three in any case)",
}
# What is left of the command in an installation.
ELSEWHERE = "The benchmarks are part of the source checkout, and this is an installed fusedopt"
CHECKOUT = Path(__file__).resolve().parents[2]


def _step(name: str = "") -> ModuleType | None:
    """Import the benchmark, which is part of the checkout and of no installation."""
    if not (CHECKOUT / "bench" / "step" / "__init__.py").exists():
        return None
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module("bench.step" + name)


def _names() -> dict[str, list[str]]:
    """Return what each option that takes names knows; nothing without a checkout."""
    found = {}
    for option, place, name in (
        ("case", ".models", "CASES"),
        ("rule", ".rules", "RULES"),
        ("types", ".codecs", "CODECS"),
        ("contender", ".contenders", "CONTENDERS"),
    ):
        module = _step(place)
        found[option] = [] if module is None else list(getattr(module, name))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    step = _step()
    parts = step.PARTS if step is not None else ()
    add = parser.add_argument
    if step is None:
        parser.description = f"{parser.description}. {ELSEWHERE}"
    what = f"{', '.join(parts)} (all that the set has)" if parts else "a part of the benchmark"
    add("parts", nargs="*", metavar="PART", help=what)
    add("--out", type=Path, metavar="DIR", help="for JSON and PNG (bench/results, or bench/out)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--core",
        dest="set",
        action="store_const",
        const="core",
        default="core",
        help="what matters most, in three minutes on an H100 by estimate (the default); without a"
        " GPU, a few cases on the CPU in about as long",
    )
    which.add_argument(
        "--full",
        dest="set",
        action="store_const",
        const="full",
        help="everything, in hours by estimate",
    )
    which.add_argument(
        "--quick", action="store_true", help="everything tiny, without a GPU too; no measurement"
    )
    for name, names in _names().items():
        what = "; ".join([*filter(None, [", ".join(names)]), "repeatable"]) + OF_PARTS[name]
        add(f"--{name}", action="append", default=[], metavar="NAME", help=what)
    flag = argparse.BooleanOptionalAction
    add("--clip", action=flag, help="only with, or without, clipping (both)")
    add("--scaler", action=flag, help="only with, or without, a loss scale (both)")
    add("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
    add("--seconds", type=float, help="of each contender, at most about (0.4; CPU 1)")
    add("--json", action="store_true", help="machine-readable output, nothing else")


def run(options: argparse.Namespace) -> int:
    """Measure what the command line names."""
    step = _step()
    if step is None:
        print(
            f"bench: {ELSEWHERE[0].lower()}{ELSEWHERE[1:]} without one (no bench/ in {CHECKOUT})."
            " Run it from a checkout.",
            file=sys.stderr,
        )
        return 2
    wrong = _wrong(options, step)
    if wrong is not None:
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    main = _step(".run")
    assert main is not None
    return int(main.run(options))


def _wrong(options: argparse.Namespace, step: ModuleType) -> str | None:
    """Return what is wrong with the options, if anything is."""
    import torch

    known = {"PART": (options.parts, list(step.PARTS))}
    known |= {f"--{name}": (getattr(options, name), names) for name, names in _names().items()}
    for option, (given, names) in known.items():
        for value in given:
            if value not in names:
                return f"{option}: there is no {value!r}, but {', '.join(names)}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no GPU"
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if options.set == "full" and not options.quick and on_cpu:
        return (
            "--full is for a GPU. Without it a few cases are measured on the processor; --quick"
            " runs everything tiny"
        )
    if options.seconds is not None and not options.seconds > 0:
        return f"--seconds must be positive, got {options.seconds}"
    return None
