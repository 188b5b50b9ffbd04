"""The command line: ``python -m fusedopt <command>``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from fusedopt import __version__

COMMANDS = {
    "info": "environment, devices, and the backend chosen for each and why",
    "verify": "kernels against reference on this machine, in ulps",
    "codegen": "compile every kernel variant without a GPU and check the budgets",
    "precompile": "fill a Triton cache, so that the first step on a GPU compiles nothing",
    "bench": "time optimizer steps against PyTorch's and other libraries'",
    "demo": "train a small GPT with torch.optim.AdamW and with fusedopt.AdamW",
}

# What draws: tables and bars, and plots. The demo does without plots.
DRAWING = {"bench": ("rich", "matplotlib")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` by default.

    Returns:
        0 on success, 1 where a check failed, 2 for bad arguments and for packages that are not
        installed, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m fusedopt", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fusedopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # Only the command that runs is imported: the others may need what is not installed.
        if name == chosen:
            module = importlib.import_module(f"fusedopt.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # argparse by itself prints the usage of the whole, which has none of the command's options.
        before = arguments[: arguments.index(options.command)]
        own = parser if set(unknown) & set(before) else commands.choices[options.command]
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print(f"{chosen}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "matplotlib"):
            raise
        print(f"{chosen} needs {_advice(options.command, missing)}", file=sys.stderr)
        return 2


def _advice(command: str, missing: str) -> str:
    """Name all that a command lacks, so that nobody installs one package after the other."""
    others = [
        name
        for name in DRAWING.get(command, ())
        if name != missing and importlib.util.find_spec(name) is None
    ]
    # By their own names: fusedopt's extras are known to pip in a checkout alone.
    return f"{' and '.join([missing, *others])}: pip install {' '.join([missing, *others])}"


if __name__ == "__main__":
    sys.exit(main())
