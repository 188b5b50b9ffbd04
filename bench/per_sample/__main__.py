"""Takes the GPU figures of per-sample squares; prints them, and writes a JSON and a PNG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench.harness import output, tables
from bench.harness.contenders import Mismatch
from bench.harness.environment import device_slug
from bench.harness.gpt import TINY, Size
from bench.harness.places import RESULTS, SCRATCH

from . import PARTS, busy
from .cases import ARITHMETIC, QUICK, SHAPES, Shape

NOTE = "tiny shapes, which show that the benchmark works and nothing else"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0; or 1 where results differ or an aim is missed, or 2 without a GPU.
    """
    options = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print(
            "python -m bench.per_sample needs a GPU, and torch finds none. --quick runs tiny shapes"
            " on the CPU, to check the benchmark itself.",
            file=sys.stderr,
        )
        return 2
    if device == "cpu":
        # What is multiplied here is too small to share out among threads.
        torch.set_num_threads(1)
    return run(options, device)


def run(options: argparse.Namespace, device: str) -> int:
    """Measure, write and print; what there is of the JSON is written after every case."""
    from bench.harness.figures import save

    from . import figures
    from .report import report
    from .result import keep, new

    settings = _settings(options, device)
    result = new(settings, device, not options.quick, NOTE if options.quick else "")
    folder = options.out or _folder(result["environment"]["device"], options.quick)
    file = output.File(folder, "per_sample")
    with tables.progress(Console(stderr=True)) as progress:
        for _ in _parts(result, settings, progress):
            keep(result, file)
    keep(result, file)
    save(figures.draw(result), file.path(".png"))
    console = Console()
    report(result, console)
    console.print(f"Wrote {folder}/per_sample.json and .png", soft_wrap=True)
    missed = any(aim["holds"] is False for aim in result["aims"])
    return 1 if result["failed"] or missed else 0


def collect(arguments: Sequence[str], device: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """Measure without writing; yield the result after every case, as far as it has come."""
    from .aims import aims
    from .result import new

    options = _parse(arguments)
    settings = _settings(options, device)
    result = new(settings, device, not options.quick, NOTE if options.quick else "")
    for _ in _parts(result, settings, progress):
        result["aims"] = aims(result)
        yield result


def _parts(result: dict[str, Any], settings: dict[str, Any], progress: Progress) -> Iterator[None]:
    """Fill the result in, case by case."""
    from . import linear, training
    from .contenders import CONTENDERS

    if "linear" in settings["parts"]:
        cases = [(shape, kind) for kind in settings["types"] for shape in settings["shapes"]]
        task = progress.add_task("", total=len(cases) * len(CONTENDERS))
        for i, (text, kind) in enumerate(cases):
            what = f"{text} {kind}"
            progress.update(task, description=what, completed=i * len(CONTENDERS))
            case = partial(linear.measure, Shape.parse(text), kind, settings)
            found = _attempt(result, what, case, partial(progress.advance, task))
            result["linear"] += [] if found is None else [found]
            yield
        progress.update(task, completed=len(cases) * len(CONTENDERS))
    if "training" in settings["parts"]:
        task = progress.add_task("training step", total=4)
        case = partial(training.measure, Size(**settings["size"]), settings)
        result["training"] = _attempt(
            result, "training step", case, partial(progress.advance, task)
        )
        yield


def _attempt(
    result: dict[str, Any],
    what: str,
    measure: Callable[[Callable[[], None]], dict[str, Any]],
    advance: Callable[[], None],
) -> dict[str, Any] | None:
    """Measure one case; where its results differ it has no times, and the run fails in the end."""
    try:
        return measure(advance)
    except (Mismatch, torch.OutOfMemoryError) as error:
        result["failed"].append(f"{what}: {error}")
        return None


def _settings(options: argparse.Namespace, device: str) -> dict[str, Any]:
    size = vars(TINY if options.quick else Size()) | {"tied": options.tied}
    for name in ("layers", "heads", "width", "vocabulary", "length"):
        if getattr(options, name) is not None:
            size[name] = getattr(options, name)
    return {
        "device": device,
        "parts": options.parts or list(PARTS),
        "shapes": [str(s) for s in _shapes(options)],
        "types": options.types or list(ARITHMETIC),
        "repetitions": options.repetitions or (3 if options.quick else 50),
        "seconds": options.seconds,
        "contenders": options.contender,
        "size": size,
        "batch": options.batch or (3 if options.quick else 32),
    }


def _shapes(options: argparse.Namespace) -> Sequence[Shape]:
    if options.models:
        return list(busy.shapes())
    return options.shapes or (QUICK if options.quick else SHAPES)


def _folder(device: str, quick: bool) -> Path:
    return SCRATCH / "per_sample" if quick else RESULTS / device_slug(device) / "per_sample"


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not batch x length x inputs x outputs, as in {SHAPES[0]}"
        ) from error


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.per_sample", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{' or '.join(PARTS)} (both)")
    add("--quick", action="store_true", help="tiny shapes, without a GPU too; no measurement")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="BxTxIxO", help=", ".join(map(str, SHAPES))
    )
    names = ", ".join(busy.MODELS)
    which.add_argument("--models", action="store_true", help=f"the layers of {names} instead")
    add("--types", nargs="+", choices=list(ARITHMETIC), help="of arithmetic (all)")
    add(
        "--contender",
        action="append",
        choices=("materialised", "vmap", "vmap_backward", "opacus", "backpack", "none"),
        help="beside the kernel and the plain gradient, these alone; repeatable (all)",
    )
    add("--repetitions", type=_positive, help="rounds of times (50)")
    add("--seconds", type=float, default=2.0, help="of a slow contender, at most about (2)")
    add("--out", type=Path, metavar="DIR", help="(bench/results/DEVICE/per_sample)")
    gpt = parser.add_argument_group("training")
    gpt.add_argument("--batch", type=_positive, help="sequences, halved until they fit (32)")
    gpt.add_argument("--tied", action="store_true", help="head and embedding share a weight")
    for name in ("layers", "heads", "width", "vocabulary", "length"):
        gpt.add_argument(f"--{name}", type=_positive, help=f"({getattr(Size(), name)})")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}: there are {' and '.join(PARTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
