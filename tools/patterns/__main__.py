"""All 2^32 bit patterns through each codec: ``python -m tools.patterns [--kernels]``.

The PyTorch twins by default, and with ``--kernels`` the device functions, held bit by bit to the
twins by the tests. Those run in Triton's interpreter unless on a GPU, and take a sample there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .subjects import Subject

# Patterns at once, which stay in the caches: with 2^22 it takes half as long again.
CHUNK = 1 << 18
# Of a sample, in steps of an odd number: every residue of the lower bits, and every exponent.
SAMPLE, STRIDE = 1 << 24, 0x9E3779B1


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every pattern, write the result, and return 1 where something does not hold."""
    options = _parser().parse_args(arguments)
    interpreted = options.kernels and options.device == "cpu"
    if interpreted:
        # Before Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        # numpy's, of sums that overflow as they should.
        warnings.simplefilter("ignore", RuntimeWarning)
    import torch

    from bench.harness import output
    from bench.harness.environment import environment, slug
    from fusedopt.cli.progress import progress

    from . import subjects as listed

    torch.set_num_threads(options.threads)
    functions: Any = listed.TWINS
    if options.kernels:
        from . import device as functions
    sample = options.sample or (SAMPLE if interpreted else None)
    facts = environment(options.device)
    settings = {"kernels": options.kernels, "sample": sample, "threads": options.threads}
    note = "a sample" if sample else "all patterns"
    result = output.new(settings, facts, sample is None, note) | {"subjects": []}
    name = "patterns-kernels" if options.kernels else "patterns"
    file = output.File(options.out, f"{slug(facts)}-{name}")
    with progress("Patterns", False) as show:
        for subject in listed.subjects(functions):
            if options.only not in subject.name:
                continue
            found = _checked(subject, sample, options.device, show)
            result["subjects"].append(found)
            result["minutes"] = sum(x["seconds"] for x in result["subjects"]) / 60
            file.keep(result)
    failed = [x for x in result["subjects"] if x["failures"]]
    for found in failed:
        print(f"{found['name']}: {', '.join(found['failures'])}")
    print(f"{len(result['subjects'])} checked, {len(failed)} failed: {file.json}")
    return 1 if failed or not result["subjects"] else 0


def _checked(subject: Subject, sample: int | None, device: str, show: Any) -> dict[str, Any]:
    from . import checks

    begin = time.perf_counter()
    counts: checks.Counts = {}
    count = min(subject.patterns, sample or subject.patterns)
    for first, patterns in _chunks(subject.patterns, count, device):
        checks.merge(counts, subject.check(patterns))
        show(subject.name, first + len(patterns), count)
    return {
        "name": subject.name,
        "patterns": count,
        "of": subject.patterns,
        "seconds": time.perf_counter() - begin,
        "found": counts,
        "allowed": subject.limits,
        "failures": checks.failures(counts, subject.limits),
    }


def _chunks(patterns: int, count: int, device: str) -> Iterator[tuple[int, Any]]:
    import torch

    chunk = CHUNK if device == "cpu" else 1 << 24
    for first in range(0, count, chunk):
        numbers = torch.arange(first, min(first + chunk, count), device=device)
        yield first, numbers if count == patterns else numbers * STRIDE % patterns


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.patterns", description=__doc__)
    add = parser.add_argument
    add("--kernels", action="store_true", help="the device functions instead of their twins")
    add("--device", default="cpu", help="cpu, or cuda to check there (cpu)")
    add("--sample", type=int, metavar="N", help="patterns of each (all; 2^24 in the interpreter)")
    add("--only", default="", metavar="TEXT", help="what has this in its name")
    add("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    default = Path(__file__).resolve().parents[2] / "bench" / "results"
    add("--out", type=Path, default=default, metavar="DIR", help="for the JSON (bench/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
